"""The command line on a card beside the same on the CPU: exit codes, verdicts, figures, seconds.

    python benchmarks/gpu_commands.py                 # six minutes with a card
    python benchmarks/gpu_commands.py --device cpu    # both sides on the CPU: does the script work
    python benchmarks/gpu_commands.py --only verify,compare

The demo checkpoints are quantized, drawn, judged, compared and calibrated by real commands
(command_runs.py), on both sides at once. A row is a command: exit code and seconds of both sides,
then figures, each with what it may differ by or has to reach, and why that much:

    bytes            of files that encoders write on both sides: the same
    f32 pictures     float32 without TF32 on both: sums in another order, and rounding to 8 bits;
                     45 dB is a step of 256 in every third number
    bf16 pictures    beside the CPU's float32: 5 dB below the noise floor that `verify` measures
    psnr, ssim       of `verify` and `compare`: 0.5 dB and 0.01; of the control, which is far from
                     its reference, 3 dB; of the floor, which is roundings alone, 6 dB
    placed           pictures of every --offload: those without it, number by number
    memory           what the allocator held and the context, at most the plan's peak and 15 %; at
                     most --vram where it is given
    importance       1e-3 of an entry's largest; predicted errors 2 %

A command that fails, or runs past its time, shows its last 15 lines, and the rest goes on; commands
that time is not left for are rows too. Exit 1 if anything disagrees or did not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_runs import HEAD, MIB, Bench, Ran, Row, Side, text_of
from stand_ins import prepare

EXAMPLES = Path(__file__).parents[1] / "examples"
FLUX, SD15 = EXAMPLES / "flux1-shapes", EXAMPLES / "sd15-shapes"
TYPES = {  # type -> file, and whether the card has to encode some of it
    "q4_k_s": ("q4.gguf", True),
    "nf4": ("nf4.safetensors", True),
    "int8_convrot": ("int8.safetensors", True),
    "fp8_scaled": ("fp8.safetensors", False),
}
MODELS = {  # demo checkpoint -> how it was judged when it was made, and its dB in bfloat16
    "flux1-shapes": ((), 45),
    "sd15-shapes": (("--cfg", "3", "--sampler", "ddim"), 30),
    "sdxl-shapes": (("--cfg", "3"), 30),
    "qwen-image-shapes": ((), 35),
}
PROMPTS = (
    "a small red circle on a blue background at the left",
    "a large green square on a yellow background at the top",
)
STEPS = ("--steps", "6")
WITHIN_DB = {"candidate": 0.5, "control": 3, "floor": 6}
SPARE = 16 << 20  # below what a plan says, so that it has to go down


# --- what is judged ------------------------------------------------------------------------------


def psnr_of(one: Path, other: Path) -> float | None:
    """Decibel between two PNGs, None for the same."""
    from PIL import Image

    first, second = (np.asarray(Image.open(path), np.float64) / 255 for path in (one, other))
    error = float(((first - second) ** 2).mean())
    return None if error == 0 else -10 * math.log10(error)


def file_of(side: Side, name: str) -> Path:
    """What a command made on this side, or the CPU's where it failed here: the rest goes on."""
    mine = side.folder / name
    return mine if mine.exists() else side.folder.parent / "cpu" / name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def damage(path: Path, to: Path) -> None:
    """Copy a safetensors file, rows of its fp8 weights rolled by one: finite, and wrong."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for key, spec in header.items():
        if key != "__metadata__" and spec["dtype"].startswith("F8") and len(spec["shape"]) == 2:
            first, last = (start + one for one in spec["data_offsets"])
            weight = np.frombuffer(bytes(raw[first:last]), np.uint8).reshape(spec["shape"])
            raw[first:last] = np.roll(weight, 1, 0).tobytes()
    to.write_bytes(raw)


def pictures(row: Row, name: str, least: float) -> None:
    """Judge one picture of both sides."""
    cpu, card = (side.folder / name for side in row.bench.sides)
    found = psnr_of(cpu, card)
    told = f"{text_of(found)} dB, at least {least:g}"
    row.holds("picture", told, found is None or found >= least)


def judged(row: Row, ran: Sequence[Ran]) -> None:
    """Judge what `verify` found on both sides."""
    cpu, card = (one.result for one in ran)
    row.holds(
        "verdict", f"{cpu['verdict']} and {card['verdict']}", cpu["verdict"] == card["verdict"]
    )
    row.near("relative error", cpu["tensors"]["error"], card["tensors"]["error"], 1e-9)
    one, other = cpu["image"], card["image"]
    row.near("psnr", one["psnr_db"], other["psnr_db"], 0.5)
    row.near("ssim", one["ssim"], other["ssim"], 0.01)
    row.near("floor", one["noise_floor_psnr_db"], other["noise_floor_psnr_db"], 6)
    row.near("control", one["control_psnr_db"], other["control_psnr_db"], 3)
    for side, image in zip(row.bench.sides, (one, other), strict=True):
        fails = image["control_psnr_db"] < image["min_psnr_db"]
        row.holds(f"control on {side.name}", image["control_block"], fails)
    row.told("how", other["how"])


def replayed(row: Row, how: str) -> None:
    """Judge whether steps were replayed on the card."""
    if row.bench.card:
        row.holds("graphs", how, "CUDA graph:" in how and "failed" not in how)


# --- commands ------------------------------------------------------------------------------------


def quantize(bench: Bench) -> None:
    for kind, (name, encodes) in TYPES.items():
        with bench.row(f"quantize {kind}") as row:
            lora = ("--error-lora", "{}/error.safetensors", "--rank", "8")
            extra = lora if kind == "q4_k_s" else ()
            ran = row.run(lambda s, kind=kind, name=name, extra=extra: (
                "quantize", FLUX, "-t", kind, "-o", s.folder / name, "--device", s.device, "--json",
                *(one.format(s.folder) for one in extra)))  # fmt: skip
            for file in (name, *(("error.safetensors",) if extra else ())):
                cpu, card = (sha256(side.folder / file) for side in bench.sides)
                row.holds("bytes", f"{file} {cpu} and {card}", cpu == card)
            row.holds("verdict", ran[1].result["verdict"], ran[1].result["verdict"] == "pass")
            if bench.card:
                count = [one["encoder"] for one in ran[1].result["tensors"]].count("cuda")
                row.holds("encoded on the card", f"{count} weights", count > 0 or not encodes)


def generate(bench: Bench) -> None:
    base = ("-p", PROMPTS[0], *STEPS, "--size", "128", "--json")
    for model, (options, least) in MODELS.items():
        for dtype in ("float32", "bfloat16"):
            with bench.row(f"generate {model} {dtype}") as row:
                name = f"{model}-{dtype}.png"
                ran = row.run(lambda s, m=model, o=options, n=name, d=dtype: (
                    "generate", EXAMPLES / m, *base, *o, "-o", s.folder / n, "--device", s.device,
                    "--dtype", d if s.name == "card" else "float32"))  # fmt: skip
                pictures(row, name, 45 if dtype == "float32" else least - 5)
                replayed(row, ran[1].result["graphs"]["denoise"])
    with bench.row("generate q4_k_s from a picture") as row:
        row.run(lambda s: (
            "generate", file_of(s, "q4.gguf"), "--base", FLUX, *base, "-o", s.folder / "again.png",
            "--image", file_of(s, "flux1-shapes-float32.png"), "--strength", "0.8", "--device",
            s.device, "--dtype", "float32"))  # fmt: skip
        pictures(row, "again.png", 40)  # it begins with pictures that differ already


def sides_of(bench: Bench) -> tuple[str, ...]:
    """What `verify` and `compare` draw here."""
    prompts = bench.sides[0].folder.parent / "prompts.txt"
    return ("--prompts", str(prompts), "--seeds", "0", *STEPS, "--size", "128", "--json")


def verify(bench: Bench) -> None:
    """A file that is right, with its error LoRA too, and one that is not."""
    asked = sides_of(bench)
    with bench.row("verify q4_k_s") as row:
        ran = row.run(lambda s: (
            "verify", file_of(s, "q4.gguf"), "--against", FLUX, *asked, "--device",
            s.device))  # fmt: skip
        judged(row, ran)
        replayed(row, ran[1].result["image"]["how"])
    with bench.row("verify a damaged file") as row:
        for side in bench.sides:
            damage(file_of(side, "fp8.safetensors"), side.folder / "damaged.safetensors")
        ran = row.run(lambda s: ("verify", s.folder / "damaged.safetensors", "--against", FLUX,
                                 *asked, "--device", s.device), exits=3)  # fmt: skip
        cpu, card = (one.result["image"] for one in ran)
        row.near("psnr", cpu["psnr_db"], card["psnr_db"], 3)
        row.holds("image", card["verdict"], card["verdict"] == cpu["verdict"] == "fail")
    for kind, name in (
        ("fp8", "fp8.safetensors"),
        ("int8", "int8.safetensors"),
        ("fp8", "q4.gguf"),
    ):
        with bench.row(f"verify {name} --compute {kind}") as row:
            ran = row.run(lambda s, k=kind, n=name: (
                "verify", file_of(s, n), "--against", FLUX, *asked, "--size", "256", "--device",
                s.device, "--compute", k))  # fmt: skip
            cpu, card = (one.result["image"] for one in ran)
            row.told(
                "psnr", f"{text_of(cpu['psnr_db'])} exactly, {text_of(card['psnr_db'])} on the card"
            )
            row.holds("how", card["how"], not bench.card or f"layers {kind} (" in card["how"])
    with bench.row("verify q4_k_s, --device auto") as row:
        ran = row.run(lambda s: (
            "verify", file_of(s, "q4.gguf"), "--against", FLUX, *asked,
            *(("--device", "cpu") if s.name == "cpu" else ())))  # fmt: skip
        judged(row, ran)
        found = ran[1].result
        on = f"{found['device']} ({found['device_why']})"
        row.holds("device", on, found["device"] == bench.sides[1].device)
    with bench.row("verify q4_k_s with its error LoRA") as row:
        judged(row, row.run(lambda s: (
            "verify", file_of(s, "q4.gguf"), "--against", FLUX, "--lora",
            f"{file_of(s, 'error.safetensors')}:1", *asked, "--device", s.device)))  # fmt: skip


def memory(bench: Bench) -> None:
    """Every way to place weights, a budget that is kept, and one that is refused."""
    base = ("-p", PROMPTS[0], "--steps", "4", "--size", "512", "--dtype", "float32", "--json")

    def drawn(side: Side, name: str, *more: str) -> list[object]:
        return ["generate", FLUX, *base, "-o", side.folder / name, "--device", side.device, *more]

    planned: dict[str, int] = {}
    for level in ("none", "model", "blocks", "sequential"):
        with bench.row(f"generate --offload {level}") as row:
            ran = row.run(lambda s, n=level: drawn(
                s, f"{n}.png", "--offload", n, "--decode", "whole"))  # fmt: skip
            pictures(row, f"{level}.png", 45)
            same = [psnr_of(s.folder / "none.png", s.folder / f"{level}.png") for s in bench.sides]
            row.holds("as --offload none", ", ".join(map(text_of, same)), same == [None, None])
            plans = [one.result["memory"][0]["plan"]["peak_nbytes"] for one in ran]
            planned |= {s.name: plan for s, plan in zip(bench.sides, plans, strict=True)
                        if level == "none"}  # fmt: skip
            held(row, ran[1], plans[1] * 1.15, f"plan {plans[1] / MIB:.0f}")
    with bench.row("generate --vram less than the plan") as row:
        option = {"cpu": "--ram", "card": "--vram" if bench.card else "--ram"}
        asked = {name: nbytes - SPARE for name, nbytes in planned.items()}
        ran = row.run(lambda s: drawn(s, "less.png", option[s.name], str(asked[s.name])))
        for side, one in zip(bench.sides, ran, strict=True):
            placed = one.result["memory"][0]
            rung = placed["plan"]["rung"]
            told = f"offload {rung['level']}, decode {rung['decoder']}; {placed['steps'] or 'kept'}"
            lower = (rung["level"], rung["decoder"]) != ("none", "whole")
            row.holds(f"plan on {side.name}", told, lower)
        pictures(row, "less.png", 45)
        held(row, ran[1], asked["card"], f"--vram {asked['card'] / MIB:.0f}")
    with bench.row("generate --vram too little") as row:
        none = ("100MiB", "--offload", "none")
        ran = row.run(lambda s: drawn(s, "no.png", option[s.name], *none), exits=6)
        for side, one in zip(bench.sides, ran, strict=True):
            row.holds(f"refused on {side.name}", one.last(1)[:160], "too much" in one.log)


def held(row: Row, ran: Ran, most: float, told: str) -> None:
    """Judge what a run held of the card."""
    if ran.memory:
        total = ran.memory["reserved"] + ran.memory["context"]
        parts = ", ".join(f"{name} {nbytes / MIB:.0f}" for name, nbytes in ran.memory.items())
        row.holds("memory, MiB", f"{total / MIB:.0f} ({parts}), {told}", total <= most)


def compare(bench: Bench) -> None:
    files = ("q4.gguf", "nf4.safetensors", "fp8.safetensors")
    with bench.row("compare three files") as row:
        ran = row.run(lambda s: (
            "compare", FLUX, *(file_of(s, name) for name in files), *sides_of(bench), "--metrics",
            "psnr,prompt", "--html", s.folder / "compare.html", "--csv", s.folder / "compare.csv",
            "--device", s.device))  # fmt: skip
        for one, other in zip(*(each.result["rows"] for each in ran), strict=True):
            same = one["name"] == other["name"] and one["verdict"] == other["verdict"]
            row.holds("row", f"{one['name']} {one['verdict']}, {other['verdict']}", same)
            within = {"psnr": WITHIN_DB[one["kind"]], "prompt": 0.1}
            for metric, most in within.items():
                cpu, card = (side["values"][metric]["mean"] for side in (one, other))
                row.near(f"{other['name']} {metric}", cpu, card, most)
            row.told("seconds a picture", f"{one['seconds']} and {other['seconds']}")
        count = [(s.folder / "compare.html").read_text().count("data:image/") for s in bench.sides]
        row.holds("pictures in the pages", f"{count[0]} and {count[1]}", count[0] == count[1] > 0)


def calibrate(bench: Bench) -> None:
    from diffquant.io.imatrix import read_imatrix

    prompts = bench.sides[0].folder.parent / "prompts.txt"
    asked = ("--prompts", prompts, "--steps", "3", "--size", "128", "--json")
    with bench.row("calibrate --sensitivity") as row:
        row.run(lambda s: (
            "calibrate", FLUX, *asked, "-o", s.folder / "imatrix.gguf", "--sensitivity",
            s.folder / "errors.json", "--among", "q4_k,q8_0", "--level", "latents", "--device",
            s.device))  # fmt: skip
        cpu, card = (read_imatrix(side.folder / "imatrix.gguf").entries for side in bench.sides)
        worst = max(_apart(one.values(), card[key].values()) for key, one in cpu.items())
        same = cpu.keys() == card.keys()
        row.holds("importance", f"{len(cpu)} layers, {worst:.2g} apart", same and worst <= 1e-3)
        errors = [json.loads((s.folder / "errors.json").read_text())["errors"] for s in bench.sides]
        far = {
            f"{key} {name}": abs(value / errors[1][key][name] - 1)
            for key, each in errors[0].items()
            for name, value in each.items()
        }
        key = max(far, key=far.__getitem__)
        row.holds(
            "predicted errors", f"{len(far)}, {far[key]:.2g} apart at {key}", far[key] <= 0.02
        )


def _apart(one: Any, other: Any) -> float:
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.abs(first - second).max() / np.abs(first).max())


def doctor(bench: Bench) -> None:
    with bench.row("doctor, python -m diffquant") as row:
        ran = row.run(lambda s: ("doctor", "--json"), fresh=True)
        cards = [one["name"] for one in ran[1].result["accelerators"]["found"]]
        row.holds("cards", ", ".join(cards) or "none", bool(cards) or not bench.card)
    with bench.row("doctor --bench") as row:
        ran = row.run(lambda s: ("doctor", "--bench", "--device", s.device, "--json"))
        row.told("bench", json.dumps(ran[1].result["bench"])[:600])


GROUPS = {
    one.__name__: one for one in (quantize, generate, verify, compare, memory, calibrate, doctor)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help=f"of {', '.join(GROUPS)}; quantize always runs")
    parser.add_argument("--minutes", type=float, default=6.6)
    parser.add_argument("--limit", type=float, default=90, help="seconds that a command may take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1" if options.device == "cpu" else "4")
    began = time.monotonic()
    told = prepare()
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    print(f"torch {torch.__version__}, Python {found['python']}, {options.device} beside cpu")
    print("\n".join((*told, HEAD)), flush=True)
    whole = Path(tempfile.mkdtemp(prefix="gpu_commands-"))
    try:
        (whole / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        sides = [Side("cpu", "cpu", whole / "cpu"), Side("card", options.device, whole / "card")]
        for side in sides:
            side.folder.mkdir()
        bench = Bench(sides, began + options.minutes * 60, options.limit, found, options.json)
        for name, group in GROUPS.items():
            if name == "quantize" or not options.only or name in options.only.split(","):
                group(bench)
    finally:
        shutil.rmtree(whole)
    bad = [row.name for row in bench.rows if not row.agrees]
    print(
        f"{time.monotonic() - began:.0f} s, {len(bench.rows)} commands; disagree: {bad or 'none'}"
    )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
