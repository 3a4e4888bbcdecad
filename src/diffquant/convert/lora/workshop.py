"""What the workshop's commands share: opening a LoRA with the model it is for, and its output."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant import __version__
from diffquant.convert.binding import bind
from diffquant.convert.lora.base import guess_base
from diffquant.convert.lora.claims import claims_of
from diffquant.convert.lora.group import Adapter, AdapterFile, group_adapters
from diffquant.convert.lora.modules import Model, known_model, model_of
from diffquant.convert.lora.peft_config import CONFIG_KEY
from diffquant.convert.lora.strangers import refuse_strangers
from diffquant.convert.recognise import recognise_part
from diffquant.core.errors import ArchitectureError, MalformedFile, UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source
from diffquant.io.atomic import check_parent

__all__ = ["OpenLora", "base_model", "check_apart", "check_output", "header_of", "open_lora"]

# What cloneofsimo/lora says of modules by number, and of tokens beside them.
_NUMBERED = re.compile(r"(unet|text_encoder)(:\d+:rank)?$|<s\d+>$")


@dataclass(frozen=True, slots=True)
class OpenLora:
    """An opened adapter file: its tensors and the adapters they make."""

    source: TensorSource
    file: AdapterFile

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """In file order."""
        return self.file.adapters


@contextlib.contextmanager
def open_lora(path: Path) -> Iterator[OpenLora]:
    """Open an adapter file whose every layer is whole.

    Raises:
        ArchitectureError: no adapters in it.
        MalformedFile: a layer whose tensors contradict each other or lack a half; with its name.
    """
    with open_source(path) as source:
        refuse_strangers(source)
        file = group_adapters(source)
        if file is None or not (file.adapters or file.broken):
            first = next(iter(source.specs), "no tensors")
            raise ArchitectureError(f"{path}: no LoRA in it (first tensor: {first})")
        if file.broken:
            one = file.broken[0]
            more = f" and {len(file.broken) - 1} more" if len(file.broken) > 1 else ""
            raise MalformedFile(f"{one.name}: {one.reason}{more}", path=path)
        yield OpenLora(source, file)


def base_model(lora: OpenLora, base: Path | None) -> Model:
    """The modules of the model a LoRA is for: those of `base`, else of the known model.

    Raises:
        ArchitectureError: no known model has these layers, or the base is not recognised.
    """
    if base is not None:
        with open_source(base) as source:
            logical = bind(source)
            return model_of(recognise_part(logical.specs(), source.metadata, source.configs))
    claims = claims_of(lora.source.metadata)
    claimed = [slug for claim in claims for slug in claim.architectures]
    model = known_model(guess_base(lora.adapters, claimed))
    if model is None:
        raise ArchitectureError(
            f"{lora.source.path}: no known model has these layers "
            f"(first: {lora.adapters[0].name}); give the model with --base"
        )
    return model


def check_output(out: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Check, before work starts, that a LoRA can be written.

    Raises:
        UsageError: another extension, a file that is read, or one that exists without `force`.
    """
    if out.suffix.lower() != ".safetensors":
        raise UsageError(f"{out}: a LoRA is written as .safetensors")
    check_apart(out, inputs)
    check_parent(out)
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists; use --force to replace it")


def check_apart(out: Path, inputs: Sequence[Path]) -> None:
    """Check that an output is none of the inputs, and neither in one nor around one.

    Raises:
        UsageError: it is.
    """
    target = out.resolve()
    for one in inputs:
        source = one.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise UsageError(f"{out} is {one}, which is read, or part of it; choose another name")


def header_of(source: TensorSource, ranks: Sequence[int]) -> dict[str, str]:
    """The source's header pairs, what it says of ranks made true."""
    found = {
        key: value
        for key, value in source.metadata.items()
        if isinstance(value, str) and key != CONFIG_KEY and not _NUMBERED.match(key)
    }
    if "ss_network_dim" in found and ranks:
        found["ss_network_dim"] = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
        found["ss_network_alpha"] = found["ss_network_dim"]
    return {**found, "diffquant.version": __version__}
