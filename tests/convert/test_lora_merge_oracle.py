"""Merged checkpoints against lycoris and peft: outputs of the model with the adapter on."""

import json
import warnings
from pathlib import Path

import pytest

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import LoraInput, merging
from diffquant.convert.request import Request

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")

TOLERANCE = 1e-4
UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def unet_class():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel


@pytest.fixture(scope="module")
def base(unet_class, tmp_path_factory):
    """A folder with a random UNet in it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet_class(**UNET).save_pretrained(folder / "unet")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", unet_class.__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def inputs():
    seed = torch.Generator().manual_seed(5)
    x = torch.randn((2, 4, 8, 8), generator=seed)
    return x, torch.tensor([801.0, 23.0]), torch.randn((2, 7, 48), generator=seed)


def merge(base: Path, out: Path, *loras: LoraInput, **fields):
    request = Request(container=container_for(out), **fields)
    with merging(base, loras) as found:
        return found.told(run_job(base, out, found.into(request), force=True))


@torch.no_grad()
def assert_equal_outputs(unet_class, base, out, wanted, *, differs=1e-2):
    """The merged model's outputs are `wanted`, relative to what the adapter changes."""
    plain = unet_class.from_pretrained(base / "unet")(*inputs()).sample
    found = unet_class.from_pretrained(out / "unet")(*inputs()).sample
    effect = (wanted - plain).norm() / plain.norm()
    assert effect > differs, effect
    error = (found - wanted).norm() / wanted.norm()
    assert error < TOLERANCE, (float(error), float(effect))


ALGOS = {  # name -> lycoris' arguments
    "lora": {"algo": "lora", "train_norm": True},
    "tucker": {"algo": "lora", "use_tucker": True},
    "rs": {"algo": "lora", "rs_lora": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
    "lokr-tucker": {"algo": "lokr", "factor": 4, "use_tucker": True, "linear_dim": 1},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora-columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "dora-loha": {"algo": "loha", "dora_wd": True},
    "dora-lokr": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "oft": {"algo": "diag-oft"},
    "oft-rescaled": {"algo": "diag-oft", "rescaled": True, "constraint": 1e-3},
    "boft": {"algo": "boft"},
    "boft-rescaled": {"algo": "boft", "rescaled": True},
    "ia3": {"algo": "ia3"},
    "glora": {"algo": "glora"},
    "full": {"algo": "full"},
}


def lycoris_net(model, arguments, multiplier):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset(
        {"target_module": ["Transformer2DModel", "ResnetBlock2D"], "target_name": []}
    )
    rank = arguments.get("linear_dim", 4)
    rest = {key: value for key, value in arguments.items() if key != "linear_dim"}
    settings = {"linear_dim": rank, "conv_dim": rank, "linear_alpha": 3.0, "conv_alpha": 3.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lycoris.create_lycoris(model, multiplier, **settings, **rest)
        net.apply_to()
    seed = torch.Generator().manual_seed(11)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=seed)
        parameter.data += 0.08 * noise * (1 if "lokr" not in rest["algo"] else 2)
    return net


@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("algo", ALGOS)
@torch.no_grad()
def test_merged_weights_are_what_lycoris_runs(algo, multiplier, unet_class, base, tmp_path):
    if multiplier != 1.0 and "dora" in algo:
        pytest.skip("lycoris blends DoRA's magnitude alone: see convert/lora/deltas")
    if multiplier != 1.0 and algo == "oft-rescaled":
        pytest.skip("lycoris rescales in full at any strength")
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = unet_class.from_pretrained(base / "unet")
    net = lycoris_net(model, ALGOS[algo], multiplier)
    tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = model(*inputs()).sample
    lora = LoraInput(tmp_path / "x.safetensors", multiplier, multiplier)
    report = merge(base, tmp_path / "out", lora)
    [row] = report.merged.loras
    assert (row.skipped, row.ignored, row.absent) == ((), (), {})
    assert row.merged == len(net.loras)
    assert_equal_outputs(unet_class, base, tmp_path / "out", wanted)


def peft_configs(peft):
    targets = ["to_q", "to_out.0", "ff.net.0.proj"]
    convs = [*targets, "conv1"]
    return {
        "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=convs),
        "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=convs),
        "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=convs),
        "bias": peft.LoraConfig(
            r=4, lora_alpha=6, lora_bias=True, target_modules=["to_out.0", "conv1"]
        ),
        "loha": peft.LoHaConfig(
            r=4, alpha=6, target_modules=convs, use_effective_conv2d=True, init_weights=False
        ),
        "lokr": peft.LoKrConfig(
            r=2, alpha=6, target_modules=convs, use_effective_conv2d=True, init_weights=False
        ),
        "oft": peft.OFTConfig(oft_block_size=8, target_modules=convs),
        "oft-exact": peft.OFTConfig(
            oft_block_size=8, use_cayley_neumann=False, target_modules=targets
        ),
        "oft-shared": peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=targets),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=convs),
        "ia3": peft.IA3Config(target_modules=targets, feedforward_modules=["ff.net.0.proj"]),
    }


PEFT = [
    "lora", "rslora", "dora", "bias", "loha", "lokr", "oft", "oft-exact", "oft-shared", "boft",
    "ia3",
]  # fmt: skip


@pytest.mark.parametrize("kind", PEFT)
@torch.no_grad()
def test_merged_weights_are_what_peft_runs(kind, unet_class, base, tmp_path):
    peft = pytest.importorskip("peft")
    seed = torch.Generator().manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            unet_class.from_pretrained(base / "unet"), peft_configs(peft)[kind]
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shift = 0.1 * torch.randn(parameter.shape, generator=seed)
                parameter.data += shift if "magnitude" not in name else shift * parameter.data
        model.save_pretrained(tmp_path / "lora")
        model.eval()
        if kind == "oft":  # its forward unfolds kernels without padding, its merge does not
            model = model.merge_and_unload()
        wanted = model(*inputs()).sample
    report = merge(base, tmp_path / "out", LoraInput(tmp_path / "lora/adapter_model.safetensors"))
    assert report.merged.loras[0].skipped == ()
    assert_equal_outputs(unet_class, base, tmp_path / "out", wanted)
