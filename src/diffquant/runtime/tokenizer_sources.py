"""Where the tokenizer of a text encoder comes from: the user, folders, GGUF headers, the Hub.

In this order:

1. what the user names: `--tokenizer DIR`, `--add tokenizer_2=DIR`;
2. the folder of the model, or of `--base`, where it has `tokenizer/`, `tokenizer_2/`;
3. the header of a GGUF text encoder;
4. the Hub, by the kind of the encoder: the cache of huggingface_hub first, then our own cache,
   then the network (never with HF_HUB_OFFLINE=1).

A file from the network is checked against the checksum that the listing has for it, and kept only
then. Whatever the source, a vocabulary that does not fit the encoder's table of tokens is refused:
its ids would mean other words.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffquant.convert.remember import cache_folder
from diffquant.core.errors import CheckpointError, DiffquantError, UsageError
from diffquant.io.atomic import partial_path
from diffquant.io.hub import HubTree
from diffquant.io.locations import held, locate
from diffquant.io.remote_name import HubName
from diffquant.io.remote_path import RemoteEntry, RemotePath
from diffquant.io.transport import is_offline
from diffquant.runtime.layers import QuantEmbedding
from diffquant.runtime.tokenizer_gguf import tokenizer_from_gguf
from diffquant.runtime.tokenizers import (
    TOKENIZER_FILES,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_files,
)

__all__ = ["HUB_TOKENIZERS", "HubTokenizer", "Place", "check_vocabulary", "find_tokenizer"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubTokenizer:
    """A published tokenizer, in a repository that asks for no licence to be accepted.

    Attributes:
        repo, folder: where it lies.
        needed: files without which there is none.
        also: files that are taken where they are.
    """

    repo: str
    folder: str
    needed: tuple[str, ...]
    also: tuple[str, ...] = ("tokenizer_config.json", "special_tokens_map.json")

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"/{self.folder}" if self.folder else "")


_BPE = ("vocab.json", "merges.txt")
# Kind of text encoder -> its tokenizer. OpenCLIP's is the one Stable Diffusion uses, which pads
# with "!", not the one of laion's own repositories, which pads with its end.
HUB_TOKENIZERS: Mapping[str, HubTokenizer] = {
    "clip_text": HubTokenizer("openai/clip-vit-large-patch14", "", _BPE),
    "openclip_text": HubTokenizer("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer_2", _BPE),
    "t5_encoder": HubTokenizer("google/t5-v1_1-xxl", "", ("spiece.model",)),
    "qwen2_vl_text": HubTokenizer("Qwen/Qwen2.5-VL-7B-Instruct", "", _BPE),
    "qwen3_text": HubTokenizer("Qwen/Qwen3-4B", "", _BPE),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A model or part that was opened, as a place where a tokenizer may be.

    Attributes:
        path: as the user gave it.
        metadata: its header's.
        has_encoder: whether the encoder in question comes from it.
    """

    path: Path
    metadata: Mapping[str, Any]
    has_encoder: bool


def find_tokenizer(
    encoder: str,
    kind: str,
    places: Iterable[Place],
    *,
    given: Mapping[str, Path],
    table: nn.Module,
) -> Tokenizer:
    """Find and check the tokenizer of one text encoder.

    Args:
        encoder: part name, "text_encoder" or "text_encoder_2" and so on.
        kind: what it is, a key of HUB_TOKENIZERS where one is known.
        places: in order of precedence.
        given: "tokenizer", "tokenizer_2" ... -> folder that the user names.
        table: the text encoder, whose vocabulary has to fit.

    Raises:
        UsageError: there is none; the message says what to pass.
        MalformedFile, RemoteError: there is one, and it cannot be read.
    """
    name = encoder.replace("text_encoder", "tokenizer")
    if name in given:
        return check_vocabulary(load_tokenizer(locate(given[name])), table, given[name], encoder)
    for place in places:
        folder = _folder(place, name)
        if folder is not None:
            with held(folder):
                return check_vocabulary(load_tokenizer(folder), table, folder, encoder)
        if place.has_encoder:
            found = tokenizer_from_gguf(place.metadata, place.path)
            if found is not None:
                return check_vocabulary(found, table, place.path, encoder)
    how = f"give its folder with --add {name}=DIR, or a Diffusers folder that has {name}/ as --base"
    row = HUB_TOKENIZERS.get(kind)
    if row is None:
        raise UsageError(f"the model brings no tokenizer for its {encoder} ({kind}): {how}")
    try:
        files = _from_hub(row)
    except DiffquantError as error:
        raise UsageError(
            f"the model brings no tokenizer for its {encoder}, and {row} cannot be had "
            f"({error}): {how}"
        ) from error
    return check_vocabulary(tokenizer_from_files(files, row), table, row, encoder)


def check_vocabulary(
    tokenizer: Tokenizer, encoder: nn.Module, where: object, name: str
) -> Tokenizer:
    """Return the tokenizer if its ids fit the encoder's table.

    Tables are often rounded up (T5 has 32128 rows for 32100 tokens), never to twice the size.

    Raises:
        UsageError: they do not.
    """
    rows = max(
        (one.logical_shape[0] for one in encoder.modules() if isinstance(one, QuantEmbedding)),
        default=0,
    )
    count = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    if rows and not rows // 2 < count <= rows:
        raise UsageError(
            f"{where}: a tokenizer of {count} tokens, the {name} has a table of {rows}: they do "
            "not belong together"
        )
    return tokenizer


def _folder(place: Place, name: str) -> Path | None:
    """The tokenizer's folder in a model's folder."""
    root = locate(place.path)
    if not root.is_dir():
        return None
    candidate = root / name
    return candidate if candidate.is_dir() else None


def _from_hub(row: HubTokenizer) -> Mapping[str, bytes]:
    """Files of a published tokenizer: from the cache of huggingface_hub, ours, or the network."""
    tree = HubTree(HubName(row.repo))
    with tree.held():
        files = {name: tree.local(_inside(row, name)) for name in row.needed + row.also}
        if all(files[name] is not None for name in row.needed):
            return {name: path.read_bytes() for name, path in files.items() if path is not None}
        kept = cache_folder() / "tokenizers" / row.repo.replace("/", "--") / (row.folder or "root")
        have = {name: kept / name for name in row.needed + row.also if (kept / name).is_file()}
        if all(name in have for name in row.needed):
            return {name: path.read_bytes() for name, path in have.items()}
        if is_offline():
            raise CheckpointError("HF_HUB_OFFLINE forbids the network")
        found = {}
        listing = tree.listing()
        for name in row.needed + row.also:
            entry = listing.get(_inside(row, name))
            if entry is not None:
                found[name] = _fetched(tree, entry)
            elif name in row.needed:
                raise CheckpointError(tree.missing(_inside(row, name)))
    _keep(kept, found)
    return found


def _inside(row: HubTokenizer, name: str) -> str:
    assert name in TOKENIZER_FILES
    return f"{row.folder}/{name}" if row.folder else name


def _fetched(tree: HubTree, entry: RemoteEntry) -> bytes:
    """One file, whose checksum fits."""
    raw = RemotePath(tree, entry.path).read_bytes()
    if entry.sha256:
        digest, expected = hashlib.sha256(raw).hexdigest(), entry.sha256
    else:  # git's object id: SHA-1 over a header and the content
        blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False)
        digest, expected = blob.hexdigest(), entry.blob_sha1
    if expected and digest != expected:
        raise CheckpointError(f"checksum {digest[:12]}, expected {expected[:12]}", path=entry.path)
    return raw


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    """Keep fetched files for the next run; a cache that cannot be written costs that only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in files.items():
            beside = partial_path(folder / name)
            beside.write_bytes(raw)
            beside.replace(folder / name)
    except OSError as error:
        _LOG.info("cannot keep a tokenizer in %s: %s", folder, error)
