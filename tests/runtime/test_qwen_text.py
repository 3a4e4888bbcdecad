"""The Qwen text encoders against transformers' Qwen2.5-VL and Qwen3."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import build
from diffquant.runtime.models.qwen_text import visible_keys

SIZES = {
    "small": {},
    "grouped, deep, wide feed-forward": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 80,
    },
    "another base and epsilon": {"rms_norm_eps": 1e-3, "rope_theta": 100.0},
}
PADDING = {
    "none": None,
    "right": [[1] * 7, [1] * 4 + [0] * 3],
    "left": [[1] * 7, [0] * 3 + [1] * 4],
}


def tiny(oracle, kind, **changes):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta", 1e6)}
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    if kind == "qwen2_vl_text":
        rope["mrope_section"] = [1, 1, head_dim // 2 - 2]
        text = {**sizes, "rope_parameters": rope}
        vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8}
        vision["out_hidden_size"] = sizes["hidden_size"]
        config = oracle.transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        model = oracle.transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:  # heads wider than the model divided by their number, as published
        config = oracle.transformers.Qwen3Config(
            **sizes, rope_parameters=rope, head_dim=2 * head_dim
        )
        model = oracle.transformers.Qwen3ForCausalLM(config)
    return oracle.randomize(model, seed=5)


def weights_of(reference):
    """Published names: `model.` for the language model, `visual.` for the image tower."""
    state = reference.state_dict().items()
    names = ((k.replace("model.language_model.", "model."), v) for k, v in state)
    return {k.replace("model.visual.", "visual."): PackedWeight.of(v) for k, v in names}


def hyper_of(reference):
    config = reference.config.to_dict()
    return {**config, **config.get("text_config", {})}


def ours_of(reference):
    return build("qwen_text", weights_of(reference), hyper_of(reference))


@pytest.mark.oracle
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["qwen2_vl_text", "qwen3_text"])
def test_every_hidden_state_equals_transformers(kind, size, padding, oracle):
    reference = tiny(oracle, kind, **SIZES[size])
    ours = ours_of(reference)
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = None if PADDING[padding] is None else torch.tensor(PADDING[padding])
    with torch.no_grad():
        wanted = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        found = ours(ids, None if mask is None else mask.bool(), range(ours.config.depth + 1))
    counts = torch.ones(2, 7, dtype=torch.bool) if mask is None else mask.bool()
    for theirs, state in zip(wanted.hidden_states, found, strict=True):
        assert bool(torch.isfinite(state).all())
        oracle.assert_close(state[counts], theirs[counts])


@pytest.mark.oracle
def test_layers_count_from_either_end_and_only_those_needed_run(oracle):
    ours = ours_of(tiny(oracle, "qwen3_text", num_hidden_layers=4))
    ids = torch.arange(10).reshape(2, 5)
    run = []
    for index, block in enumerate(ours.model.layers):
        block.register_forward_hook(lambda *_, index=index: run.append(index))
    with torch.no_grad():
        (third,) = ours(ids, layers=(-2,))
        assert run == [0, 1, 2]
        states = ours(ids, layers=(3, 1, 4))
    assert [state.shape for state in states] == [(2, 5, 32)] * 3
    assert torch.equal(states[0], third)
    for unknown in (5, -6):
        with pytest.raises(UsageError, match=rf"has states 0 to 4, asked for \[{unknown}\]"):
            ours(ids, layers=(unknown,))


@pytest.mark.oracle
def test_padding_and_later_tokens_change_nothing_before_them(oracle):
    ours = ours_of(tiny(oracle, "qwen2_vl_text"))
    ids = torch.arange(8)[None]
    mask = torch.tensor([[True] * 6 + [False] * 2])
    with torch.no_grad():
        (long,), (cut,), (masked,) = ours(ids), ours(ids[:, :6]), ours(ids, mask)
    oracle.assert_close(long[:, :6], cut)
    oracle.assert_close(masked[:, :6], cut)


@pytest.mark.oracle
def test_image_tower_and_output_head_are_not_read(oracle):
    reference = tiny(oracle, "qwen2_vl_text")
    weights = weights_of(reference)
    assert {"lm_head.weight", "visual.patch_embed.proj.weight"} < weights.keys()
    kept = {key: one for key, one in weights.items() if key.startswith("model.")}
    found = build("qwen_text", kept, hyper_of(reference))
    assert {name.split(".")[0] for name, _ in found.named_parameters()} == {"model"}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_attention_heads", 5, "q has 32 rows and k has 16: expected whole heads of 6"),
        ("rope_parameters", {"rope_type": "yarn"}, "config field rope_type is 'yarn'"),
        ("rope_scaling", {"type": "linear"}, "config field rope_type is 'linear'"),
        ("use_sliding_window", True, "config field use_sliding_window is True"),
        ("hidden_act", "relu", "config field hidden_act is 'relu'"),
    ],
)
def test_what_is_not_implemented_is_refused(field, value, message, oracle):
    reference = tiny(oracle, "qwen2_vl_text")
    hyper = {key: one for key, one in hyper_of(reference).items() if key != "rope_parameters"}
    with pytest.raises(ArchitectureError, match=message):
        build("qwen_text", weights_of(reference), {**hyper, field: value})


def test_a_token_sees_what_counts_before_it_and_itself_where_nothing_does():
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert visible_keys(mask, 3, mask.device)[:, 0].int().tolist() == [
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 0]],
    ]
    assert visible_keys(None, 2, mask.device).int().tolist() == [[[[1, 0], [1, 1]]]]
