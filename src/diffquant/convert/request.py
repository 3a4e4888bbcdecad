"""Request: what the user asked for, as make_plan() takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffquant.convert.adapters import Adapter
from diffquant.convert.composed import AddedPart
from diffquant.convert.recipes import Recipe
from diffquant.convert.transfer import Transfer
from diffquant.quant.policy import Rule
from diffquant.quant.types import QuantType

__all__ = ["POLICIES", "ROUNDINGS", "Request"]

# "published": the peers' mix where there is one; "tuned": ours, where facts show it misses.
POLICIES = ("published", "tuned")
# "nearest": the bytes that other programs write; the others are quant/rounding's.
ROUNDINGS = ("nearest", "search", "feedback")


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        container: "gguf", "safetensors" or "folder".
        type: the quantized type, or None to convert only.
        dtype: cast format for `convert`, None keeps what the source has.
        parts: write only these parts; empty means the container's default.
        all_parts: quantize every part, not the denoiser alone.
        rules: user rules, in order.
        pure: ignore the type's mix.
        allow_requantize: whether already quantized weights may be rounded again.
        target: TARGETS name, or "" for the first of the container's that reads the result.
        policy: one of POLICIES.
        recipe: formats by canonical key, which win over the type's policy.
        rounding: one of ROUNDINGS.
        bias_correction: shift biases by what rounding takes from the mean of a layer's output.
        lora_rank: rank of a LoRA of the quantization error that is written beside; 0 for none.
        use_ema: write the denoiser's moving averages in place of its weights.
        added: parts taken from other files.
        pairs: header pairs to write besides those of the source; "" removes one.
        changes: part name -> canonical key -> what is done to the weight before it is stored.
        shard_nbytes: bytes of tensors that a file may hold before it is split; 0 for one file.
        transfer: a difference of two other checkpoints that is added to the weights.
        allocated: what the recipe's formats were chosen for, as the header says it; "" where
            nothing was chosen.
        arch: the architecture to take the source for, "generic" for any transformer; "" finds out.
    """

    container: str
    type: QuantType | None = None
    dtype: str | None = None
    parts: tuple[str, ...] = ()
    all_parts: bool = False
    rules: tuple[Rule, ...] = ()
    pure: bool = False
    allow_requantize: bool = False
    target: str = ""
    policy: str = "published"
    recipe: Recipe | None = None
    rounding: str = "nearest"
    bias_correction: bool = False
    lora_rank: int = 0
    arch: str = ""
    use_ema: bool = False
    added: tuple[AddedPart, ...] = ()
    pairs: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, tuple[Adapter, ...]]] = field(default_factory=dict)
    shard_nbytes: int = 0
    transfer: Transfer | None = None
    allocated: str = ""
