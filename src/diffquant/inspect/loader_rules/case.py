"""What a rule looks at: one file as a program that is to load it meets it.

A Case says nothing new of a Subject. It gives names to what the rules of several programs ask for,
and works each out once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.dialects.markers import HEADER, Marker, read_markers
from diffquant.convert.logical import LogicalTensor
from diffquant.convert.match import PartMatch
from diffquant.convert.stored import stored_in
from diffquant.convert.targets import Stored
from diffquant.inspect.subject import Subject
from diffquant.io.gguf_values import GgufArray, GgufValue
from diffquant.io.imatrix import is_gguf_imatrix

__all__ = ["Case"]

_CONTAINERS = {"torch_pickle": "pickle", "diffusers_folder": "folder"}


@dataclass(frozen=True)
class Case:
    """A Subject as rules see it; without slots, for what is worked out once to be kept.

    Attributes:
        subject: the opened, recognised file.
    """

    subject: Subject

    @functools.cached_property
    def container(self) -> str:
        """safetensors, gguf, pickle, sharded, folder (of parts) or component (a part's folder)."""
        name = _CONTAINERS.get(self.subject.source.container, self.subject.source.container)
        parted = any("/" in key for key in self.subject.source.specs)
        if name == "folder":
            return "folder" if parted else "component"
        # A folder with one file and no config.json is opened as that file.
        given = Path(self.subject.path)
        return "component" if self.subject.source.path.parent == given else name

    @functools.cached_property
    def kind(self) -> str:
        """The subject's kind; "imatrix" for an importance matrix."""
        source = self.subject.source
        gguf = source.container == "gguf"
        return "imatrix" if gguf and is_gguf_imatrix(source) else self.subject.kind

    @property
    def architecture(self) -> str:
        """Slug of a model, kind of a part alone, or "unknown"."""
        return self.subject.match.architecture if self.subject.match else "unknown"

    @property
    def variant(self) -> str:
        """Member of the family, or ""."""
        return self.subject.match.variant if self.subject.match else ""

    @property
    def denoiser(self) -> PartMatch | None:
        """The denoiser, where there is one."""
        return self.subject.match.part("denoiser") if self.subject.match else None

    @property
    def prefix(self) -> str:
        """What stands before the denoiser's keys."""
        return self.denoiser.prefix if self.denoiser else ""

    @functools.cached_property
    def diffusers_names(self) -> bool:
        """Whether the denoiser has Diffusers' names, and its makers' are others."""
        part = self.denoiser
        if part is None or part.layout != "diffusers" or self.architecture not in ARCHITECTURES:
            return False
        return not ARCHITECTURES[self.architecture].component(part.name, part.kind).same_names

    @functools.cached_property
    def lacking(self) -> tuple[str, ...]:
        """Parts of the architecture that the file does not have."""
        match = self.subject.match
        if match is None or match.architecture not in ARCHITECTURES or self.denoiser is None:
            return ()
        companions = ARCHITECTURES[match.architecture].companions
        names = dict.fromkeys(one.name for one in companions)
        return tuple(name for name in names if match.part(name) is None)

    @functools.cached_property
    def stored(self) -> tuple[Stored, ...]:
        """Every tensor, as targets judge it."""
        return stored_in(self.subject.logical, self.subject.match)

    @property
    def tensors(self) -> Mapping[str, LogicalTensor]:
        """Logical tensors by key."""
        return self.subject.logical.tensors

    @property
    def metadata(self) -> Mapping[str, object]:
        """The header's pairs."""
        return self.subject.source.metadata

    @property
    def typed(self) -> Mapping[str, GgufValue]:
        """The header's pairs with their types; empty outside GGUF."""
        found: Mapping[str, GgufValue] = getattr(self.subject.source, "typed_metadata", {})
        return found

    def packed(self, *dialects: str) -> list[str]:
        """Keys of packed weights in these dialects; of all packed weights where none is given."""
        return [key for key, dialect in self._packed if not dialects or dialect in dialects]

    @functools.cached_property
    def _packed(self) -> tuple[tuple[str, str], ...]:
        return tuple((key, one.dialect) for key, one in self.tensors.items() if one.is_quantized)

    @functools.cached_property
    def markers(self) -> Mapping[str, Marker]:
        """Layer -> what ComfyUI's markers say of it."""
        return read_markers(self.subject.source)[0]

    @functools.cached_property
    def header_layers(self) -> frozenset[str]:
        """Layers that `_quantization_metadata` names, as it names them."""
        text = self.metadata.get(HEADER)
        layers = json.loads(text).get("layers", {}) if isinstance(text, str) else {}
        return frozenset(layers)

    @functools.cached_property
    def reshaped(self) -> tuple[str, ...]:
        """Keys of tensors whose rows in a GGUF file are not their own."""
        return tuple(key for key, one in self.tensors.items() if one.reshaped)

    @functools.cached_property
    def arrays(self) -> tuple[str, ...]:
        """Keys of metadata that hold arrays."""
        return tuple(key for key, value in self.metadata.items() if isinstance(value, GgufArray))

    def keys(self, *endings: str) -> Iterator[str]:
        """Physical keys with one of these endings."""
        return (key for key in self.subject.source.specs if key.endswith(endings))
