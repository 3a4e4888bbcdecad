"""planned_subject(): a file that a plan would write, as a Subject, before it is written.

So that what is said of a file (who loads it, and why not) can be said of one that is only planned,
by the same rules. Its header is the plan's; of its tensors only markers can be read, whose bytes
the plan knows.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from diffquant.convert.match import Match
from diffquant.convert.plan import Plan
from diffquant.convert.surroundings import metadata_of, surroundings
from diffquant.convert.view import SourceView
from diffquant.core.errors import PlanMismatch
from diffquant.core.tensors import ByteArray, TensorSource
from diffquant.inspect.subject import Subject, subject_of
from diffquant.io.gguf_values import ARRAY_ID, TYPE_IDS, GgufArray, GgufValue, encode_value

__all__ = ["planned_subject"]

_ENDINGS = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}
_NAMES = {number: name for name, number in TYPE_IDS.items()}
_ARRAY_HEAD = 16  # u32 array, u32 type of items, u64 count
_CONTAINERS = {"folder": "diffusers_folder"}


def planned_subject(plan: Plan, match: Match, source: TensorSource, stem: str) -> Subject:
    """The file that a plan of a source would write, recognised.

    Args:
        plan: as made.
        match: of the source.
        source: the source, for its header.
        stem: of the file's name.
    """
    path = Path(stem + _ENDINGS[plan.request.container])
    return subject_of(_Planned(plan, match, source, path), str(path))


class _Unread(SourceView):
    """A source whose weights are all zero: the fingerprint of a planned file matters to nobody."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.specs, self.nbytes = source.specs, source.nbytes
        self.typed_metadata = getattr(source, "typed_metadata", {})

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """No byte of the source."""
        del key, rows
        return np.zeros(1, np.uint8)


class _Planned(_Unread):
    """A TensorSource of which markers alone can be read."""

    def __init__(self, plan: Plan, match: Match, source: TensorSource, path: Path) -> None:
        super().__init__(source)
        container = plan.request.container
        around = surroundings(plan, match, source, None)
        pairs = metadata_of(plan, match, _Unread(source), around.header)
        self.path = path
        self.container = _CONTAINERS.get(container, container)
        self.specs = {spec.key: spec for spec in plan.specs}
        self.metadata = {} if container == "folder" else pairs
        self.configs = around.configs
        self.files, self.components = tuple(around.files), {}
        self.nbytes = plan.nbytes
        if container == "gguf":
            self.typed_metadata = {key: _typed(key, value) for key, value in pairs.items()}
            self.metadata = {key: one.value for key, one in self.typed_metadata.items()}
        self._packed = {one.spec.key: one for step in plan.steps for one in step.packed}

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Bytes of a marker.

        Raises:
            PlanMismatch: weights were asked for.
        """
        del rows
        one = self._packed[key]
        if not one.constant:
            raise PlanMismatch(f"{key}: weights of a file that is only planned were read")
        return one.data(np.float32(0) if one.part else None)


def _typed(key: str, value: object) -> GgufValue:
    """A value as it is read back from a header."""
    raw = encode_value(key, value)
    kind, item, count = struct.unpack_from("<IIQ", raw.ljust(_ARRAY_HEAD, b"\0"))
    if kind == ARRAY_ID:
        return GgufValue(_NAMES[item], GgufArray(_NAMES[item], count, raw[_ARRAY_HEAD:]))
    return GgufValue(_NAMES[kind], value.value if isinstance(value, GgufValue) else value)
