"""diffusers' ways to take less memory, on real-size random weights: the peers of gpu_memory.py.

Models are diffusers' and transformers' own, built without initial values and filled in a second
from one repeated chunk (random_weights.py), because drawing 30 billion random numbers takes longer
than all the runs. They are built anew for every mode, over the same memory: hooks and moved
parameters of one mode leave no trace in the next.

    in memory    pipe.to(device)
    model        pipe.enable_model_cpu_offload(): one component at a time
    sequential   pipe.enable_sequential_cpu_offload(): one leaf at a time, no prefetch
    group        pipe.enable_group_offload(block_level, one block a group, use_stream): the mode
                 nearest to ours. Its page-locked copies are spared: the weights are locked where
                 they lie, which is what it would make, and is not in its time
    gguf         the transformer from our Q4_K file (Flux.1, where gguf is installed), in memory

Text is encoded by calling the encoders with as many tokens as the pipeline would (their tokenizers
need files of vocabularies); the pipeline gets the states, so its own hooks run. Timed as in
gpu_memory.py: steps by callback, all but the first; decoding from the last step to the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from random_weights import FOLDERS, Model, gaussian, is_norm

MODES = ("in memory", "group", "model", "sequential", "gguf")
STEPS = {"in memory": 6, "group": 5, "model": 4, "sequential": 3, "gguf": 5}
PIXELS = {"sd15": 512, "sdxl": 1024, "flux1": 1024, "qwen_image": 1024}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "flux1": "FluxPipeline",
    "qwen_image": "QwenImagePipeline",
}

# What the published config.json files say beyond the classes' defaults.
_SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
_QWEN = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
}
_SD15_UNET = {"cross_attention_dim": 768, "sample_size": 64}
_SDXL_UNET = {
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
_FLUX_VAE = {
    **_SD_VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}
# Component -> (class, config): real ones; tiny ones are read from the folder in examples/.
COMPONENTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "sd15": {
        "unet": ("UNet2DConditionModel", _SD15_UNET),
        "vae": ("AutoencoderKL", _SD_VAE),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
    },
    "sdxl": {
        "unet": ("UNet2DConditionModel", _SDXL_UNET),
        "vae": ("AutoencoderKL", {**_SD_VAE, "scaling_factor": 0.13025, "sample_size": 1024}),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    },
    "flux1": {
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": ("AutoencoderKL", _FLUX_VAE),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5),
    },
    "qwen_image": {
        "transformer": ("QwenImageTransformer2DModel", {}),
        "vae": ("AutoencoderKLQwenImage", {}),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", _QWEN),
    },
}
_FLOW = {"use_dynamic_shifting": True, "shift": 3.0}
_KARRAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def modes_of(family: str) -> tuple[str, ...]:
    """The modes that a family has here."""
    has_gguf = family == "flux1" and _has("gguf")
    return tuple(mode for mode in MODES if mode != "gguf" or has_gguf)


def reason_against() -> str:
    """Why there are no peers here; "" where there are."""
    missing = [name for name in ("diffusers", "accelerate", "transformers") if not _has(name)]
    return f"{', '.join(missing)} not installed" if missing else ""


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Parameters have a shape and no values; buffers and tables of positions are real."""
    import accelerate
    import torch

    init = torch.nn.init
    names = [name for name in dir(init) if name.endswith("_") and not name.startswith("_")]
    kept = {name: getattr(init, name) for name in names}
    for name in names:
        setattr(init, name, lambda tensor, *_args, **_kwargs: tensor)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)


class Weights:
    """The memory that a component's parameters lie in, one after another."""

    def __init__(self, module: Any, dtype: Any) -> None:
        import torch

        total = sum(param.numel() for param in module.parameters())
        self.flat = torch.empty(total, dtype=dtype)
        tile = torch.from_numpy(np.array(gaussian())).view(torch.bfloat16).to(dtype)
        whole = total // tile.numel() * tile.numel()
        self.flat[:whole].view(-1, tile.numel()).copy_(tile)
        self.flat[whole:] = tile[: total - whole]
        self._locked = False

    def give(self, module: Any) -> None:
        """Let a module's parameters be this memory."""
        import torch

        at = 0
        made: dict[int, Any] = {}
        for name, param in list(module.named_parameters(remove_duplicate=False)):
            if id(param) not in made:
                view = self.flat[at : at + param.numel()].view(param.shape)
                at += param.numel()
                if is_norm(name, tuple(param.shape)):
                    view.fill_(1)
                made[id(param)] = param, torch.nn.Parameter(view, requires_grad=False)
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._parameters[name.rpartition(".")[2]] = made[id(param)][1]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Page-locked meanwhile."""
        import torch

        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(self.flat.data_ptr(), self.flat.nbytes, 0)
        if int(code):
            raise RuntimeError(f"{self.flat.nbytes} bytes cannot be page-locked: error {code}")
        try:
            yield
        finally:
            runtime.cudaHostUnregister(self.flat.data_ptr())


class Peer:
    """diffusers' pipeline of a family."""

    def __init__(self, model: Model, device: Any) -> None:
        import torch

        self.model, self.device, self.dtype = model, device, torch.bfloat16
        self.weights = {
            name: Weights(module, self.dtype) for name, module in self._modules().items()
        }

    def close(self) -> None:
        """Let the weights go."""
        self.weights.clear()
        self.device.clean()

    def _modules(self) -> dict[str, Any]:
        """Fresh modules without values."""
        found = {}
        for name, (kind, config) in COMPONENTS[self.model.family].items():
            stated = self._stated(name) if self.model.tiny else config
            with without_values():
                found[name] = _built(kind, stated)
            if hasattr(found[name], "tie_weights"):
                found[name].tie_weights()  # building without values gave each its own
        return found

    def _stated(self, component: str) -> dict[str, Any]:
        text = (self.model.example / component / "config.json").read_text()
        config: dict[str, Any] = json.loads(text)
        return config

    def pipeline(self) -> Any:
        """A fresh pipeline over the weights."""
        import diffusers

        parts = self._modules()
        for name, module in parts.items():
            self.weights[name].give(module)
            for buffer_name, buffer in module.named_buffers():
                if buffer.is_floating_point() and name in ("unet", "transformer", "vae"):
                    owner = module.get_submodule(buffer_name.rpartition(".")[0])
                    setattr(owner, buffer_name.rpartition(".")[2], buffer.to(self.dtype))
            module.eval()
        rest = {name.replace("text_encoder", "tokenizer"): None for name in parts if "text" in name}
        if self.model.family == "sd15":
            rest |= {"safety_checker": None, "feature_extractor": None}
            rest |= {"requires_safety_checker": False}
        kind = getattr(diffusers, PIPELINES[self.model.family])
        pipe = kind(**parts, **rest, scheduler=self._scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _scheduler(self) -> Any:
        import diffusers

        if self.model.family in ("sd15", "sdxl"):
            return diffusers.EulerDiscreteScheduler(**_KARRAS)
        return diffusers.FlowMatchEulerDiscreteScheduler(**_FLOW)

    def measured(self, mode: str) -> dict[str, Any]:
        """One row; "failed" says what diffusers answered where it refused."""
        import torch

        self.device.clean()
        with contextlib.ExitStack() as stack:
            try:
                pipe = self.pipeline()
                started = time.perf_counter()
                PLACE[mode](self, pipe, stack)
                placed = time.perf_counter() - started
                with torch.inference_mode():
                    if mode in ("in memory", "gguf"):
                        self._drawn(pipe, 1)  # compiles its kernels
                        self.device.reset_peak()
                    found = self._drawn(pipe, STEPS[mode])
            except Exception as error:  # a row too: what diffusers answered
                found, placed = {"failed": f"{type(error).__name__}: {error}"}, 0.0
                found["traceback"] = traceback.format_exc()
            found |= self.device.peak()
        pipe = None
        self.device.clean()
        return {**found, "placed_s": placed, "pixels": self._side}

    @property
    def _side(self) -> int:
        return 64 if self.model.tiny else PIXELS[self.model.family]

    def _drawn(self, pipe: Any, steps: int) -> dict[str, Any]:
        ticks: list[float] = []

        def tick(_pipe: Any, _index: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            self.device.sync()
            ticks.append(time.perf_counter())
            return kept

        start = time.perf_counter()
        states = TEXTS[self.model.family](self, pipe)
        self.device.sync()
        encoded = time.perf_counter()
        images = pipe(
            **states,
            height=self._side,
            width=self._side,
            num_inference_steps=steps,
            callback_on_step_end=tick,
            output_type="pt",
        ).images
        self.device.sync()
        end = time.perf_counter()
        spent = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
        return {
            "encode_s": encoded - start,
            "first_step_s": ticks[0] - encoded,
            "step_s": statistics.median(spent) if spent else ticks[0] - encoded,
            "steps_s": spent,
            "decode_s": end - ticks[-1],
            "finite": bool(images.isfinite().all()),
        }

    def ids(self, count: int) -> Any:
        """Token ids; which ones does not matter to time and memory."""
        import torch

        return torch.ones(1, count, dtype=torch.int64, device=self.device.name)


def _built(kind: str, stated: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    if hasattr(diffusers, kind):
        cls = getattr(diffusers, kind)
        return cls.from_config(stated) if "_class_name" in stated else cls(**stated)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**stated))


# --- text: what each pipeline is given -----------------------------------------------------------


def _sd15(peer: Peer, pipe: Any) -> dict[str, Any]:
    states = [pipe.text_encoder(peer.ids(77))[0] for _ in range(2)]
    return {"prompt_embeds": states[0], "negative_prompt_embeds": states[1]}


def _sdxl(peer: Peer, pipe: Any) -> dict[str, Any]:
    import torch

    found = [
        encoder(peer.ids(77), output_hidden_states=True)
        for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    states = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
    pooled = found[1][0]
    return {
        "prompt_embeds": states,
        "negative_prompt_embeds": torch.zeros_like(states),
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
    }


def _flux1(peer: Peer, pipe: Any) -> dict[str, Any]:
    pooled = pipe.text_encoder(peer.ids(77)).pooler_output
    states = pipe.text_encoder_2(peer.ids(512))[0]
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


def _qwen_image(peer: Peer, pipe: Any) -> dict[str, Any]:
    ids = peer.ids(34 + 512)
    found: dict[str, Any] = {"true_cfg_scale": 4.0}
    for prefix in ("", "negative_"):
        out = pipe.text_encoder(
            input_ids=ids, attention_mask=ids.clone(), output_hidden_states=True
        )
        found[f"{prefix}prompt_embeds"] = out.hidden_states[-1][:, 34:]
        found[f"{prefix}prompt_embeds_mask"] = ids[:, 34:].clone()
    return found


TEXTS = {"sd15": _sd15, "sdxl": _sdxl, "flux1": _flux1, "qwen_image": _qwen_image}


# --- modes ---------------------------------------------------------------------------------------


def _in_memory(peer: Peer, pipe: Any, _stack: contextlib.ExitStack) -> None:
    pipe.to(peer.device.name)


def _model(peer: Peer, pipe: Any, _stack: contextlib.ExitStack) -> None:
    if peer.device.cuda:  # accelerate refuses to offload to the CPU from itself
        pipe.enable_model_cpu_offload()


def _sequential(peer: Peer, pipe: Any, _stack: contextlib.ExitStack) -> None:
    if peer.device.cuda:
        pipe.enable_sequential_cpu_offload()


def _group(peer: Peer, pipe: Any, stack: contextlib.ExitStack) -> None:
    if peer.device.cuda:
        for weights in peer.weights.values():
            stack.enter_context(weights.locked())
    pipe.enable_group_offload(
        onload_device=peer.device.torch.device(peer.device.name),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=peer.device.cuda,
    )


def _gguf(peer: Peer, pipe: Any, _stack: contextlib.ExitStack) -> None:
    import diffusers

    path = peer.model.write_denoiser("q4_k_s")
    folder = peer.model.folder / "gguf_config" / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    pipe.transformer.save_config(folder)
    pipe.transformer = diffusers.FluxTransformer2DModel.from_single_file(
        str(path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=peer.dtype),
        torch_dtype=peer.dtype,
        config=str(folder.parent),
        subfolder="transformer",
    )
    path.unlink()
    pipe.to(peer.device.name)


PLACE: dict[str, Callable[[Peer, Any, contextlib.ExitStack], None]] = {
    "in memory": _in_memory,
    "group": _group,
    "model": _model,
    "sequential": _sequential,
    "gguf": _gguf,
}
assert set(FOLDERS) == set(TEXTS)
