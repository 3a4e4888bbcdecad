"""Weights that are awkward to quantize."""

import numpy as np

ROWS, COLUMNS = 96, 1024


def awkward_weights() -> dict[str, np.ndarray]:
    """Finite float32 (ROWS, COLUMNS) weights by what is awkward about them."""
    rng = np.random.default_rng(11)
    f = np.float32

    def normal() -> np.ndarray:
        return rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)

    def by_block(block: int) -> np.ndarray:
        return rng.standard_normal((ROWS, COLUMNS // block), dtype=np.float32).repeat(block, axis=1)

    outliers = normal()
    outliers[:, ::37] *= f(50)
    half_zero = normal() * (rng.random((ROWS, COLUMNS)) < 0.5)
    signed_zeros = normal() * (rng.random((ROWS, COLUMNS)) < 0.03)  # mostly +0 and -0
    return {
        "gaussian": normal() * f(0.02),
        "heavy tails": rng.standard_t(2, (ROWS, COLUMNS)).astype(np.float32),
        "outlier columns": outliers,
        "half zero": half_zero.astype(np.float32),
        "signed zeros": signed_zeros.astype(np.float32),
        "zeros": np.zeros((ROWS, COLUMNS), np.float32),
        "negative zeros": -np.zeros((ROWS, COLUMNS), np.float32),
        "constant rows": np.repeat(
            rng.standard_normal((ROWS, 1), dtype=np.float32), COLUMNS, axis=1
        ),
        "constant blocks": by_block(32),
        "two values": np.where(rng.random((ROWS, COLUMNS)) < 0.5, f(-0.7), f(0.7)),
        "integers": rng.integers(-8, 9, (ROWS, COLUMNS)).astype(np.float32),
        "subnormal": normal() * f(1e-40),
        "smallest subnormal": normal() * f(1e-43),
        "1e-30": normal() * f(1e-30),
        "1e-15": normal() * f(1e-15),
        "1e-7": normal() * f(1e-7),
        "1e-5": normal() * f(1e-5),
        "1e4": normal() * f(1e4),
        "blocks of all sizes": normal() * np.exp(by_block(16) * f(6)),
        "elements of all sizes": normal() * np.exp(normal() * f(5)),
        "positive": np.abs(normal()) + f(1),
        "negative": -np.abs(normal()) - f(1),
        "nearly constant": f(1) + normal() * f(1e-6),
        "nearly constant negative": f(-1) + normal() * f(1e-6),
        "from bf16": (normal().view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
        "from f16": normal().astype(np.float16).astype(np.float32),
    }


def importance_rows() -> dict[str, np.ndarray]:
    """Importance of COLUMNS columns: ones as sd.cpp passes, and such as layers really have."""
    rng = np.random.default_rng(12)
    squares = rng.standard_normal(COLUMNS, dtype=np.float32) ** 2
    return {
        "ones": np.ones(COLUMNS, np.float32),
        "mean squares": squares,
        "a few columns": np.where(rng.random(COLUMNS) < 0.1, squares, np.float32(0)),
        "of all sizes": np.exp(rng.standard_normal(COLUMNS, dtype=np.float32) * np.float32(5)),
    }


def not_finite() -> np.ndarray:
    """Gaussian (4, COLUMNS) weights with infinities and NaN of both signs."""
    weight = np.random.default_rng(13).standard_normal((4, COLUMNS), dtype=np.float32)
    weight[0, ::40], weight[1, ::50], weight[3, 5::70] = np.inf, -np.inf, np.inf
    weight[2, ::60], weight[3, ::64] = np.nan, -np.nan
    return weight
