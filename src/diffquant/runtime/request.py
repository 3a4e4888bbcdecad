"""What decides a picture besides the model: one frozen row, so that a picture can be made again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.noise import STREAMS
from diffquant.runtime.prompts import STYLES

__all__ = ["PictureRequest"]

_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """Everything that decides a picture besides the model and its LoRAs.

    Attributes:
        prompt: one, or several that run as one batch.
        negative: what to stay away from, needs cfg > 1; None: the family's own idea of nothing.
        seed: of the first picture, the next ones take seed + 1, seed + 2 ... (the habit of A1111
            and ComfyUI; diffusers draws a whole batch from one generator); or one per picture.
        batch: pictures per prompt.
        steps: of the whole run; a run from a picture walks the last steps * strength of them.
        cfg: strength of classifier-free guidance, 1 is off; None: the family's.
        cfg_cutoff: share of the model calls that are guided, the first ones.
        cfg_rescale: how far guidance is brought back to the contrast of the prediction, 0 to 1.
        guidance: distilled guidance, for models that take one; None: the family's.
        width: pixels.
        height: pixels.
        sampler: name in anyone's spelling; None: what the checkpoint's scheduler asks for.
        schedule: name in anyone's spelling; None: the checkpoint's.
        shift: of flows, instead of the checkpoint's.
        eta: share of fresh noise, for samplers that take one.
        text_tokens: length for encoders that have no fixed one; None: the family's.
        clip_skip: as A1111 counts: 1 reads the last layer, 2 the one before; None: the family's.
        prompt_style: how `(words:1.2)` acts, a key of prompts.STYLES.
        rng: where noise comes from, a key of noise.STREAMS.
        image: (1 or B, height, width, 3) in [0, 1] to start from.
        strength: how much of `image` is drawn anew, above 0 to 1.
        mask: (1 or B, height, width) in [0, 1], 1 where `image` is painted anew.
        paste: whether the pixels that `mask` protects are put back at the end; without, they went
            through the autoencoder and differ a little.
        begin: share of the trained noise range that another model has walked already; needs its
            latents.
        end: share after which the run stops, for another model to go on.
    """

    prompt: str | tuple[str, ...]
    negative: str | None = None
    seed: int | tuple[int, ...] = 0
    batch: int = 1
    steps: int = 20
    cfg: float | None = None
    cfg_cutoff: float = 1.0
    cfg_rescale: float = 0.0
    guidance: float | None = None
    width: int = 512
    height: int = 512
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None
    eta: float | None = None
    text_tokens: int | None = None
    clip_skip: int | None = None
    prompt_style: str = "comfy"
    rng: str = "cpu"
    image: Tensor | None = None
    strength: float = 0.75
    mask: Tensor | None = None
    paste: bool = True
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            UnknownFormat: no such prompt style or noise.
            UsageError: a number out of range, or tensors that do not fit.
        """
        if self.prompt_style not in STYLES:
            raise UnknownFormat(self.prompt_style, STYLES, what="prompt style")
        if self.rng not in STREAMS:
            raise UnknownFormat(self.rng, STREAMS, what="source of noise")
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if not self.prompts:
            raise UsageError("no prompt: give at least one")
        for seed in self.seeds:
            if not 0 <= seed <= _LARGEST_SEED:
                raise UsageError(f"a seed is between 0 and {_LARGEST_SEED}, found {seed}")
        if not (math.isfinite(self.strength) and 0 < self.strength <= 1):
            raise UsageError(f"strength must be above 0 and at most 1, found {self.strength:g}")
        self._check_tensors()

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per picture: each repeated `batch` times."""
        given = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        return tuple(prompt for prompt in given for _ in range(self.batch))

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per picture.

        Raises:
            UsageError: another number of seeds than of pictures.
        """
        count = len(self.prompts)
        if isinstance(self.seed, int):
            return tuple(range(self.seed, self.seed + count))
        if len(self.seed) != count:
            raise UsageError(
                f"{len(self.seed)} seeds for {count} pictures: give one, or one per picture"
            )
        return self.seed

    def _check_tensors(self) -> None:
        if self.mask is not None and self.image is None:
            raise UsageError("a mask says where a picture is painted anew: give the picture too")
        if self.image is not None and self.begin > 0:
            raise UsageError("a run begins at a picture or where another model stopped, not both")
        for name, tensor, tail in (
            ("picture", self.image, (self.height, self.width, 3)),
            ("mask", self.mask, (self.height, self.width)),
        ):
            if tensor is None:
                continue
            shape = tuple(tensor.shape)
            if shape[1:] != tail or shape[0] not in (1, len(self.prompts)):
                raise UsageError(
                    f"the {name} must have the shape of what is made, "
                    f"{(len(self.prompts), *tail)} or {(1, *tail)}, found {shape}: resize it first"
                )
            low, high = (float(value) for value in torch.aminmax(tensor.float()))
            if not 0 <= low <= high <= 1:  # NaN compares false too
                raise UsageError(f"the {name} must be between 0 and 1, found {low:g} to {high:g}")
