"""The training data: every picture of the grammar, drawn once, then encoded once.

The grammar has 2800 sentences with one picture each. The demo prompts and some more are held out
of all training, so that the scores on the model card are for sentences never seen.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

__all__ = ["Bank", "held_out", "pictures", "scorers", "training_prompts", "words"]

HELD_OUT = 56  # besides DEMO_PROMPTS
HELD_OUT_SEED = 2026


def _load_scorers() -> ModuleType:
    """Load the grammar by path: the package need not be installed where this trains."""
    root = Path(__file__).resolve().parents[2]
    path = root / "src" / "diffquant" / "runtime" / "scorers.py"
    spec = importlib.util.spec_from_file_location("demo_scorers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


scorers = _load_scorers()


@dataclass(frozen=True)
class Bank:
    """Posterior of every training picture: (N, C, 16, 16) mean and deviation, on the device."""

    mean: torch.Tensor
    std: torch.Tensor

    def draw(self, index: torch.Tensor) -> torch.Tensor:
        """Sample latents of the pictures at `index`."""
        mean = self.mean[index]
        return mean + self.std[index] * torch.randn_like(mean)


def held_out() -> list[str]:
    """Prompts that no part is trained on; the demo prompts come first."""
    extra = scorers.random_prompts(HELD_OUT, seed=HELD_OUT_SEED)
    return list(dict.fromkeys([*scorers.DEMO_PROMPTS, *extra]))


def training_prompts() -> list[str]:
    """All other prompts of the grammar, in a fixed order."""
    hidden = set(held_out())
    return [scene.prompt for scene in scorers.all_scenes() if scene.prompt not in hidden]


def words() -> list[str]:
    """Every word of the grammar."""
    return sorted({word for scene in scorers.all_scenes() for word in scene.prompt.split()})


def pictures(prompts: list[str], device: torch.device) -> torch.Tensor:
    """Right pictures of the prompts: (N, 3, 128, 128) uint8 (float would be four times larger)."""
    drawn = [np.rint(scorers.render(p) * 255).astype(np.uint8) for p in prompts]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous().to(device)
