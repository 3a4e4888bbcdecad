"""Parts of a model that do nothing: blocks of zero matrices, projections whose output is zero.

A block is whatever sits under a number in a name: `double_blocks.3`, `input_blocks.4.1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffquant.inspect.weight_stats import WeightStats

__all__ = ["dead_blocks", "dead_outputs"]

_FEW = 2  # matrices that make a block
_MAX_NAMES = 24  # names come from files: one of a million dots has no blocks
# The last layer of an attention, a feed-forward or a residual branch, as the architectures in
# convert/architectures name it.
_OUTPUTS = (
    ".to_out.0.weight", ".to_add_out.weight", ".out_proj.weight", ".o_proj.weight",
    ".proj_out.weight", ".proj.weight", ".wo.weight", ".o.weight", ".ff.net.2.weight",
    ".ff_context.net.2.weight", ".mlp.2.weight", "_mlp.2.weight", ".mlp.net.2.weight",
    ".fc2.weight", ".down_proj.weight", ".linear2.weight", ".linear_2.weight", ".w2.weight",
    ".out_layers.3.weight", ".conv2.weight",
)  # fmt: skip


def dead_blocks(matrices: Mapping[str, WeightStats]) -> dict[str, int]:
    """Outermost blocks in which every matrix is zero -> how many matrices that are."""
    inside: dict[str, list[bool]] = {}
    for key, stats in matrices.items():
        for block in _blocks(key):
            inside.setdefault(block, []).append(stats.is_zero)
    dead = {block: len(zero) for block, zero in inside.items() if len(zero) >= _FEW and all(zero)}
    return {
        block: count for block, count in dead.items() if not any(p in dead for p in _blocks(block))
    }


def _blocks(key: str) -> Iterator[str]:
    """The blocks that hold `key`, outermost first: its beginnings that end in a number."""
    if key.count(".") > _MAX_NAMES:
        return
    names = key.split(".")
    for at, name in enumerate(names[:-1]):
        if name.isdigit():
            yield ".".join(names[: at + 1])


def dead_outputs(
    matrices: Mapping[str, WeightStats], stats: Mapping[str, WeightStats]
) -> Iterator[tuple[str, bool]]:
    """Output projections of zeros outside of dead blocks, and whether their bias is zero too."""
    blocks = dead_blocks(matrices)
    for key, one in matrices.items():
        if not one.is_zero or not key.endswith(_OUTPUTS):
            continue
        inside = list(_blocks(key.removesuffix(".weight").rpartition(".")[0] + ".x"))
        if inside and not any(block in blocks for block in inside):
            bias = stats.get(key.removesuffix("weight") + "bias")
            if bias is None or bias.is_zero:
                yield key, bias is not None
