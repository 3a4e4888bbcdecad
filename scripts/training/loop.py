"""One training loop for everything: stop by wall time, cosine over that time, EMA of the weights.

Time decides instead of a step count because the same command has to fit a rented machine's
minutes, whatever else runs beside it. The price: two runs differ in steps, so weights are not
bit-reproducible; the model card states the steps that were reached.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["STAGES", "Fit", "Stage", "autocast", "device_name", "fit", "say", "write_stages"]

_T0 = time.monotonic()


@dataclass(frozen=True)
class Fit:
    """What a training run reached."""

    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Stage:
    """One stage of a model's training, as its folder remembers it."""

    what: str
    steps: int
    seconds: float
    batch: int
    device: str


def device_name() -> str:
    """What the training ran on, for the card."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


STAGES = "training.json"


def write_stages(folder: Path, stages: list[Stage]) -> None:
    """Write the stages beside the weights; a later run with --resume reads them back."""
    rows = [asdict(stage) for stage in stages]
    (folder / STAGES).write_text(json.dumps(rows, indent=1) + "\n")


def say(text: str) -> None:
    """Print one progress line, with seconds since the start, at once."""
    print(f"[{time.monotonic() - _T0:6.1f}s] {text}", flush=True)


def autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 on a GPU, float32 on a CPU (where the smoke test runs)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def fit(
    label: str,
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    *,
    seconds: float,
    lr: float,
    max_steps: int | None = None,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
) -> Fit:
    """Minimise `loss()` with AdamW; on return the parameters hold their moving average.

    Args:
        loss: draws its own batch; called once a step.
        seconds: wall time; the learning rate falls to zero over it.
        max_steps: stop earlier (smoke test); the learning rate then follows steps.
    """
    weights = [p for p in parameters if p.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(
        weights, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=device.type == "cuda"
    )
    average = [p.detach().clone() for p in weights]
    start = said = time.monotonic()
    step, since, total = 0, 0, torch.zeros((), device=device)
    last = math.nan
    while True:
        now = time.monotonic()
        done = (now - start) / seconds if max_steps is None else step / max_steps
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        with autocast(device):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - decay)
        total += value.detach()
        since += 1
        # Reading the loss waits for the device, which also keeps the queue of launched work,
        # and so the error of the clock, short.
        if step % 20 == 0 or time.monotonic() - said > 10:
            last = float(total) / since
            if time.monotonic() - said > 10:
                rate = step / (time.monotonic() - start)
                say(f"{label}: step {step}, {done:4.0%}, loss {last:.5f}, {rate:.1f} steps/s")
                said = time.monotonic()
                since, total = 0, torch.zeros_like(total)
    if since:
        last = float(total) / since
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    elapsed = time.monotonic() - start
    say(f"{label}: done, {step} steps in {elapsed:.0f} s, loss {last:.5f}")
    return Fit(step, elapsed, last)
