"""resize_lora(): the same LoRA at a lower rank, each layer's best approximation.

The delta is never formed: with QR of both factors its singular values are those of a small matrix,

    up = Q_u R_u      down^T = Q_d R_d      R_u R_d^T = U S V^T (r, r)
    up' = Q_u U sqrt(S)      down' = sqrt(S) V^T Q_d^T

Alpha becomes the rank: the scale is in the factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.pairs import Matrix, read_pair, stored_bytes, write
from diffquant.convert.lora.ranks import Keep
from diffquant.convert.lora.workshop import check_output, header_of, open_lora
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec
from diffquant.io.atomic import check_disk

__all__ = ["ResizeReport", "ResizedLayer", "reduced", "resize_lora"]

_STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_RESIZABLE = frozenset({"down", "up", "alpha"})


@dataclass(frozen=True, slots=True)
class ResizedLayer:
    """One layer: rank before and after, and the share of the squared delta that is kept."""

    name: str
    before: int
    rank: int
    kept: float


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """What resizing did, or would do.

    Attributes:
        source, output: paths.
        layers: every layer.
        ranks: rank -> layers.
        kept: share of the squared size of all deltas that is kept.
        worst: the lowest share of a layer.
        before_nbytes, nbytes: of all tensors.
        dry_run: nothing was written.
    """

    source: str
    output: str
    layers: tuple[ResizedLayer, ...]
    ranks: Mapping[str, int]
    kept: float
    worst: float
    before_nbytes: int
    nbytes: int
    dry_run: bool


def reduced(
    up: Matrix, down: Matrix, keep: Keep, *, conv: bool = False
) -> tuple[Matrix, Matrix, float, float]:
    """The best approximation of up @ down at the rank that `keep` asks for.

    Args:
        up: (N, r).
        down: (r, K).
        keep: what to keep.
        conv: whether it is a kernel's.

    Returns:
        up (N, q), down (q, K), of equal size in each pair; squared size before, and what is kept.
    """
    left, r_up = np.linalg.qr(up.astype(np.float64))
    right, r_down = np.linalg.qr(down.T.astype(np.float64))
    u, values, vt = np.linalg.svd(r_up @ r_down.T)
    total = float((values**2).sum())
    count = keep.count(values, total, conv=conv)
    root = np.sqrt(values[:count])
    new_up = (left @ u[:, :count]) * root
    new_down = root[:, None] * (vt[:count] @ right.T)
    return (
        new_up.astype(np.float32),
        new_down.astype(np.float32),
        total,
        float((values[:count] ** 2).sum()),
    )


def resize_lora(
    src: Path,
    out: Path,
    keep: Keep,
    *,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = NO_PROGRESS,
) -> ResizeReport:
    """Lower the rank of every layer; ranks are never raised.

    Args:
        src: a LoRA or LoCon in any naming, which it keeps.
        out: a safetensors file.
        keep: what to keep of each layer.
        dtype: f32, f16 or bf16 for the factors; None keeps what each layer has.
        force: replace an existing output.
        dry_run: measure, write nothing.
        progress: told about bytes.

    Raises:
        DiffquantError: see core/errors.py; another kind of adapter is refused by name.
    """
    check_output(out, [src], force=force or dry_run)
    with open_lora(src) as lora:
        for adapter in lora.adapters:
            if adapter.kind != "lora" or adapter.parts.keys() - _RESIZABLE:
                raise UsageError(
                    f"{src}: {adapter.name} is {adapter.label}; only LoRA and LoCon without a core "
                    "have a rank that can be lowered so"
                )
        source = lora.source
        rows: list[ResizedLayer] = []
        stored: dict[str, tuple[TensorSpec, ByteArray]] = {}
        before = kept = 0.0
        progress.start("resizing", sum(source.specs[a.parts["up"]].nbytes for a in lora.adapters))
        try:
            for adapter in lora.adapters:
                row, tensors, sizes = _resized(source, adapter, keep, dtype)
                rows.append(row)
                stored.update(tensors)
                before, kept = before + sizes[0], kept + sizes[1]
                progress.advance(source.specs[adapter.parts["up"]].nbytes, adapter.name)
        finally:
            progress.stop()
        carried = [key for key, _ in lora.file.ignored if key in source.specs]
        for key in (*lora.file.vectors, *carried):
            stored[key] = (source.specs[key], source.read(key))
        specs = [spec for spec, _ in stored.values()]
        nbytes = sum(spec.nbytes for spec in specs)
        if not dry_run:
            check_disk(out, nbytes)
            header = header_of(source, [row.rank for row in rows])
            layers: Iterator[Mapping[str, Matrix | ByteArray]] = (
                {key: data} for key, (_, data) in stored.items()
            )
            write(out, specs, layers, header, force=force)
        counts = Counter(str(row.rank) for row in rows)
        return ResizeReport(
            source=str(src),
            output=str(out),
            layers=tuple(rows),
            ranks=dict(counts.most_common()),
            kept=kept / before if before else 1.0,
            worst=min((row.kept for row in rows), default=1.0),
            before_nbytes=sum(spec.nbytes for spec in source.specs.values()),
            nbytes=nbytes,
            dry_run=dry_run,
        )


def _resized(
    source: TensorSource, adapter: Adapter, keep: Keep, dtype: str | None
) -> tuple[ResizedLayer, dict[str, tuple[TensorSpec, ByteArray]], tuple[float, float]]:
    pair = read_pair(source, adapter)
    up, down, before, kept = reduced(
        pair.up * np.float32(pair.scale), pair.down, keep, conv="conv" in adapter.traits
    )
    rank = len(down)
    shapes = {
        adapter.parts["up"]: (len(up), rank, *adapter.shapes["up"][2:]),
        adapter.parts["down"]: (rank, *adapter.shapes["down"][1:]),
    }
    found: dict[str, tuple[TensorSpec, ByteArray]] = {}
    for key, values in ((adapter.parts["up"], up), (adapter.parts["down"], down)):
        held = _STORED[dtype] if dtype else source.specs[key].dtype
        found[key] = (TensorSpec(key, held, shapes[key]), stored_bytes(key, held, values))
    if alpha := adapter.parts.get("alpha"):
        number = np.array(rank, np.float32)
        found[alpha] = (TensorSpec(alpha, "F32", ()), stored_bytes(alpha, "F32", number))
    share = kept / before if before else 1.0
    return ResizedLayer(adapter.name, adapter.rank or 0, rank, share), found, (before, kept)
