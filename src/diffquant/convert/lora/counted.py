"""Names for files that number their modules: `unet:0:down`, as cloneofsimo/lora writes.

The numbers count the Linear layers inside chosen classes in the order of PyTorch's
`named_modules`; the classes stand in the header, the order nowhere. For Stable Diffusion 1 and 2 at
the time of those files (diffusers 0.11) it is: blocks on the way down, on the way up, then the
middle, and in each block attn1's q, k, v and out, the feed-forward's projection, attn2's. The
shapes prove it or deny it, layer by layer: then the numbers are left as they are.

Sources: cloneofsimo/lora:lora_diffusion/lora.py, UNET_DEFAULT_TARGET_REPLACE and
`_find_modules`; huggingface/diffusers v0.11.0:src/diffusers/models/attention.py,
BasicTransformerBlock, and unet_2d_condition.py; transformers CLIPAttention: k, v, q, out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffquant.convert.rules import Shape

__all__ = ["counted_names"]

_ATTENTIONS = (
    *(f"down_blocks.{level}.attentions.{index}" for level in range(3) for index in range(2)),
    *(f"up_blocks.{level}.attentions.{index}" for level in range(1, 4) for index in range(3)),
    "mid_block.attentions.0",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCK = (
    *(f"attn1.{name}" for name in _ATTENTION),
    "ff.net.0.proj",
    *(f"attn2.{name}" for name in _ATTENTION),
)
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")


def counted_names(downs: Mapping[str, Shape]) -> dict[str, str]:
    """Numbered module -> dotted name with its prefix; only those that the shapes bear out.

    Args:
        downs: module as written -> shape of its down factor, (r, K).
    """
    found: dict[str, str] = {}
    for part, names in (("unet", tuple(_unet())), ("text_encoder", tuple(_clip(downs)))):
        widths = {
            int(name.partition(":")[2]): shape[1]
            for name, shape in downs.items()
            if name.startswith(f"{part}:") and len(shape) == 2
        }
        if widths.keys() == set(range(len(names))) and _fits(part, names, widths):
            found.update({f"{part}:{index}": f"{part}.{name}" for index, name in enumerate(names)})
    return found


def _unet() -> Iterator[str]:
    for attention in _ATTENTIONS:
        for name in _BLOCK:
            yield f"{attention}.transformer_blocks.0.{name}"


def _clip(downs: Mapping[str, Shape]) -> Iterator[str]:
    layers = sum(name.startswith("text_encoder:") for name in downs) // len(_CLIP)
    for layer in range(layers):
        for name in _CLIP:
            yield f"text_model.encoder.layers.{layer}.self_attn.{name}"


def _fits(part: str, names: tuple[str, ...], widths: Mapping[int, int]) -> bool:
    """Whether every layer reads what its name says: the text in attn2, else its block's width."""
    if part == "text_encoder":
        return len(set(widths.values())) == 1
    text = widths[names.index(f"{_ATTENTIONS[0]}.transformer_blocks.0.attn2.to_k")]
    levels: dict[str, int] = {}
    for index, name in enumerate(names):
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            if widths[index] != text:
                return False
            continue
        level = name.split(".attentions")[0].replace("up_blocks.3", "down_blocks.0")
        level = level.replace("up_blocks.2", "down_blocks.1").replace(
            "up_blocks.1", "down_blocks.2"
        )
        level = level.replace("mid_block", "down_blocks.2")  # as wide as the deepest level
        if levels.setdefault(level, widths[index]) != widths[index]:
            return False
    return len(set(levels.values())) == len(levels)
