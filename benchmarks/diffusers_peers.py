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
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

from diffusers_models import COMPONENTS, Weights, built, without_values
from random_weights import Model

MODES = ("in memory", "group", "model", "sequential", "gguf")
STEPS = {"in memory": 6, "group": 5, "model": 4, "sequential": 3, "gguf": 5}
PIXELS = {"sd15": 512, "sdxl": 1024, "flux1": 1024, "qwen_image": 1024}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "flux1": "FluxPipeline",
    "qwen_image": "QwenImagePipeline",
}


_FLOW = {"use_dynamic_shifting": True, "shift": 3.0}
_KARRAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def modes_of(family: str) -> tuple[str, ...]:
    """The modes that a family has here.

    Offloading by component copies what comes back from the device: twice the 55 GiB of Qwen-Image
    and its encoder, beside files that lie in memory, is more than the machine's 128.
    """
    without = set() if family == "flux1" and _has("gguf") else {"gguf"}
    if family == "qwen_image":
        without.add("model")
    return tuple(mode for mode in MODES if mode not in without)


def reason_against() -> str:
    """Why there are no peers here; "" where there are."""
    missing = [name for name in ("diffusers", "accelerate", "transformers") if not _has(name)]
    return f"{', '.join(missing)} not installed" if missing else ""


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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
                found[name] = built(kind, stated)
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
        spent = [b - a for a, b in itertools.pairwise(ticks)]
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
