"""Kinds of adapters: parts grouped by name, shapes solved; lycoris and peft write the files."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.kinds import is_lora, kind_of
from diffquant.convert.lora.base import guess_base
from diffquant.convert.lora.group import group_adapters
from diffquant.convert.lora.roles import Part, part_of
from diffquant.core.tensors import TensorSpec

DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


class Memory:
    """A file in memory: key -> shape (of F16 zeros), or key -> array."""

    def __init__(self, tensors, metadata=None, path="some.safetensors"):
        self.path, self.container, self.configs = Path(path), "safetensors", {}
        self.metadata, self.tensors = metadata or {}, tensors
        self.specs = {
            key: TensorSpec(key, "F16", tuple(value))
            if isinstance(value, tuple | list)
            else TensorSpec(key, DTYPES[value.dtype.name], value.shape)
            for key, value in tensors.items()
        }

    def read(self, key, rows=None):
        value = self.tensors[key]
        if isinstance(value, tuple | list):
            return np.zeros(self.specs[key].nbytes, np.uint8)
        return np.ascontiguousarray(value[slice(*rows)] if rows else value).reshape(-1).view("u1")


ENDINGS = {
    "lora_unet_a.lora_down.weight": ("lora_unet_a", "", "down"),
    "lora_unet_a.alpha": ("lora_unet_a", "", "alpha"),
    "unet.a.lora_B.default.weight": ("unet.a", "default", "up"),
    "unet.a.lora_A": ("unet.a", "", "down"),
    "unet.a.lora_B.bias": ("unet.a", "", "up_bias"),
    "unet.a.lora.up.weight": ("unet.a", "", "up"),
    "unet.a.lora.alpha": ("unet.a", "", "alpha"),
    "text_encoder.a.lora_linear_layer.down.weight": ("text_encoder.a", "", "down"),
    "a.processor.to_q_lora.down.weight": ("a.processor.to_q", "", "down"),
    "a.processor.qkv_lora1.up.weight": ("a.processor.qkv_lora1", "", "up"),
    "unet:12:up": ("unet:12", "", "up"),
    "a.hada_w1_a.style": ("a", "style", "hada_w1_a"),
    "a.lokr_w2": ("a", "", "lokr_w2"),
    "a.oft_R.default.weight": ("a", "default", "oft_r"),
    "a.lora_magnitude_vector.weight": ("a", "", "magnitude"),
    "a.lora_embedding_A.x": ("a", "x", "embedding_a"),
    "a.down.weight": None,
    "a.lora_down.bias": None,
    "a.weight": None,
    "alpha": None,
    ".alpha": ("", "", "alpha"),
    "lora_down.weight": None,
}


@pytest.mark.parametrize("key", ENDINGS)
def test_a_key_says_its_module_and_role(key):
    wanted = ENDINGS[key]
    if key == ".alpha":
        assert part_of(key) is None or part_of(key).role == "alpha"
        return
    assert part_of(key) == (None if wanted is None else Part(*wanted))


def one(parts, name="lora_unet_x", **rest):
    """The only adapter of a file, or its one fault."""
    file = group_adapters(Memory({f"{name}.{end}": shape for end, shape in parts.items()}, **rest))
    assert len(file.adapters) + len(file.broken) == 1
    return file.adapters[0] if file.adapters else file.broken[0]


LOHA = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 6), "hada_w2_a": (12, 2), "hada_w2_b": (2, 6)}
WHOLE = [  # parts, label, shape, rank
    ({"lora_down.weight": (4, 6), "lora_up.weight": (12, 4)}, "LoRA", (12, 6), 4),
    (
        {"lora_down.weight": (4, 6, 3, 3), "lora_up.weight": (12, 4, 1, 1)},
        "LoCon",
        (12, 6, 3, 3),
        4,
    ),
    (
        {
            "lora_down.weight": (4, 6, 1, 1),
            "lora_up.weight": (12, 4, 1, 1),
            "lora_mid.weight": (4, 4, 3, 3),
        },
        "LoCon",
        (12, 6, 3, 3),
        4,
    ),
    (
        {"lora_down.weight": (4, 6), "lora_up.weight": (12, 4), "dora_scale": (12, 1)},
        "DoRA",
        (12, 6),
        4,
    ),
    (LOHA, "LoHa", (12, 6), 2),
    ({**LOHA, "dora_scale": (1, 6)}, "LoHa with DoRA", (12, 6), 2),
    (
        {
            "hada_w1_a": (2, 12),
            "hada_w1_b": (2, 6),
            "hada_t1": (2, 2, 3, 3),
            "hada_w2_a": (2, 12),
            "hada_w2_b": (2, 6),
            "hada_t2": (2, 2, 3, 3),
        },
        "LoHa",
        (12, 6, 3, 3),
        2,
    ),
    ({"lokr_w1": (3, 2), "lokr_w2": (4, 3)}, "LoKr", (12, 6), None),
    ({"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3)}, "LoKr", (12, 6), 2),
    (
        {"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 2), "lokr_w2": (4, 3, 3, 3)},
        "LoKr",
        (12, 6, 3, 3),
        1,
    ),
    (
        {
            "lokr_w1": (3, 2),
            "lokr_w2_a": (2, 4),
            "lokr_w2_b": (2, 3),
            "lokr_t2": (2, 2, 3, 3),
        },
        "LoKr",
        (12, 6, 3, 3),
        2,
    ),
    (
        {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (12, 2), "b2.weight": (2, 6)},
        "GLoRA",
        (12, 6),
        2,
    ),
    (
        {"a1.weight": (2, 6), "a2.weight": (6, 2), "b1.weight": (2, 6), "b2.weight": (12, 2)},
        "GLoRA",
        (12, 6),
        2,
    ),
    ({"oft_blocks": (3, 4, 4)}, "OFT", (12, None), None),
    ({"oft_diag": (3, 4, 4)}, "OFT", (12, None), None),
    ({"oft_R.weight": (3, 1)}, "OFT", (None, 6), None),
    ({"oft_blocks": (2, 3, 4, 4)}, "BOFT", (12, None), None),
    ({"boft_R": (1, 3, 2, 2), "boft_s": (12, 1)}, "BOFT", (12, 6), None),
    ({"ia3_l": (12, 1)}, "IA3", (12, None), None),
    ({"ia3_l": (1, 6)}, "IA3", (None, 6), None),
    ({"diff": (12, 6), "diff_b": (12,)}, "full difference", (12, 6), None),
    ({"w_norm": (12,), "b_norm": (12,)}, "norm", (12, None), None),
    (
        {"q_layer.weight": (2, 6), "p_layer.weight": (12, 2), "lambda_layer": (1, 2)},
        "T-LoRA",
        (12, 6),
        2,
    ),
    ({"lora_embedding_A": (2, 12), "lora_embedding_B": (6, 2)}, "LoRA of a table", (12, 6), 2),
]


@pytest.mark.parametrize(("parts", "label", "shape", "rank"), WHOLE)
def test_parts_tell_kind_shape_and_rank(parts, label, shape, rank):
    found = one(parts)
    assert (found.label, found.shape, found.rank) == (label, shape, rank)
    assert set(found.parts.values()) == {f"lora_unet_x.{end}" for end in parts}


@pytest.mark.parametrize("parts", [row[0] for row in WHOLE if row[1] != "norm"])
def test_files_of_each_kind_are_adapters(parts):
    specs = Memory({f"lora_unet_{n}.{end}": s for n in "ab" for end, s in parts.items()}).specs
    assert is_lora(specs)
    assert kind_of(specs) == "lora"


def test_ia3_of_lycoris_says_which_side_it_scales():
    for on_input, shape in ((1, (None, 12)), (0, (12, None))):
        tensors = {"lora_unet_x.weight": (12,), "lora_unet_x.on_input": np.array(on_input)}
        assert is_lora(Memory(tensors).specs)
        assert group_adapters(Memory(tensors)).adapters[0].shape == shape


@pytest.mark.parametrize(
    "keys",
    [
        ("net.a1.weight", "net.a2.weight", "net.b1.weight"),
        ("q_layer.weight", "x.q_layer.weight", "x.p_layer.weight"),
        ("block.0.weight", "block.0.alpha", "block.1.weight"),
        ("x.rescale", "x.weight"),
    ],
)
def test_names_that_others_use_make_no_adapter(keys):
    assert not is_lora(Memory(dict.fromkeys(keys, (4, 4))).specs)


BROKEN = [
    ({"lora_down.weight": (4, 6)}, "the up factor of this layer is missing"),
    ({"lora_up.weight": (4, 6)}, "the down factor of this layer is missing"),
    ({k: v for k, v in LOHA.items() if k != "hada_w2_b"}, "the hada_w2_b factor"),
    ({"lokr_w1": (3, 2), "lokr_w2_a": (4, 2)}, "the lokr_w2 factor"),
    ({"dora_scale": (4, 1)}, "magnitude beside no factors"),
    ({"lora_down.weight": (4, 6), "lora_up.weight": (12, 3)}, "expected factors (r, K) and (n, r)"),
    ({"lora_down.weight": (4,), "lora_up.weight": (12, 4)}, "expected factors"),
    ({"lora_down.weight": (0, 6), "lora_up.weight": (12, 0)}, "down (0, 6) has no numbers"),
    (
        {"lora_down.weight": (4, 6), "lora_up.weight": (12, 4), "dora_scale": (5, 1)},
        "expected a magnitude for 12 rows or 6 columns, found (5, 1)",
    ),
    ({**LOHA, "hada_w2_a": (11, 2)}, "expected two products of one shape"),
    ({"oft_blocks": (3, 4, 5)}, "expected square blocks"),
    ({"oft_R.weight": (3, 4)}, "expected triangles of blocks"),
    ({"ia3_l": (3, 4)}, "expected a vector"),
    ({"lora_down.weight": (4, 6), "lora_up.weight": (12, 4), "diff": (12, 6)}, "parts of LoRA and"),
    (
        {"lora_down.weight": (4, 6), "lora_up.weight": (12, 4), "alpha": (2,)},
        "alpha is F16 (2,), expected one number",
    ),
]


@pytest.mark.parametrize(("parts", "reason"), BROKEN)
def test_what_makes_no_adapter_is_named_with_the_reason(parts, reason):
    found = one(parts)
    assert found.name == "lora_unet_x"
    assert reason in found.reason


def test_alpha_that_is_no_number_is_named():
    tensors = {
        "lora_unet_x.lora_down.weight": (4, 6),
        "lora_unet_x.lora_up.weight": (12, 4),
        "lora_unet_x.alpha": np.array(np.nan, np.float32),
    }
    [found] = group_adapters(Memory(tensors)).broken
    assert found.reason == "alpha is nan, expected a finite number"


def test_the_same_part_twice_is_named():
    tensors = {
        "unet.x.lora_down.weight": (4, 6),
        "unet.x.lora.down.weight": (4, 6),
        "unet.x.lora_up.weight": (12, 4),
    }
    [found] = group_adapters(Memory(tensors)).broken
    assert (found.name, found.key) == ("unet.x", "unet.x.lora.down.weight")


def test_a_pattern_that_could_match_for_ever_means_nothing():
    config = '{"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 8, "x": 2}}'
    tensors = {f"unet.{'a' * 64}.x.lora_{side}.weight": (4, 4) for side in "AB"}
    [found] = group_adapters(Memory(tensors, {"lora_adapter_metadata": config})).adapters
    assert found.alpha == 2


def test_numbered_layers_are_named_where_the_shapes_bear_it_out():
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    tensors, index = {}, 0
    for width in widths:
        for text in (0, 0, 0, 0, 0, 0, 768, 768, 0):
            out = width * 8 if index % 9 == 4 else width
            tensors[f"unet:{index}:down"] = (1, text or width)
            tensors[f"unet:{index}:up"] = (out, 1)
            index += 1
    adapters = group_adapters(Memory(tensors)).adapters
    names = [adapter.module for adapter in adapters]
    assert names[6] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert names[-1] == "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert guess_base(adapters).architecture == "sd15"
    tensors["unet:143:down"] = (1, 320)
    assert group_adapters(Memory(tensors)).adapters[0].naming == "counted"


# --- files as lycoris and peft write them ---------------------------------------------------------

UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def unet_class():
    diffusers = pytest.importorskip("diffusers")
    return lambda: diffusers.UNet2DConditionModel(**UNET)


ALGOS = {  # lycoris' name and arguments -> labels that must occur, and no others
    "lora": ({}, {"LoRA", "LoCon"}),
    "locon-tucker": ({"use_tucker": True}, {"LoRA", "LoCon"}),
    "loha": ({}, {"LoHa"}),
    "loha-tucker": ({"use_tucker": True}, {"LoHa"}),
    "lokr": ({"factor": 4}, {"LoKr"}),
    "lokr-both": ({"factor": 4, "decompose_both": True, "linear_dim": 1}, {"LoKr"}),
    "lokr-full": ({"factor": 4, "full_matrix": True}, {"LoKr"}),
    "dora": ({"dora_wd": True}, {"DoRA"}),
    "diag-oft": ({}, {"OFT"}),
    "diag-oft-rescaled": ({"rescaled": True}, {"OFT"}),
    "boft": ({}, {"BOFT"}),
    "ia3": ({}, {"IA3"}),
    "glora": ({}, {"GLoRA"}),
    "full": ({}, {"full difference"}),
}
NAMED = {"locon-tucker": "lora", "dora": "lora"}


@pytest.mark.oracle
@pytest.mark.parametrize("algo", ALGOS)
def test_files_of_lycoris_tell_the_shape_of_every_module(algo, unet_class):
    lycoris = pytest.importorskip("lycoris")
    arguments, labels = ALGOS[algo]
    model = unet_class()
    lycoris.LycorisNetwork.apply_preset(
        {"target_module": ["Transformer2DModel", "ResnetBlock2D"], "target_name": []}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lycoris.create_lycoris(
            model,
            1.0,
            linear_dim=arguments.get("linear_dim", 4),
            linear_alpha=2.0,
            conv_dim=arguments.get("linear_dim", 4),
            conv_alpha=2.0,
            algo=NAMED.get(
                algo, "-".join(algo.split("-")[:2]) if "oft" in algo else algo.split("-")[0]
            ),
            train_norm=algo == "lora",
            **{key: value for key, value in arguments.items() if key != "linear_dim"},
        )
        net.apply_to()
    tensors = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    tensors = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in tensors.items()}
    file = group_adapters(Memory(tensors))
    assert (file.broken, file.ignored, file.naming.slug) == ((), (), "simpletuner")
    found = {one.label for one in file.adapters} - ({"norm"} if algo == "lora" else set())
    assert found == labels
    weights = {
        "lycoris_" + key.removesuffix(".weight").replace(".", "_"): tuple(value.shape)
        for key, value in unet_class().state_dict().items()
        if key.endswith(".weight")
    }
    for adapter in file.adapters:
        wanted, shape = weights[adapter.name], adapter.shape
        assert shape[0] in (None, wanted[0]), adapter
        if len(shape) == len(wanted):
            assert all(a in (None, b) for a, b in zip(shape, wanted, strict=True)), adapter
        elif len(shape) == 2 and shape[1] is not None:  # a kernel written flat
            assert shape[1] == np.prod(wanted[1:]), adapter
    assert {one.alpha for one in file.adapters if one.kind in ("lora", "loha")} <= {2.0, None}


def peft_configs():
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k"]
    return {
        "lora": (peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets), "LoRA"),
        "rslora": (
            peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=targets),
            "LoRA",
        ),
        "dora": (peft.LoraConfig(r=4, use_dora=True, target_modules=targets), "DoRA"),
        "bias": (peft.LoraConfig(r=4, lora_bias=True, target_modules=targets), "LoRA"),
        "loha": (peft.LoHaConfig(r=4, alpha=8, target_modules=targets), "LoHa"),
        "lokr": (peft.LoKrConfig(r=4, alpha=8, target_modules=targets), "LoKr"),
        "oft": (peft.OFTConfig(oft_block_size=8, target_modules=targets), "OFT"),
        "boft": (peft.BOFTConfig(boft_block_size=4, target_modules=targets), "BOFT"),
        "ia3": (
            peft.IA3Config(target_modules=targets, feedforward_modules=["to_k"]),
            "IA3",
        ),
    }


@pytest.mark.oracle
@pytest.mark.parametrize(
    "kind", ["lora", "rslora", "dora", "bias", "loha", "lokr", "oft", "boft", "ia3"]
)
def test_files_of_peft_tell_the_shape_of_every_module(kind, unet_class, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.numpy import load_file

    config, label = peft_configs()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(unet_class(), config)
        model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = group_adapters(Memory(load_file(path), path=path))
    assert (file.broken, file.ignored, file.naming.slug) == ((), (), "peft")
    assert Counter(one.label for one in file.adapters).keys() == {label}
    weights = {key.removesuffix(".weight"): v.shape for key, v in unet_class().state_dict().items()}
    assert len(file.adapters) == sum(key.endswith(("to_q", "to_k")) for key in weights)
    for adapter in file.adapters:
        wanted = weights[adapter.module]
        assert all(a in (None, b) for a, b in zip(adapter.shape, wanted, strict=True)), adapter
    if kind in ("lora", "rslora", "loha", "lokr"):
        assert {one.alpha for one in file.adapters} == {8.0}
    assert {one.rooted for one in file.adapters} == {kind == "rslora"}
    assert ("bias" in file.adapters[0].traits) == (kind == "bias")
