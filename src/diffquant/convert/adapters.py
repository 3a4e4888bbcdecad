"""The adapter slot: what may change a weight between its source and its codec.

LoRA and kin attach to a Step as adapters. An adapter sees float32 rows of the target tensor, so it
works inside the streaming loop; a kind that needs the whole tensor says so and is given it in one
chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROWS", "WHOLE", "Adapter", "Mixing"]

ROWS = "rows"
WHOLE = "whole"


class Adapter(Protocol):
    """Changes one target tensor.

    Attributes:
        name: what reports call it.
        reach: ROWS when any row range can be computed alone, else WHOLE.
    """

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def reach(self) -> str:
        """ROWS or WHOLE."""
        ...

    def apply(self, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the adapted rows.

        Args:
            weight: (R, K) float32, rows `rows[0]` to `rows[1]` of the target; not modified. A
                vector is a column: its rows are its elements.
            rows: half-open row range; where the reach is WHOLE, it holds every row that changes.
        """
        ...


@runtime_checkable
class Mixing(Protocol):
    """An adapter that knows which rows it mixes, so that a plan can refuse what would part them."""

    def parted(self, rows: Sequence[tuple[int, int]]) -> str:
        """Why a tensor of these rows alone cannot be changed; empty where it can.

        Args:
            rows: half-open ranges of the weight's rows.
        """
        ...
