"""Train the tiny demo pipelines of examples/ and judge them.

    scripts/train_demo --dry-run                           # parts, weights, megabytes
    scripts/train_demo --smoke --out /tmp/demo             # the whole path, seconds of training
    scripts/train_demo --only sd15,flux1 --minutes-per-model 4

Each model trains its autoencoder, encodes every picture once, trains the denoiser together with
its text encoders, is saved as a Diffusers folder, loaded again with diffusers, and judged.
Models share nothing but a matching autoencoder within one run, so several processes may train
different models on one GPU at once.
"""

import argparse
import copy
import json
import random
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from assemble import Parts, build, size_table
from autoencoders import encode_all, refine_decoder, train_vae
from bank import held_out, pictures, training_prompts, words
from card import write_card
from denoise_flow import FluxTask, QwenTask
from denoise_unet import UNetTask
from families import FAMILIES, Family
from folder import folder_bytes, load, pack, save
from judge import judge
from loop import Stage, device_name, fit, say, write_stages

TASKS = {"sd15": UNetTask, "sdxl": UNetTask, "flux1": FluxTask, "qwen_image": QwenTask}
LIMIT_BYTES = 10_000_000  # a demo folder has to stay small enough to live in the repository
SMOKE_STEPS, SMOKE_PICTURES = 3, 48


def main() -> int:
    """Parse the command line and train what it names."""
    options = _options()
    names = options.only.split(",") if options.only else list(FAMILIES)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        say(f"unknown model {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
        return 2
    if options.dry_run:
        for name in names:
            say("\n" + size_table(build(FAMILIES[name], words(), seed=options.seed)))
        return 0
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # cuDNN's attention backward met an illegal memory access on 80-token sequences (H100,
    # torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        options.batch = 4
    elif device.type == "cpu":
        say("no GPU found: this will not learn much (use --smoke to try the path)")
    prompts = training_prompts()
    if options.smoke:
        prompts = prompts[:: len(prompts) // SMOKE_PICTURES]
    drawn = pictures(prompts, device)
    say(f"{len(prompts)} pictures drawn, device {device}")
    vaes: dict[str, tuple[Any, Stage]] = {}
    failed = []
    for name in names:
        try:
            _train(FAMILIES[name], options, prompts, drawn, vaes)
        except Exception:  # the other models' minutes are paid for: train them, fail at the end
            traceback.print_exc()
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _train(
    family: Family,
    options: argparse.Namespace,
    prompts: list[str],
    drawn: torch.Tensor,
    vaes: dict[str, tuple[Any, Stage]],
) -> None:
    """Train, save and judge one model.

    Raises:
        RuntimeError: the folder, which is written all the same, is too large.
    """
    start = time.monotonic()
    random.seed(options.seed)
    parts = build(family, words(), seed=options.seed)
    say("\n" + size_table(parts))
    for module in parts.modules.values():
        module.to(drawn.device)
    budget = options.minutes_per_model * 60
    steps = SMOKE_STEPS if options.smoke else None
    stages: list[Stage] = []
    if options.resume is not None:
        stages = load(parts, options.resume / family.folder)
        bank = encode_all(parts.vae, drawn)
    if options.stage == "decoder":
        stages.append(refine_decoder(parts.vae, drawn, seconds=budget, max_steps=steps))
    elif options.stage == "denoiser":
        if options.resume is None:
            seconds = budget * options.vae_share
            bank, stage = _autoencoder(parts, options, drawn, vaes, seconds, steps)
            stages.append(stage)
        left = max(budget - (time.monotonic() - start), 5.0)
        stages.append(_denoiser(parts, bank, prompts, options, left, steps))
    folder = options.out / family.folder
    save(parts, folder)
    say(f"{family.name}: saved, {folder_bytes(folder) / 1e6:.2f} MB")
    try:
        _judge(family, folder, options, parts, stages)
    finally:  # whatever becomes of the verdict, the trained weights come back
        sheets = [s for s in [options.out / f"{family.folder}-samples.png"] if s.exists()]
        if options.tar is not None:
            pack(folder, sheets, options.tar / f"{family.folder}.tar")
    size = folder_bytes(folder)
    say(f"{family.name}: finished in {time.monotonic() - start:.0f} s, {size / 1e6:.2f} MB")
    if size > LIMIT_BYTES:
        raise RuntimeError(f"{family.folder} has {size} bytes, more than {LIMIT_BYTES}")


def _judge(
    family: Family,
    folder: Path,
    options: argparse.Namespace,
    parts: Parts,
    stages: list[Stage],
) -> None:
    write_stages(folder, stages)
    sheet = options.out / f"{family.folder}-samples.png"
    tested = held_out()[: 2 if options.smoke else options.judge]
    verdict = judge(family, folder, tested, sheet, steps=2 if options.smoke else family.steps)
    say(f"{family.name}: {json.dumps(asdict(verdict))}")
    write_card(parts, folder, stages=stages, verdict=verdict, seed=options.seed)


def _denoiser(
    parts: Parts,
    bank: Any,
    prompts: list[str],
    options: argparse.Namespace,
    seconds: float,
    steps: int | None,
) -> Stage:
    """Train the denoiser together with its text encoders on the encoded pictures."""
    task = TASKS[parts.family.name](parts, bank, prompts, options.batch)
    trained = [parts.denoiser, *parts.text_encoders]
    for module in trained:
        module.train()
    if options.compile:
        parts.denoiser.compile()
    report = fit(
        parts.family.name,
        [p for module in trained for p in module.parameters()],
        task.loss,
        seconds=seconds,
        lr=options.lr,
        max_steps=steps,
    )
    for module in trained:
        module.eval()
    return Stage(
        "denoiser and text encoders", report.steps, report.seconds, options.batch, device_name()
    )


def _autoencoder(
    parts: Parts,
    options: argparse.Namespace,
    drawn: torch.Tensor,
    vaes: dict[str, tuple[Any, Stage]],
    seconds: float,
    steps: int | None,
) -> tuple[Any, Stage]:
    """Train the family's autoencoder, or take an equal one trained earlier in this run."""
    config = dict(parts.family.vae[1])
    config.pop("scaling_factor", None)
    shape = json.dumps([parts.family.vae[0], config], sort_keys=True)
    known = vaes.get(shape)
    if known is not None:
        parts.vae.load_state_dict(known[0])
        bank, _ = train_vae(parts.vae, drawn, seconds=0, max_steps=0)
        return bank, known[1]
    batch = options.batch if options.smoke else 64
    bank, report = train_vae(parts.vae, drawn, seconds=seconds, max_steps=steps, batch=batch)
    stage = Stage("autoencoder", report.steps, report.seconds, batch, device_name())
    vaes[shape] = (copy.deepcopy(parts.vae.state_dict()), stage)
    return bank, stage


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(FAMILIES)}")
    parser.add_argument("--out", type=Path, default=root / "examples", help="default: examples/")
    parser.add_argument("--tar", type=Path, metavar="DIR", help="also write DIR/<name>.tar")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="start from DIR/<name>")
    parser.add_argument(
        "--stage",
        choices=["denoiser", "decoder", "none"],
        default="denoiser",
        help="denoiser: after the autoencoder, or alone with --resume; decoder: refine what the "
        "autoencoder draws, latents unchanged (--resume); none: judge and write the card",
    )
    parser.add_argument("--minutes-per-model", type=float, default=4.0)
    parser.add_argument("--vae-share", type=float, default=0.3, help="of these minutes")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=int, default=32, help="held-out prompts to score")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few pictures")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and stop")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
