"""`diffquant convert SRC OUT`: dtype, parts, folder and single file, without quantizing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, run, threads
from diffquant.cli.job import render_job, resumable
from diffquant.cli.merging import lora_options, loras_from
from diffquant.cli.values import bytes_from, header_pairs
from diffquant.convert.adapters import Adapter
from diffquant.convert.composed import AddedPart
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import merging
from diffquant.convert.plan import Request
from diffquant.convert.vae_half import HALF_MAX, Scaled, half_safe_factors
from diffquant.core.errors import UsageError

__all__ = ["command"]


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path), required=False, metavar="[OUTPUT]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File or folder to write.")
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast floating point tensors."
)
@click.option(
    "--arch",
    default="",
    metavar="NAME",
    help="Take the source for this architecture; `generic` keeps all names as they are.",
)
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Write only this part.")
@click.option(
    "--add-vae", type=click.Path(path_type=Path), metavar="FILE", help="Take the VAE of FILE."
)
@click.option(
    "--add",
    "added",
    multiple=True,
    metavar="PART=FILE",
    help="Take this part of FILE, e.g. text_encoder=clip_l.safetensors.",
)
@click.option(
    "--use-ema/--strip-ema",
    default=False,
    help="Write the moving averages in place of the weights, or leave them out (default).",
)
@click.option(
    "--fix",
    type=click.Choice(["vae-fp16"]),
    help="vae-fp16: measure whether the VAE overflows in half precision; rescale it if it does.",
)
@click.option(
    "--metadata",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="Write this header pair too; KEY= removes one that the source has.",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Cut safetensors files above this size into shards with an index, e.g. 5GB.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Folder to take configs from.")
@lora_options
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@resumable
@threads
@common
def command(
    source: Path,
    target: Path | None,
    output: Path | None,
    dtype: str | None,
    arch: str,
    parts: tuple[str, ...],
    add_vae: Path | None,
    added: tuple[str, ...],
    use_ema: bool,
    fix: str | None,
    pairs: tuple[str, ...],
    max_shard_size: str | None,
    base: Path | None,
    loras: tuple[str, ...],
    te_scale: float,
    allow_missing: bool,
    dry_run: bool,
    force: bool,
    resume: bool,
    options: Options,
) -> None:
    """Convert SOURCE between a single file and a Diffusers folder, extract parts, change dtype.

    Without --dtype every tensor keeps its bytes. Quantized weights stay packed where they can.
    """
    if (target is None) == (output is None):
        raise click.UsageError("give one file or folder to write: as OUTPUT, or with -o")
    written = output or target
    assert written is not None

    def work() -> Outcome:
        told: list[str] = []
        parts_added = _added(add_vae, added)
        vae_source = next((one.path for one in parts_added if one.name == "vae"), source)
        request = Request(
            container=container_for(written),
            dtype=dtype,
            parts=parts,
            arch=arch,
            use_ema=use_ema,
            added=parts_added,
            pairs=header_pairs(pairs),
            changes=_half_safe(vae_source, told) if fix else {},
            shard_nbytes=bytes_from(max_shard_size, "--max-shard-size") if max_shard_size else 0,
        )
        given = loras_from(loras, te_scale)
        with merging(source, given, arch=arch, allow_missing=allow_missing) as merge:
            report = run_job(
                source,
                written,
                merge.into(request),
                base=base,
                force=force,
                dry_run=dry_run,
                workers=options.threads,
                resume=resume,
                progress=options.bar(),
                beside=merge.paths,
            )
            report = merge.told(report)
        if fix and not dry_run:
            told.append(_after(written, report))
        report = replace(report, notes=(*report.notes, *told))
        return Outcome(report, report.warnings)

    def render(report: JobReport) -> None:
        render_job(report, verbose=options.verbose > 0)

    run("convert", options, work, render)


def _half_safe(source: Path, told: list[str]) -> dict[str, dict[str, tuple[Adapter, ...]]]:
    """What to multiply the VAE's weights by, measured on the source; what was found is told."""
    from diffquant.runtime.vae_range import vae_range

    found = vae_range(source)
    reach = f"VAE: {found.worst} reaches {found.peak:.4g} (float16 ends at {HALF_MAX:.0f})"
    factors = half_safe_factors(found.shapes, found.peaks)
    if not factors:
        told.append(f"{reach}: nothing to mend")
        return {}
    told.append(f"{reach}: {len(factors)} tensors are scaled by powers of two")
    changes: dict[str, tuple[Adapter, ...]] = {k: (Scaled(f),) for k, f in factors.items()}
    return {"vae": changes}


def _after(written: Path, report: JobReport) -> str:
    """The same measurement on what was written."""
    from diffquant.runtime.vae_range import vae_range

    found = vae_range(report.output or written)
    alike = "the same" if found.half_psnr_db is None else f"{found.half_psnr_db:.1f} dB alike"
    held = "in half precision pictures are " + alike if found.half_finite else "it still overflows"
    return f"VAE as written: {found.worst} reaches {found.peak:.4g}, {held}"


def _added(vae: Path | None, pairs: tuple[str, ...]) -> tuple[AddedPart, ...]:
    """Parts of other files.

    Raises:
        UsageError: not PART=FILE, or a part named twice.
    """
    found = {"vae": AddedPart("vae", vae)} if vae is not None else {}
    for text in pairs:
        name, sign, path = text.partition("=")
        if not sign or not path:
            raise UsageError(f"--add {text}: expected PART=FILE, e.g. vae=ae.safetensors")
        if name in found:
            raise UsageError(f"--add {name}: given twice")
        found[name] = AddedPart(name, Path(path))
    return tuple(found.values())
