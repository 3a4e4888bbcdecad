"""Real-size checkpoints with random weights, made in seconds: what the GPU benchmarks read.

Names and shapes are those of published models (tests/data, the table in plan_peaks.py), or, tiny,
those of a folder in examples/. The plan, the header and the layout of every file are the package's
own; only the numbers are cheap. A chunk of Gaussian numbers (std 0.02, so that activations stay
finite through dozens of layers) is repeated all over a model, at one of VARIANTS offsets; norms are
one. A chunk of weights is encoded once per format, shape and offset, and its bytes are written
again wherever they occur: twelve billion weights are quantized in the time that writing takes.

Tokenizers have the sizes of the published vocabularies and split text into bytes, so that a prompt
of n letters is a prompt of n tokens.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from plan_peaks import FAMILIES, manifests

EXAMPLES = Path(__file__).parent.parent / "examples"
STD = 0.02
VARIANTS = 2
_TILE = 1 << 22  # numbers
_WORKERS = 16
GGUF = ("q4_k_s", "q8_0")
TAESD = "taesd.vae.diffusers"
FOLDERS = {"sd15": "unet", "sdxl": "unet", "flux1": "transformer", "qwen_image": "transformer"}


@functools.cache
def gaussian() -> np.ndarray:
    """Bytes of bfloat16 numbers (uint8), the same in every run."""
    numbers = np.random.default_rng(0).standard_normal(_TILE, np.float32) * STD
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


_ONES = np.full(1 << 16, 0x3F80, np.uint16).view(np.uint8)


def is_norm(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor multiplies what was normalized: one, where matrices are random."""
    vector = sum(length > 1 for length in shape) <= 1
    return vector and key.endswith(("weight", "scale", "gamma"))


class Random:
    """A source of bfloat16 tensors, whose bytes are made when they are read."""

    container, metadata, configs = "safetensors", {}, {}

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        from diffquant.core.tensors import TensorSpec

        self.path = Path("random.safetensors")
        self.specs = {key: TensorSpec(key, "BF16", shape) for key, shape in shapes.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())

    def read(self, key: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        spec = self.specs[key]
        first, end = rows or (0, spec.rows)
        nbytes = (end - first) * spec.row_nbytes
        found = self._tile(key, first)
        return found[:nbytes] if nbytes <= found.size else np.resize(found, nbytes)

    def _tile(self, key: str, first: int) -> np.ndarray:
        """What is repeated from a row on."""
        if is_norm(key, self.specs[key].shape):
            return _ONES
        tile = gaussian()
        at = zlib.crc32(f"{key} {first}".encode()) % VARIANTS * (tile.size // 2 // VARIANTS)
        return tile[at:]

    def pieces(self, key: str) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, bytes) of a whole tensor, without making it."""
        tile, nbytes = self._tile(key, 0), self.specs[key].nbytes
        for at in range(0, nbytes, tile.size):
            yield at, tile[: nbytes - at]

    def close(self) -> None:
        """Nothing is open."""


class Once:
    """Backends that encode a chunk once: the same rows in the same format give the same parts."""

    def __init__(self, load: Callable[..., Callable[..., Any]]) -> None:
        self._load = load
        self._made: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, codec: str, operation: str, device: str = "cpu") -> Callable[..., Any]:
        function = self._load(codec, operation, device)
        if operation == "decode":
            return function

        def once(weight: np.ndarray, stats: Any = None, **options: Any) -> Any:
            start = weight.reshape(-1)[:8].tobytes()
            named = {key: value for key, value in options.items() if key != "importance"}
            key = (codec, operation, weight.shape, start, repr(stats), repr(named))
            with self._lock:  # one thread encodes, the others wait for what it makes
                if key not in self._made:
                    self._made[key] = function(weight, stats, **options)
            return self._made[key]

        return once


@contextlib.contextmanager
def encoding_once() -> Iterator[None]:
    """The engine encodes by Once meanwhile."""
    from diffquant.convert import chunk_work

    load = chunk_work.backend
    chunk_work.backend = Once(load)
    try:
        yield
    finally:
        chunk_work.backend = load


@dataclass(frozen=True)
class Model:
    """Where the shapes of a family's parts come from, and where its files go.

    Attributes:
        family: a key of FOLDERS.
        folder: that files are written to.
        tiny: whether the shapes are those of the folder in examples/.
    """

    family: str
    folder: Path
    tiny: bool

    @property
    def example(self) -> Path:
        return EXAMPLES / f"{self.family.replace('_', '-')}-shapes"

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of a part."""
        if self.tiny:
            from diffquant.io import open_source

            place = FOLDERS[self.family] if part == "denoiser" else part
            with open_source(self.example / place) as source:
                return {key: spec.shape for key, spec in source.specs.items()}
        case = FAMILIES[self.family]
        encoders = dict(zip(("text_encoder", "text_encoder_2"), case.encoders, strict=False))
        name = {"denoiser": case.denoiser, "vae": case.vae, **encoders}[part]
        return {key: tuple(shape) for key, shape in manifests()[name].items()}

    @property
    def companions(self) -> tuple[str, ...]:
        """Parts beside the denoiser."""
        count = len(FAMILIES[self.family].encoders)
        return ("vae", "text_encoder", "text_encoder_2")[: count + 1]

    def write_companions(self) -> dict[str, Path]:
        """Write the bfloat16 parts and tokenizers: what `open_pipeline` takes as `added`."""
        found = {}
        for part in self.companions:
            found[part] = self.folder / f"{part}.safetensors"
            write_plain(found[part], self.shapes(part))
            if part == "vae":
                continue
            name = part.replace("text_encoder", "tokenizer")
            found[name] = self.folder / name
            if self.tiny:
                shutil.copytree(self.example / name, found[name])
            else:
                write_tokenizer(found[name], self.shapes(part))
        return found

    def write_tiny_vae(self) -> Path:
        """Write TAESD, which decodes with a fiftieth of the autoencoder's memory."""
        path = self.folder / "tiny_vae.safetensors"
        write_plain(path, {key: tuple(shape) for key, shape in manifests()[TAESD].items()})
        return path

    def denoiser(self, kind: str) -> Path:
        """Where the denoiser in a type is, once it was written."""
        return self.folder / f"denoiser.{'gguf' if kind in GGUF else 'safetensors'}"

    def write_denoiser(self, kind: str) -> Path:
        """Write the denoiser in a type; bf16 is not packed."""
        shapes = self.shapes("denoiser")
        path = self.denoiser(kind)
        if kind in ("bf16", "f32"):
            write_plain(path, shapes)
        else:
            write_packed(path, shapes, kind)
        return path


def write_plain(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file in bfloat16."""
    from diffquant.io import open_sink

    source = Random(shapes)
    with open_sink(path, source.specs.values(), {}, force=True) as sink:
        for key in source.specs:
            for at, data in source.pieces(key):
                sink.write(key, at, data)
        sink.commit()


def write_packed(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str) -> None:
    """Write a denoiser in a type, planned and packed as `diffquant quantize` does it."""
    from diffquant.convert.binding import bind
    from diffquant.convert.detect import detect
    from diffquant.convert.encoders.header import EncoderHeader
    from diffquant.convert.engine import run_plan
    from diffquant.convert.plan import Request, make_plan
    from diffquant.convert.surroundings import metadata_of
    from diffquant.io import open_sink
    from diffquant.quant.types import type_named

    source = Random(shapes)
    logical = bind(source)
    match = detect(logical.specs())
    container = "gguf" if kind in GGUF else "safetensors"
    plan = make_plan(logical, match, Request(container, type=type_named(kind)))
    metadata = metadata_of(plan, match, source, EncoderHeader({}))
    with encoding_once(), open_sink(path, plan.specs, metadata, force=True) as sink:
        run_plan(logical, plan, sink, workers=_WORKERS, check=False, hashes=False)
        sink.commit()


def write_tokenizer(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a tokenizer that fits the table of tokens of a text encoder.

    CLIP's marks ends of words, T5's is a Unigram, Qwen's has neither.
    """
    keys = [key for key in shapes if "embed_tokens" in key or "token_embedding" in key]
    keys += [key for key in shapes if key == "shared.weight"]
    rows = shapes[keys[0]][0]
    folder.mkdir()
    if any("relative_attention_bias" in key for key in shapes):
        (folder / "tokenizer.json").write_text(_unigram(rows))
        settings: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>"}
    else:
        clip = rows < 100_000
        special = ["<|startoftext|>", "<|endoftext|>"] if clip else ["<|im_start|>", "<|im_end|>"]
        words = _bytes()
        words += [f"{one}</w>" for one in words] if clip else []
        words += [f"filler{index}" for index in range(rows - len(words) - len(special))]
        table = {word: index for index, word in enumerate([*words, *special])}
        (folder / "vocab.json").write_text(json.dumps(table))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        settings = {"eos_token": special[1], "pad_token": special[1], "model_max_length": 77}
        rows_of = {table[one]: {"content": one, "special": True} for one in special}
        settings["added_tokens_decoder"] = {str(key): row for key, row in rows_of.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _unigram(rows: int) -> str:
    import tokenizers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    pieces += [(f"filler{index}", -9.0) for index in range(rows - len(pieces))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    text: str = backend.to_str()
    return text


def _bytes() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = 256 - len(plain)
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(rest)]
