"""How far decoded weights are from the reference: defined once, for reports, gates and benchmarks.

    error = relative RMSE = sqrt(sum((x - y)^2) / sum(x^2))      0 is exact, 1 is as bad as zeros

Tensors arrive in chunks: only three sums are kept, in float64, so a tensor of any size takes no
more memory than a chunk, and any split into chunks gives the same value to about 1e-15.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ErrorStats", "verdict_of"]

_PASS = 1.5
_WARN = 3.0
_EXACT = 1e-6  # what float32 arithmetic may leave where no rounding is expected


@dataclass(slots=True)
class ErrorStats:
    """Running sums over pairs of reference x and decoded y.

    Attributes:
        count: elements added.
        reference: sum of x squared.
        decoded: sum of y squared.
        noise: sum of (x - y) squared.
    """

    count: int = 0
    reference: float = 0.0
    decoded: float = 0.0
    noise: float = 0.0

    def add(self, reference: NDArray[np.floating], decoded: NDArray[np.floating]) -> None:
        """Add a chunk.

        Args:
            reference: what was encoded, any shape and float dtype (float32 is fast).
            decoded: what came back, the same number of elements in the same order.
        """
        x, y = reference.reshape(-1), decoded.reshape(-1)
        if x.size != y.size:
            raise ValueError(f"reference has {x.size} elements, decoded {y.size}")
        sums = _sums(x, y)
        self.count += x.size
        self.reference += sums[0]
        self.decoded += sums[1]
        self.noise += sums[2]

    def merge(self, other: ErrorStats) -> None:
        """Add the sums of another tensor, or of another worker's chunks."""
        self.count += other.count
        self.reference += other.reference
        self.decoded += other.decoded
        self.noise += other.noise

    @property
    def finite(self) -> bool:
        """Whether every element on both sides was finite."""
        return math.isfinite(self.reference + self.decoded)

    @property
    def relative_rmse(self) -> float:
        """Relative RMSE; 0 for equal tensors (zeros included), inf for zeros decoded to others."""
        if self.noise == 0.0:
            return 0.0
        return math.sqrt(self.noise / self.reference) if self.reference else math.inf


def _sums(x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[float, float, float]:
    if x.dtype == y.dtype == np.float32:
        # Loaded here: this module serves reports too, which need no compiler.
        from diffquant.quant.codecs.arrays import frozen
        from diffquant.quant.codecs.numba.error_sums import error_sums

        found: tuple[float, float, float] = error_sums(frozen(x, x.size), frozen(y, y.size))
        return found
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: not finite, and reported as such
        noise = x - y
        return float(x @ x), float(y @ y), float(noise @ noise)


def verdict_of(error: float, gaussian_error: float) -> str:
    """Judge a tensor's relative RMSE against its format's own.

    Args:
        error: measured relative RMSE.
        gaussian_error: the format's, on Gaussian weights; 0 where the tensor must come back exact.

    Returns:
        pass up to 1.5 times the format's error, warn up to 3 times, else, or when not finite, fail.
    """
    expected = max(gaussian_error, _EXACT)
    if error <= _PASS * expected:
        return "pass"
    return "warn" if error <= _WARN * expected else "fail"
