"""What `generate` asks about a picture: the options, and what was typed as a Job takes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from diffquant.cli.ask_memory import SECTION as MEMORY
from diffquant.cli.values import seeds_from, size_from
from diffquant.core.errors import UsageError

__all__ = ["SECTIONS", "fields_from", "pairs_of_parts", "picture_options", "prompt_from"]

_FILE = click.Path(path_type=Path)
_MAX_PROMPT_NBYTES = 1 << 20
_SHARE: dict[str, Any] = {"type": click.FloatRange(0.0, 1.0), "metavar": "X"}

# Parameter -> its declaration, help and type; the parameter's name is the option's in a Recipe.
_OPTIONS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("-p", "--prompt"), {"help": "What to show; @FILE reads a file, - standard input."}),
    (("-n", "--negative"), {"help": "What to stay away from; needs --cfg above 1."}),
    (("--prompt-style",), {
        "type": click.Choice(["comfy", "a1111", "plain"]),
        "help": "How (weights:1.2) act: as in ComfyUI (default), as in A1111, or as plain text.",
    }),
    (("--clip-skip",), {
        "type": click.IntRange(1, 24), "metavar": "N",
        "help": "Layer of CLIP that is read, from the end: 2 skips the last.",
    }),
    (("--token-length", "text_tokens"), {
        "type": click.IntRange(8, 4096), "metavar": "N",
        "help": "Tokens of T5 or Qwen (default: the family's).",
    }),
    (("--size",), {"metavar": "WxH", "help": "Picture size (default: the model's own)."}),
    (("--seed",), {
        "metavar": "N[,N]",
        "help": "First seed, each next picture has the next; or one per picture (default: 0).",
    }),
    (("--batch",), {
        "type": click.IntRange(1, 64), "metavar": "N",
        "help": "Pictures at once (default: 1).",
    }),
    (("--rng",), {
        "type": click.Choice(["cpu", "philox"]),
        "help": "Noise as torch draws it on processors (default), or on graphics cards (A1111).",
    }),
    (("--steps",), {
        "type": click.IntRange(1, 1000), "metavar": "N",
        "help": "Sampler steps (default: 20).",
    }),
    (("--cfg",), {
        "type": click.FloatRange(0.0, 1000.0), "metavar": "X",
        "help": "Guidance strength, 1 is off (default: the family's).",
    }),
    (("--cfg-cutoff",), {**_SHARE, "help": "Share of the steps that is guided (1)."}),
    (("--cfg-rescale",), {**_SHARE, "help": "Brings contrast back after guidance (0)."}),
    (("--guidance",), {
        "type": click.FloatRange(0.0, 1000.0), "metavar": "X",
        "help": "Distilled guidance of Flux dev (3.5).",
    }),
    (("--sampler",), {"help": "Any program's name for it (default: the checkpoint's)."}),
    (("--schedule",), {"help": "karras, sgm_uniform, beta ... (default: the checkpoint's)."}),
    (("--shift",), {
        "type": click.FloatRange(0.0, 100.0, min_open=True), "metavar": "X",
        "help": "Shift of a flow's schedule (default: the checkpoint's).",
    }),
    (("--eta",), {**_SHARE, "help": "Fresh noise of ddim and tcd."}),
    (("--image",), {"type": _FILE, "help": "Picture to start from."}),
    (("--strength",), {**_SHARE, "help": "How much of --image is made anew (0.75)."}),
    (("--mask",), {"type": _FILE, "help": "Where --image is painted anew: white."}),
    (("--refiner",), {"type": _FILE, "help": "Model that finishes the picture (SDXL refiner)."}),
    (("--refiner-switch",), {**_SHARE, "help": "Share of the noise before it (0.8)."}),
    (("--hires",), {
        "type": click.FloatRange(1.0, 4.0, min_open=True), "metavar": "FACTOR",
        "help": "Enlarge the picture and run over it again.",
    }),
    (("--hires-strength",), {**_SHARE, "help": "How much of it is made anew (0.35)."}),
    (("--hires-model",), {"type": _FILE, "help": "Model of the second run."}),
)  # fmt: skip

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Picture": (
        "prompt", "negative", "output", "size", "seed", "batch", "rng", "from_image", "force",
    ),
    "Sampling": (
        "preset", "steps", "sampler", "schedule", "shift", "eta", "cfg", "cfg_cutoff",
        "cfg_rescale", "guidance",
    ),
    "Text": ("prompt_style", "clip_skip", "text_tokens"),
    "From other pictures and models": (
        "image", "strength", "mask", "refiner", "refiner_switch", "hires", "hires_strength",
        "hires_model",
    ),
    "Parts": ("base", "vae", "added", "tokenizer", "loras"),
    "Running": (
        "engine", "device", "dtype", "compile_mode", "graphs", "compute", "preview", "dry_run",
    ),
    "Memory": MEMORY,
}  # fmt: skip
_FILES = ("image", "mask", "refiner", "hires_model")  # of a Job itself


def picture_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a picture, in the order of the table."""
    for names, settings in reversed(_OPTIONS):
        function = click.option(*names, default=None, **settings)(function)
    return function


def fields_from(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, as Job.fields; options that were left out are absent.

    Raises:
        UsageError: a size, seeds or a prompt that is none.
    """
    fields = {key: value for key, value in asked.items() if value is not None}
    fields = {key: value for key, value in fields.items() if key not in _FILES}
    if "prompt" in fields:
        fields["prompt"] = prompt_from(fields["prompt"])
    if "size" in fields:
        fields["size"] = size_from(fields["size"])
    if "seed" in fields:
        seeds = seeds_from(fields["seed"], option="--seed")
        fields["seed"] = seeds[0] if len(seeds) == 1 else seeds
        if len(seeds) > 1 and fields.setdefault("batch", len(seeds)) != len(seeds):
            raise UsageError(f"--batch {fields['batch']} with {len(seeds)} seeds: give one of them")
    return fields


def prompt_from(text: str) -> str:
    """Read -p TEXT, -p @FILE or -p - (standard input); line breaks at the end are cut.

    A text that begins with @ and is no file's name is a prompt; @@ stands for @.

    Raises:
        UsageError: a file that is too large or no text.
    """
    if text.startswith("@@"):
        return text[1:]
    if text == "-":
        raw = sys.stdin.buffer.read(_MAX_PROMPT_NBYTES + 1)
        name = "standard input"
    elif text.startswith("@") and Path(text[1:]).is_file():
        name = text[1:]
        with Path(name).open("rb") as file:
            raw = file.read(_MAX_PROMPT_NBYTES + 1)
    elif text.startswith("@") and ("/" in text or text.endswith(".txt")):
        raise UsageError(f"-p {text}: there is no file {text[1:]} (-p @{text} is that text itself)")
    else:
        return text
    if len(raw) > _MAX_PROMPT_NBYTES:
        raise UsageError(f"{name}: over {_MAX_PROMPT_NBYTES} bytes, no prompt")
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8: {error}") from None


def pairs_of_parts(
    added: tuple[str, ...], vae: Path | None, tokenizer: Path | None
) -> dict[str, Path]:
    """Read --add PART=FILE, --vae and --tokenizer.

    --tokenizer DIR is a tokenizer's folder, or one that has tokenizer/, tokenizer_2/ in it.

    Raises:
        UsageError: no pair, or a part that comes twice.
    """
    pairs: list[tuple[str, Path]] = []
    for text in added:
        name, sign, path = text.partition("=")
        if not sign or not name or not path:
            raise UsageError(f"--add {text}: expected PART=FILE, such as text_encoder_2=t5.gguf")
        pairs.append((name, Path(path)))
    if vae is not None:
        pairs.append(("vae", vae))
    if tokenizer is not None:
        if not tokenizer.is_dir():
            raise UsageError(f"--tokenizer {tokenizer}: no such folder")
        inside = sorted(one for one in tokenizer.glob("tokenizer*") if one.is_dir())
        pairs += [(one.name, one) for one in inside] or [("tokenizer", tokenizer)]
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, _ in pairs if [one for one, _ in pairs].count(name) > 1)
        raise UsageError(f"{twice} is given twice")
    return found
