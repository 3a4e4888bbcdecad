"""How many singular values to keep: a fixed rank, or a measure of what is kept.

| measure | keeps, of singular values s_1 >= s_2 ... | in sd-scripts |
|---|---|---|
| rank | as many as it says | `--new_rank` |
| energy | sum of kept s^2 / sum of all >= E | |
| sv_fro | root of that >= F | `sv_fro` |
| sv_cumulative | sum of kept s / sum of all >= C | `sv_cumulative` |
| sv_ratio | those with s_1 / s <= R | `sv_ratio` |

Beside a measure, a rank is the most that is kept. Source of the words: kohya-ss/sd-scripts@450630c:
networks/resize_lora.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UsageError

__all__ = ["Keep", "keep_of"]


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep.

    Attributes:
        rank: at most so many; None for no limit.
        measure: one of the table above, "" for the rank alone.
        value: of the measure.
        conv_rank: in place of `rank` for kernels above 1x1; None for the same.
    """

    rank: int | None
    measure: str = ""
    value: float = 0.0
    conv_rank: int | None = None

    def limit(self, *, conv: bool) -> int | None:
        """The most singular values that are kept of a matrix, or of a kernel."""
        return self.conv_rank if conv and self.conv_rank is not None else self.rank

    def count(self, values: NDArray[np.float64], total: float, *, conv: bool = False) -> int:
        """How many singular values to keep, at least one.

        Args:
            values: the leading ones, descending.
            total: sum of the squares of all, at least that of `values`.
            conv: whether they are a kernel's.
        """
        most = min(len(values), self.limit(conv=conv) or len(values))
        if not self.measure:
            return max(most, 1)
        return max(min(_reached(self.measure, self.value, values, total), most), 1)


def _reached(measure: str, value: float, values: NDArray[np.float64], total: float) -> int:
    if measure == "sv_ratio":
        return int((values[0] <= value * values).sum())
    if measure == "sv_cumulative":
        shares = np.cumsum(values) / max(float(values.sum()), 1e-300)
        goal = value
    else:
        shares = np.cumsum(values**2) / max(total, 1e-300)
        goal = value * value if measure == "sv_fro" else value
    # sums of squares are exact to float64's last places only
    return int(np.searchsorted(shares, goal * (1 - 1e-12))) + 1


def keep_of(
    rank: int | None, measures: dict[str, float | None], *, conv_rank: int | None = None
) -> Keep:
    """What the options of a command ask for.

    Raises:
        UsageError: nothing, two measures, or a value that measures nothing.
    """
    asked = {name: value for name, value in measures.items() if value is not None}
    names = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
    if len(asked) > 1:
        raise UsageError(f"{names}: give one of them")
    if not asked:
        if rank is None:
            known = ", ".join(f"--{name.replace('_', '-')}" for name in measures)
            raise UsageError(f"give --rank, or one of {known}")
        return Keep(rank, conv_rank=conv_rank)
    name, value = next(iter(asked.items()))
    good = value >= 1 if name == "sv_ratio" else 0 < value <= 1
    if not good:
        wanted = "1 or more" if name == "sv_ratio" else "above 0 and at most 1"
        raise UsageError(f"{names} {value:g}: expected a number {wanted}")
    return Keep(rank, name, float(value), conv_rank)
