"""A Diffusers folder: one sub-folder per component, each with config.json and its tensors.

::

    model_index.json                                     {"_class_name", "unet": ["diffusers", ...]}
    unet/config.json                                     -> configs["unet/config.json"]
    unet/diffusion_pytorch_model.safetensors             -> keys "unet/<key>"
    transformer/diffusion_pytorch_model.safetensors.index.json + shards
    text_encoder/model.safetensors
    tokenizer/vocab.json, tokenizer/merges.txt, ...      -> files, read_file()

`model_index.json` may be missing. A bare component (config.json beside its tensors) is a folder
too; its keys have no prefix. In each component safetensors win over pickles, plain names over
variants (`.fp16.`), single files over shards. What model_index.json sets to null is not read.

Sources: huggingface/diffusers@58eb52c src/diffusers/utils/constants.py (WEIGHTS_NAME,
SAFETENSORS_WEIGHTS_NAME), pipelines/pipeline_loading_utils.py (variants).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffquant.core.errors import CheckpointError, MalformedFile, MissingKeys
from diffquant.core.tensors import ByteArray, Closing, TensorSource, TensorSpec
from diffquant.io import safetensors, sharded, torch_pickle
from diffquant.io.reading import expect_files, find_spec

__all__ = ["INDEX_NAME", "FolderSource", "find_weights", "open_folder", "sniff"]

INDEX_NAME = "model_index.json"
_MAX_CONFIG_NBYTES = 8 << 20
_MAX_SIDE_NBYTES = 64 << 20
_MAX_ENTRIES = 2000
_CONFIG_NAME = re.compile(r"(model_index|config|.*_config)\.json")
_ROOT_FILES = re.compile(r"(readme|license|notice).*", re.IGNORECASE)
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".pb", ".sft",
}  # fmt: skip
# Best first; a name without a variant has no dot before the suffix.
_PLAIN = r"(diffusion_pytorch_model|model|pytorch_model)"
_CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        _PLAIN + r"\.safetensors",
        _PLAIN + r"\.safetensors\.index\.json",
        _PLAIN + r"\.[^.]+\.safetensors",
        _PLAIN + r"(\.safetensors\.index\.[^.]+|\.[^.]+\.safetensors\.index)\.json",
        r"(?!.*-\d{5}-of-\d{5}).*\.safetensors",
        _PLAIN + r"\.bin",
        _PLAIN + r"\.bin\.index\.json",
        _PLAIN + r"\.[^.]+\.bin",
        _PLAIN + r"(\.bin\.index\.[^.]+|\.[^.]+\.bin\.index)\.json",
    )
)


def sniff(path: Path, head: bytes) -> bool:
    """Tell whether a path is a folder with a pipeline or a component in it."""
    return path.is_dir() and (
        (path / INDEX_NAME).is_file()
        or (_has_config(path) and find_weights(path) is not None)
        or any(_is_component(folder) for folder in _folders(path))
    )


def find_weights(folder: Path) -> Path | None:
    """Return the file (or shard index) that holds a component's tensors, or None.

    Raises:
        CheckpointError: several safetensors files, none under a name that Diffusers uses.
    """
    names = [entry.name for entry in _entries(folder) if entry.is_file()]
    for choice in _CHOICES:
        found = sorted(name for name in names if choice.fullmatch(name))
        if len(found) > 1 and choice is _CHOICES[4]:
            raise CheckpointError(
                f"several safetensors files, name one of them: {', '.join(found[:5])}", path=folder
            )
        if found:
            return folder / found[0]
    return None


class FolderSource(Closing):
    """A folder's components as one source; keys are "component/key".

    Attributes:
        components: sub-folder -> the file its tensors come from ("" for a bare component).
        files: small files beside the tensors that are not in `configs`, as relative paths.
    """

    def __init__(
        self,
        path: Path,
        *,
        sources: Mapping[str, TensorSource],
        configs: Mapping[str, Any],
        files: tuple[str, ...],
    ) -> None:
        self.path = path
        self.container = "diffusers_folder"
        self.configs: Mapping[str, Any] = configs
        self.files = files
        self.components = {name: source.path for name, source in sources.items()}
        self.nbytes = sum(source.nbytes for source in sources.values())
        self._sources = sources
        specs: dict[str, TensorSpec] = {}
        metadata: dict[str, Any] = {}
        for name, source in sources.items():
            prefix = f"{name}/" if name else ""
            for key, spec in source.specs.items():
                specs[prefix + key] = TensorSpec(prefix + key, spec.dtype, spec.shape)
            metadata |= {prefix + key: value for key, value in source.metadata.items()}
        self.specs: Mapping[str, TensorSpec] = specs
        self.metadata: Mapping[str, Any] = metadata

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        found: list[Path] = []
        for source in self._sources.values():
            if isinstance(source, sharded.ShardedSource):
                found += source.weight_files
            else:
                found.append(source.path)
        return tuple(found)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat, read-only array."""
        find_spec(self.specs, key, self.path)
        if "" in self._sources:
            return self._sources[""].read(key, rows)
        component, _, inner = key.partition("/")
        return self._sources[component].read(inner, rows)

    def read_file(self, name: str) -> bytes:
        """Return the bytes of one of `files`.

        Raises:
            MissingKeys: `files` has no such name.
        """
        if name not in self.files:
            raise MissingKeys(f"{self.path}: no side file {name!r}", keys=(name,))
        return (self.path / name).read_bytes()

    def close(self) -> None:
        """Close every component."""
        for source in self._sources.values():
            source.close()


def open_folder(path: Path) -> FolderSource:
    """Open a pipeline's or a component's folder.

    Raises:
        MalformedFile: a config that is not a JSON object.
        CheckpointError: no component with tensors.
    """
    configs: dict[str, Any] = {}
    if (path / INDEX_NAME).is_file():
        _read_config(path, INDEX_NAME, configs)
    elif _has_config(path) and find_weights(path):
        return _open_components(path, [""], configs)
    names = _component_names(path, configs.get(INDEX_NAME))
    found = _open_components(path, names, configs)
    if not found.components:
        found.close()
        raise CheckpointError(
            "no component folder (unet, transformer, vae, ...) with safetensors or .bin in it",
            path=path,
        )
    return found


def _open_components(path: Path, names: list[str], configs: dict[str, Any]) -> FolderSource:
    with contextlib.ExitStack() as stack:
        sources: dict[str, TensorSource] = {}
        files: list[str] = []
        expect_files(path, _files_to_open(path, names))
        for name in names:
            folder = path / name
            weights = find_weights(folder)
            if weights is not None:
                sources[name] = stack.enter_context(_open_weights(weights))
            _collect(path, name, configs, files)
        if names != [""]:
            files += [
                entry.name
                for entry in _entries(path)
                if _ROOT_FILES.fullmatch(entry.name) and entry.is_file()
            ]
        stack.pop_all()
    return FolderSource(path, sources=sources, configs=configs, files=tuple(sorted(files)))


def _files_to_open(path: Path, names: list[str]) -> Iterator[str]:
    for folder in (path / name for name in names):
        weights = find_weights(folder)
        if weights is not None:
            yield weights.relative_to(path).as_posix()
        for entry in _small_files(folder):
            if _CONFIG_NAME.fullmatch(entry.name):
                yield entry.relative_to(path).as_posix()


def _open_weights(path: Path) -> TensorSource:
    if path.suffix == ".json":
        return sharded.open_index(path)
    return torch_pickle.open_file(path) if path.suffix == ".bin" else safetensors.open_file(path)


def _component_names(path: Path, index: Mapping[str, Any] | None) -> list[str]:
    """Sub-folders to read: those of model_index.json in its order, else all, sorted."""
    if index is None:
        return [folder.name for folder in _folders(path) if _is_component(folder)]
    present = {folder.name for folder in _folders(path)}
    named = [key for key, value in index.items() if isinstance(value, list) and any(value)]
    return [name for name in named if name in present]


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, hidden entries left out, sorted, at most 2000."""
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(itertools.islice(visible, _MAX_ENTRIES))


def _folders(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.is_dir()]


def _is_component(folder: Path) -> bool:
    """Tell a component from a folder that happens to hold checkpoints."""
    if _has_config(folder):
        return find_weights(folder) is not None
    return any(re.match(_PLAIN + r"[.-]", entry.name) for entry in _entries(folder))


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _collect(path: Path, name: str, configs: dict[str, Any], files: list[str]) -> None:
    """Put a component's JSON configs into `configs` and its other small files into `files`."""
    for entry in _small_files(path / name):
        relative = entry.relative_to(path).as_posix()
        if _CONFIG_NAME.fullmatch(entry.name):
            _read_config(path, relative, configs)
        else:
            files.append(relative)


def _small_files(folder: Path) -> Iterator[Path]:
    for entry in _entries(folder):
        if entry.is_dir():
            yield from (item for item in _entries(entry) if _is_side_file(item))
        elif _is_side_file(entry):
            yield entry


def _is_side_file(entry: Path) -> bool:
    return (
        entry.is_file()
        and entry.suffix not in _WEIGHT_SUFFIXES
        and ".index." not in entry.name
        and entry.stat().st_size <= _MAX_SIDE_NBYTES
    )


def _read_config(path: Path, relative: str, configs: dict[str, Any]) -> None:
    file = path / relative
    if file.stat().st_size > _MAX_CONFIG_NBYTES:
        raise MalformedFile(f"a config of over {_MAX_CONFIG_NBYTES} bytes", path=file)
    configs[relative] = safetensors.parse_json(file.read_bytes(), file, "config")
