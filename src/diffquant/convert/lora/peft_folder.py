"""A folder as PEFT saves one, built beside its name and renamed: whole or not at all.

A LoRA of one part is the folder itself; one of several has a folder for each, named as Diffusers
names the parts (`unet`, `text_encoder`), since a PeftModel adapts one model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffquant.convert.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE
from diffquant.core.errors import UsageError
from diffquant.io.atomic import check_parent, partial_path, remove_stale, sync_folder

__all__ = ["check_folder", "is_folder", "new_folder", "put_config"]


def is_folder(out: Path) -> bool:
    """Whether an output is a folder: it is one, or its name has no extension of a file."""
    return out.is_dir() or out.suffix == ""


def check_folder(out: Path, *, force: bool) -> None:
    """Check that a folder can be written; one that is replaced holds nothing but such a LoRA.

    Raises:
        UsageError: it exists without `force`, or holds other files.
    """
    check_parent(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is no folder; choose another name")
    if not out.exists():
        return
    files = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    if files and not force:
        raise UsageError(f"{out} exists; use --force to replace it")
    others = [path for path in files if path.name not in (CONFIG_FILE, WEIGHTS_FILE, "README.md")]
    if others:
        raise UsageError(
            f"{out} holds {others[0].relative_to(out)}, which is no LoRA's: choose another folder"
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name of `out` once all is written."""
    remove_stale(out)
    building = partial_path(out)
    building.mkdir()
    try:
        yield building
        sync_folder(building)
        old = out.rename(partial_path(out, "old")) if out.exists() else None
        building.rename(out)
        sync_folder(out.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def put_config(folder: Path, content: bytes) -> None:
    """Write adapter_config.json and make it durable."""
    with (folder / CONFIG_FILE).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
