"""compare_pictures(): the image level. Both sides generate the same prompts and seeds in float32.

Both run in the same engine, so that a file is judged in the program that will load it. Squared
error is pooled over all pairs. Beside it stand the noise floor (the source's denoiser in bfloat16
against itself in float32) and a control that must fail (control.py): the candidate with one block
damaged; engines that cannot be asked for either say so. A picture that is black, flat, noise or
not finite fails, unless the source draws it no better: then the prompt judges nothing, and the
verdict is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.comparison import Value
from diffquant.runtime.compute import Mode
from diffquant.runtime.engines import EngineFiles, Side, open_side
from diffquant.runtime.gates import GATES, GateResult, judge_gate
from diffquant.runtime.judges import Pair, Pooled, defects, ssim
from diffquant.runtime.memory.budget import Asked
from diffquant.runtime.metrics import MetricNeeds, Opened, open_judges
from diffquant.runtime.metrics.values import value_of
from diffquant.runtime.request import PictureRequest

__all__ = [
    "DEFAULT_PROMPTS",
    "ImageReport",
    "ImageSettings",
    "Pictures",
    "Reference",
    "compare_pictures",
    "make_reference",
]

DEFAULT_PROMPTS = ("a photo of a red fox in the snow", "a bowl of fruit on a wooden table")


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What is generated on both sides.

    Attributes:
        prompts, seeds: every prompt with every seed.
        steps, cfg, guidance, sampler, size: None takes the model's defaults.
        min_psnr: gate in dB; also what the control must stay below.
        loras: (file, weight) attached to the candidate, and not to its source.
        engine: program that draws both sides, a key of ENGINES.
        limits: further gates on pictures: key of GATES -> limit.
        lpips_weights: as metrics/lpips.py takes it, None: where torchvision keeps its own.
        synthetic: judge the denoisers alone, as runtime/synthetic.py draws with them.
        compute: what the candidate's denoiser multiplies in; its source's is computed exactly.
        only: part that the candidate is, everything else is its source's; "" for a whole model.
        memory: what may be taken of the device's and the host's.
    """

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 12
    cfg: float | None = None
    guidance: float | None = None
    sampler: str | None = None
    size: tuple[int, int] | None = None
    min_psnr: float = 25.0
    device: str = "cpu"
    dtype: str = "float32"
    loras: tuple[tuple[Path, float], ...] = ()
    engine: str = "bundled"
    compute: Mode = "exact"
    limits: Mapping[str, float] = field(default_factory=dict)
    lpips_weights: Path | None = None
    synthetic: bool = False
    only: str = ""
    memory: Asked = field(default_factory=Asked)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that the further gates need, each once."""
        return tuple(dict.fromkeys(GATES[name].metric for name in self.limits))


@dataclass(frozen=True, slots=True)
class ImageReport:
    """Pictures compared; see the module docstring.

    Attributes:
        control_block: what the control damaged, or why there was none.
        engine: the program that drew, with its version.
        how: who read the candidate, the program or diffquant for it.
        gates: the further gates, each with its value and its control's.
        metrics: METRICS key -> value, of those that gates need.
        synthetic: pictures are previews of latents drawn from random text; `how` says of which.
    """

    verdict: str
    psnr_db: float | None
    identical: bool
    interval_db: tuple[float, float] | None
    ssim: float
    worst_psnr_db: float | None
    noise_floor_psnr_db: float | None
    control_psnr_db: float | None
    control_block: str
    min_psnr_db: float
    pairs: tuple[Pair, ...]
    reference: str
    candidate: str
    size: tuple[int, int]
    steps: int
    problems: tuple[str, ...]
    engine: str = ""
    how: str = ""
    gates: tuple[GateResult, ...] = ()
    metrics: Mapping[str, Value] = field(default_factory=dict)
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures themselves, for grids and pages; not part of any JSON."""

    reference: tuple[NDArray[np.float32], ...]
    candidate: tuple[NDArray[np.float32], ...]


def compare_pictures(
    candidate: Path,
    against: Path,
    settings: ImageSettings,
    *,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
    reference: Reference | None = None,
) -> tuple[ImageReport, Pictures, tuple[str, ...]]:
    """Generate with both sides and judge; `reference` reuses what `make_reference` returned."""
    if reference is None:
        reference = make_reference(against, settings, base=base, vae=vae, progress=progress)
    settings = replace(settings, size=reference.size)
    files = EngineFiles(
        against if settings.only else candidate,
        base if settings.only else base or against,
        vae,
        settings.loras,
        settings.dtype,
        settings.device,
        synthetic=settings.synthetic,
        compute=settings.compute,
        memory=settings.memory,
        swapped=((settings.only, candidate),) if settings.only else (),
    )
    needs = MetricNeeds(
        settings.prompts,
        reference.size,
        lpips_weights=settings.lpips_weights,
        device=settings.device,
    )
    judges = open_judges(settings.metrics, needs)
    mine = open_side(settings.engine, files)
    pictures = _generate(mine, settings, "candidate", progress)
    one = replace(settings, prompts=settings.prompts[:2], seeds=settings.seeds[:1])
    stride = len(settings.seeds)
    control = _control(reference, mine, one, stride, judges, progress, rows=False)
    if control.escapes(settings):
        control = _control(reference, mine, one, stride, judges, progress, rows=True)
    report = _judge(reference, pictures, control, settings, judges, str(candidate), str(against))
    report = replace(report, engine=mine.engine, how=mine.how)
    return report, Pictures(reference.pictures, pictures), mine.warnings


@dataclass(frozen=True, slots=True)
class _Control:
    """What the damaged copy reached, what was damaged, and whether anything could be."""

    psnr_db: float | None
    block: str
    ran: bool = True
    values: Mapping[str, Value] = field(default_factory=dict)

    def escapes(self, settings: ImageSettings) -> bool:
        """Whether some gate lets the damage pass."""
        if not self.ran:
            return False
        kept = [self.psnr_db is None or self.psnr_db >= settings.min_psnr]
        for name, limit in settings.limits.items():
            value = self.values.get(GATES[name].metric)
            if value is not None:
                kept.append(value.mean is None or GATES[name].keeps(value.mean, limit))
        return any(kept)


def _control(
    reference: Reference,
    mine: Side,
    settings: ImageSettings,
    stride: int,
    judges: Opened,
    progress: Progress,
    *,
    rows: bool,
) -> _Control:
    """Generate with one block damaged; `stride` is how many pictures the reference has a prompt."""
    pooled = Pooled()
    with mine.damaged(rows=rows) as said:
        if said is None:
            return _Control(None, f"{mine.engine} gives no access to weights", ran=False)
        pictures = _generate(mine, settings, "control", progress)
    exact = reference.pictures[::stride][: len(pictures)]
    for one, other in zip(exact, pictures, strict=True):
        pooled.add(one, other)
    values = _values(judges, [(prompt, 0) for prompt in settings.prompts], exact, pictures)
    return _Control(pooled.psnr_db, said, values=values)


def _values(
    judges: Opened,
    named: Sequence[tuple[str, int]],
    exact: Sequence[NDArray[np.float32]],
    pictures: Sequence[NDArray[np.float32]],
) -> dict[str, Value]:
    """Every opened metric over all pairs; `named` has the prompt and seed of each."""
    each = [
        judges.judge(one, other, prompt)
        for (prompt, _), one, other in zip(named, exact, pictures, strict=True)
    ]
    return {name: value_of(name, [pair[name] for pair in each]) for name in judges.judges}


@dataclass(frozen=True, slots=True)
class Reference:
    """The source's pictures and its noise floor, generated once for any number of candidates."""

    pictures: tuple[NDArray[np.float32], ...]
    noise_floor_psnr_db: float | None
    size: tuple[int, int]


def make_reference(
    against: Path,
    settings: ImageSettings,
    *,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Reference:
    """Generate with the source in float32, and again with its denoiser in bfloat16."""
    files = EngineFiles(
        against,
        base,
        vae,
        (),
        settings.dtype,
        settings.device,
        synthetic=settings.synthetic,
        memory=settings.memory,
    )
    source = open_side(settings.engine, files)
    settings = replace(settings, size=settings.size or source.size)
    assert settings.size is not None
    pictures = _generate(source, settings, "reference", progress)
    pooled = Pooled()
    with source.rough() as rough:
        if rough is None:
            return Reference(pictures, None, settings.size)
        for exact, other in zip(
            pictures, _generate(rough, settings, "noise floor", progress), strict=True
        ):
            pooled.add(exact, other)
    return Reference(pictures, pooled.psnr_db, settings.size)


def _generate(
    side: Side, settings: ImageSettings, label: str, progress: Progress
) -> tuple[NDArray[np.float32], ...]:
    """One picture per prompt and seed, prompts outermost."""
    width, height = settings.size or side.size
    pictures = []
    progress.start(label, len(settings.prompts) * len(settings.seeds) * settings.steps, "step")
    for prompt in settings.prompts:
        for seed in settings.seeds:
            request = PictureRequest(
                prompt,
                seed=seed,
                steps=settings.steps,
                cfg=settings.cfg,
                guidance=settings.guidance,
                sampler=settings.sampler,
                width=width,
                height=height,
            )
            made = side.draw(request, lambda _done, _total: progress.advance(1))
            pictures.append(made[0])
    progress.stop()
    return tuple(pictures)


def _judge(
    reference: Reference,
    pictures: Sequence[NDArray[np.float32]],
    control: _Control,
    settings: ImageSettings,
    judges: Opened,
    candidate: str,
    against: str,
) -> ImageReport:
    pooled = Pooled()
    named = [(prompt, seed) for prompt in settings.prompts for seed in settings.seeds]
    pairs: list[Pair] = []
    failures: list[str] = []
    doubts: list[str] = []
    for (prompt, seed), exact, other in zip(named, reference.pictures, pictures, strict=True):
        one = Pooled()
        one.add(exact, other)
        pooled.add(exact, other)
        found = defects(other)
        if settings.synthetic:  # a preview of random text may well be flat or noise
            found = tuple(one for one in found if one == "not finite")
        pairs.append(Pair(prompt, seed, one.psnr_db, ssim(exact, other), found))
        if found:
            told = f"{prompt!r} seed {seed}: {', '.join(found)}"
            shared = set(found) <= set(defects(exact))
            (doubts if shared else failures).append(
                f"{told}, as the source's own: use another prompt" if shared else told
            )
    identical = pooled.squared == 0
    gate, value = settings.min_psnr, pooled.psnr_db
    if not identical and not (value is not None and value >= gate):
        failures.append(f"psnr {value:.2f} dB is below the gate of {gate:g} dB")
    if not control.ran:
        doubts.append(f"no failing control: {control.block}")
    elif control.psnr_db is None or not control.psnr_db < gate:
        reached = "identity" if control.psnr_db is None else f"{control.psnr_db:.2f} dB"
        failures.append(f"the control ({control.block}) reached {reached}: this gate cannot fail")
    values = _values(judges, named, reference.pictures, pictures)
    gates = tuple(
        judge_gate(
            name,
            limit,
            values.get(GATES[name].metric),
            control=control.values.get(GATES[name].metric) if control.ran else None,
            damage=control.block,
            missing=judges.missing.get(GATES[name].metric, ""),
        )
        for name, limit in settings.limits.items()
    )
    failures += [one.why for one in gates if one.verdict == "fail"]
    doubts += [one.why for one in gates if one.verdict == "warn"]
    return ImageReport(
        verdict="fail" if failures else "warn" if doubts else "pass",
        psnr_db=value,
        identical=identical,
        interval_db=pooled.interval_db(),
        ssim=float(np.mean([pair.ssim for pair in pairs])),
        worst_psnr_db=min((p.psnr_db for p in pairs if p.psnr_db is not None), default=None),
        noise_floor_psnr_db=reference.noise_floor_psnr_db,
        control_psnr_db=control.psnr_db,
        control_block=control.block,
        min_psnr_db=gate,
        pairs=tuple(pairs),
        reference=against,
        candidate=candidate,
        size=reference.size,
        steps=settings.steps,
        problems=(*failures, *doubts),
        gates=gates,
        metrics=values,
        synthetic=settings.synthetic,
    )
