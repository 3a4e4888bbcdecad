"""draw_grid(): the sample grid of a release, drawn by the bundled runtime.

A column for the original and one per file, a row per prompt, one seed throughout, computed in
float32: what differs along a row is what the file changed. Files that the runtime cannot draw with
are named and left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import ArchitectureError, CheckpointError, UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.publish.facts import facts_of
from diffquant.publish.grid import sample_grid
from diffquant.publish.release import published_files
from diffquant.publish.rows import size_text

__all__ = ["draw_grid", "draw_release"]

Pictures = list[NDArray[np.float32]]
_MOST = 6


def draw_grid(
    files: Sequence[tuple[str, Path]],
    original: Path,
    target: Path,
    *,
    prompts: Sequence[str],
    steps: int = 20,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = NO_PROGRESS,
) -> tuple[str, ...]:
    """Draw and write the grid.

    Args:
        files: (label, path), in column order.
        original: what the files were made from; also what they lack.
        target: PNG to write, replaced.
        prompts: one per row, the first six count.
        steps: of every picture.
        seed: of every picture.
        device: torch device.
        progress: told about steps.

    Returns:
        A sentence per file that was left out.

    Raises:
        UsageError: none of the files can be drawn with.
        CheckpointError, ArchitectureError: the original cannot.
    """
    prompts = tuple(prompts)[:_MOST]
    first, size = _draw(original, None, prompts, steps, seed, device, progress, None)
    columns: list[tuple[str, Pictures]] = [("original", first)]
    notes = []
    for label, path in files:
        try:
            made, _ = _draw(path, original, prompts, steps, seed, device, progress, size)
        except (CheckpointError, ArchitectureError, UsageError) as error:
            notes.append(f"{path.name} is not in the grid: {error}")
            continue
        columns.append((f"{label}\n{size_text(path.stat().st_size)}", made))
    if len(columns) == 1:
        raise UsageError(f"the runtime can draw with none of the files: {shorten(notes, 2)}")
    beside = target.with_name(f".{target.stem}.partial-{os.getpid()}.png")
    try:
        sample_grid(columns, prompts, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return tuple(notes)


def draw_release(
    paths: Sequence[Path],
    original: Path,
    target: Path,
    *,
    prompts: Sequence[str],
    steps: int = 20,
    progress: Progress = NO_PROGRESS,
) -> tuple[str, ...]:
    """draw_grid() of what `paths` would publish, largest first."""
    found = sorted(facts_of(published_files(paths)[0], hashed=False), key=lambda one: -one.nbytes)
    files = [(one.type or one.largest, one.path) for one in found]
    return draw_grid(files, original, target, prompts=prompts, steps=steps, progress=progress)


def _draw(
    model: Path,
    base: Path | None,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    device: str,
    progress: Progress,
    size: tuple[int, int] | None,
) -> tuple[Pictures, tuple[int, int]]:
    from diffquant.runtime.engines import EngineFiles, open_side  # torch comes with it
    from diffquant.runtime.request import PictureRequest

    side = open_side("bundled", EngineFiles(model, base, device=device))
    width, height = size or side.size
    pictures: Pictures = []
    progress.start(f"draw {model.name}", len(prompts) * steps, "step")
    try:
        for prompt in prompts:
            request = PictureRequest(prompt, seed=seed, steps=steps, width=width, height=height)
            pictures.append(side.draw(request, lambda _done, _total: progress.advance(1))[0])
    finally:
        progress.stop()
    return pictures, (width, height)
