"""Small valid files of every container and dialect, for mutations.py to damage.

`python samples.py FOLDER` writes them; each sample is a folder of its own, and the file or folder
to inspect in it is called `main` with the ending it needs.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink
from diffquant.io.imatrix import write_imatrix
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.quant.types import type_named

EXAMPLES = Path(__file__).parents[2] / "examples"
_RNG = np.random.default_rng(5)
_NAMES = {"<f4": "F32", "<f2": "F16", "|u1": "U8", "|i1": "I8", "<i8": "I64", "<u2": "BF16"}
Arrays = Mapping[str, np.ndarray]


def _write(path: Path, arrays: Arrays, metadata: Mapping[str, Any] | None = None, **more: Any):
    specs = [TensorSpec(k, _NAMES[a.dtype.str], a.shape) for k, a in arrays.items()]
    with open_sink(path, specs, metadata or {}, **more) as sink:
        for key, array in arrays.items():
            sink.write(key, 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        sink.commit()
    return path


def _normal(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32).astype(np.float16)


def transformer() -> dict[str, np.ndarray]:
    """An unknown transformer of three blocks."""
    arrays = {"embed.weight": _normal(64, 16)}
    for block in range(3):
        name = f"blocks.{block}."
        arrays |= {
            name + "attn.qkv.weight": _normal(192, 64),
            name + "attn.qkv.bias": _normal(192),
            name + "attn.proj.weight": _normal(64, 64),
            name + "mlp.0.weight": _normal(128, 64),
            name + "mlp.2.weight": _normal(64, 128),
            name + "norm.weight": _normal(64),
        }
    return {**arrays, "head.weight": _normal(16, 64)}


def _plain(folder: Path) -> None:
    notes = {
        "modelspec.architecture": "flux-1-dev",
        "modelspec.hash_sha256": "0x" + "ab" * 32,
        "diffquant.config": json.dumps({"configs": {"unet/config.json": {"in_channels": 4}}}),
    }
    _write(folder / "main.safetensors", transformer(), notes)


def _packed(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        plain = _write(folder / "plain.safetensors", transformer())
        made = type_named(kind)
        container = next(iter(made.dialects))
        out = folder / f"main.{container}"
        run_job(plain, out, Request(container, type=made, arch="generic"), verify="none")
        plain.unlink()

    return make


def _known(model: str, part: str) -> Callable[[Path], None]:
    """A part of a demo model that is known by its names: its header, and zeros for its data."""

    def make(folder: Path) -> None:
        source = EXAMPLES / model / part / "diffusion_pytorch_model.safetensors"
        raw = source.read_bytes()
        out = folder / "main.safetensors"
        out.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
        os.truncate(out, len(raw))

    return make


def _pipeline_of(model: str) -> Callable[[Path], None]:
    """A whole demo model: configs and headers, and zeros for the data."""

    def make(folder: Path) -> None:
        for path in (EXAMPLES / model).rglob("*"):
            small = path.stat().st_size < 20_000 and path.suffix == ".json"
            if not path.is_file() or not (small or path.suffix == ".safetensors"):
                continue
            out = folder / "main" / path.relative_to(EXAMPLES / model)
            out.parent.mkdir(parents=True, exist_ok=True)
            raw = path.read_bytes()
            head = len(raw) if small else 8 + int.from_bytes(raw[:8], "little")
            out.write_bytes(raw[:head])
            os.truncate(out, len(raw))

    return make


def _lora(folder: Path) -> None:
    arrays = {}
    for block in range(2):
        name = f"lora_unet_down_blocks_{block}_attentions_0_proj_in"
        arrays |= {
            f"{name}.lora_down.weight": _normal(4, 32),
            f"{name}.lora_up.weight": _normal(32, 4),
            f"{name}.alpha": _normal(),
        }
    notes = {
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_tag_frequency": json.dumps({"10_cat": {"a cat": 3, "sitting": 1}}),
        "ss_network_args": json.dumps({"algo": "lora"}),
        "sshs_model_hash": "0" * 64,
    }
    _write(folder / "main.safetensors", arrays, notes)


def _peft_lora(folder: Path) -> None:
    arrays = {}
    for block in range(2):
        name = f"transformer.single_transformer_blocks.{block}.attn.to_q"
        arrays |= {
            f"{name}.lora_A.default.weight": _normal(4, 32),
            f"{name}.lora_B.default.weight": _normal(32, 4),
        }
    notes = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.alpha": 8})}
    _write(folder / "main.safetensors", arrays, notes)


def _embedding(folder: Path) -> None:
    _write(folder / "main.safetensors", {"emb_params": _normal(2, 768)})


def _gguf(folder: Path) -> None:
    metadata = {
        "general.architecture": "flux",
        "general.quantization_version": 2,
        "general.file_type": 14,
        "tokens": ("a", "bc", "größe"),
        "comfy.gguf.orig_shape.embed.weight": (64, 16),
        "flag": True,
        "scale": 0.5,
    }
    _write(folder / "main.gguf", transformer(), metadata)


def _imatrix(ending: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        entries = {
            f"blocks.{i}.mlp.0.weight": Entry(np.abs(_RNG.standard_normal((1, 64))), np.array([7]))
            for i in range(4)
        }
        write_imatrix(folder / f"main{ending}", ImportanceMatrix(entries, ("prompts",), 3, 64))

    return make


def _torch_zip(folder: Path) -> None:
    import torch

    state = {key: torch.from_numpy(array) for key, array in transformer().items()}
    state["half"] = state["embed.weight"].T
    torch.save({"state_dict": state, "epoch": 3, "name": "größe"}, folder / "main.ckpt")


def _torch_legacy(folder: Path) -> None:
    import torch

    state = {key: torch.from_numpy(array) for key, array in list(transformer().items())[:5]}
    path = folder / "main.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _bare_pickle(folder: Path) -> None:
    things = {"a": [1, 2.5, "x"], "b": {"c": (1, 2), "d": None}, "e": b"raw", "f": {1, 2}}
    (folder / "main.pt").write_bytes(pickle.dumps(things, protocol=2))


def _sharded(folder: Path) -> None:
    arrays = list(transformer().items())
    weight_map = {}
    for index, part in enumerate((arrays[:10], arrays[10:])):
        name = f"main-{index + 1:05}-of-00002.safetensors"
        _write(folder / name, dict(part))
        weight_map |= dict.fromkeys(dict(part), name)
    index_file = folder / "main.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def _pipeline(folder: Path) -> None:
    unet = {f"transformer/{key}": array for key, array in transformer().items()}
    vae = {"vae/decoder.conv_in.weight": _normal(8, 4, 3, 3)}
    configs = {
        "model_index.json": {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        },
        "transformer/config.json": {
            "in_channels": 16,
            "num_attention_heads": 4,
            "axes_dims_rope": [4, 4, 8],
            "guidance_embeds": True,
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
            },
        },
        "vae/config.json": {"latent_channels": 4, "scaling_factor": 0.18},
        "scheduler/scheduler_config.json": {"num_train_timesteps": 1000, "shift": 3.0},
    }
    _write(folder / "main", {**unet, **vae}, configs=configs)


def _sdnq(folder: Path) -> None:
    target = folder / "main"
    target.mkdir()
    data = Path(__file__).parents[1] / "data" / "sdnq.safetensors"
    shutil.copy(data, target / "diffusion_pytorch_model.safetensors")
    config = {
        "quantization_config": {
            "quant_method": "sdnq",
            "weights_dtype": "int8",
            "group_size": 0,
            "modules_to_not_convert": ["head"],
            "modules_dtype_dict": {"uint4": ["blocks.0"]},
        }
    }
    (target / "config.json").write_text(json.dumps(config))


def _fp8_bare(folder: Path) -> None:
    specs = [
        TensorSpec("blocks.0.w.weight", "F8_E4M3", (16, 16)),
        TensorSpec("blocks.0.w.scale_weight", "F32", ()),
        TensorSpec("blocks.0.w.comfy_quant", "U8", (40,)),
        TensorSpec("blocks.1.w.weight", "F8_E4M3", (16, 16)),
        TensorSpec("scaled_fp8", "F8_E4M3", (2,)),
    ]
    text = json.dumps({"format": "float8_e4m3fn"}).ljust(40).encode()
    with open_sink(folder / "main.safetensors", specs, {}) as sink:
        for spec in specs:
            raw = np.frombuffer(text, np.uint8) if spec.dtype == "U8" else None
            data = _RNG.integers(0, 120, spec.nbytes, dtype=np.uint8)
            sink.write(spec.key, 0, data if raw is None else raw)
        sink.commit()


SAMPLES: dict[str, Callable[[Path], None]] = {
    "plain": _plain,
    "unet": _known("sd15-shapes", "unet"),
    "flux": _known("flux1-shapes", "transformer"),
    "sd15": _pipeline_of("sd15-shapes"),
    "qwen_image": _pipeline_of("qwen-image-shapes"),
    "vae": _known("sdxl-shapes", "vae"),
    "fp8_scaled": _packed("fp8_scaled"),
    "mxfp8": _packed("mxfp8"),
    "nvfp4": _packed("nvfp4"),
    "int8_rowwise": _packed("int8_rowwise"),
    "nf4_dq": _packed("nf4_dq"),
    "fp4": _packed("fp4"),
    "q4_0": _packed("q4_0"),
    "q5_1": _packed("q5_1"),
    "fp8_bare": _fp8_bare,
    "lora": _lora,
    "peft_lora": _peft_lora,
    "embedding": _embedding,
    "gguf": _gguf,
    "imatrix_gguf": _imatrix(".gguf"),
    "imatrix_dat": _imatrix(".dat"),
    "torch_zip": _torch_zip,
    "torch_legacy": _torch_legacy,
    "bare_pickle": _bare_pickle,
    "sharded": _sharded,
    "pipeline": _pipeline,
    "sdnq": _sdnq,
}


def main() -> None:
    """Write every sample."""
    root = Path(sys.argv[1])
    for name, make in SAMPLES.items():
        folder = root / name
        folder.mkdir(parents=True)
        make(folder)
        assert any(folder.glob("main*")), name


if __name__ == "__main__":
    main()
