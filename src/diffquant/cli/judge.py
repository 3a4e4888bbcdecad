"""How `quantize` judges what it wrote: weights, and pictures by both files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffquant.cli.frame import Options, Outcome
from diffquant.cli.job import JobOutcome
from diffquant.cli.values import device_from, fell_back, prompts_from
from diffquant.cli.view_several import SeveralOutcome
from diffquant.convert.job_report import JobReport
from diffquant.convert.several import SeveralReport
from diffquant.core.report import to_json

if TYPE_CHECKING:
    from diffquant.runtime.devices import Device

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """--verify, --prompts and --device of a run.

    Attributes:
        verify: none, load, tensors or image.
        prompts: a file with one per line; None: the default ones.
        device: what encodes and draws, as `quantize --device` takes it.
    """

    verify: str
    prompts: Path | None
    device: str
    options: Options

    def output(self, job: JobReport, source: Path, out: Path) -> Outcome:
        """Judge a finished job: its weights, and with --verify image its pictures."""
        warnings = list(job.warnings)
        verdicts = [job.verdict or "pass"]
        image = None
        if self.verify == "image" and not job.dry_run:
            image, notes = self._pictures(out, source)
            verdicts.append(image["verdict"])
            warnings += notes
        failed = "fail" in verdicts
        if failed:
            warnings.append(f"{out} was written, but verification failed: do not publish it")
        return Outcome(JobOutcome(job, image), warnings, 3 if failed else 0, ok=not failed)

    def outputs(self, several: SeveralReport, source: Path) -> Outcome:
        """Judge every output of a run, as one alone is judged."""
        found = [self.output(job, source, Path(job.output)) for job in several.outputs]
        told = dict.fromkeys(several.warnings)
        for one, job in zip(found, several.outputs, strict=True):
            told |= dict.fromkeys(text for text in one.warnings if text not in job.warnings)
        results = tuple(one.result for one in found if isinstance(one.result, JobOutcome))
        code = max(one.exit_code for one in found)
        return Outcome(
            SeveralOutcome(several, results), list(told), code, ok=all(one.ok for one in found)
        )

    @functools.cached_property
    def _drawing(self) -> Device:
        """What draws: chosen once, for all outputs."""
        from diffquant.runtime.devices import Device

        # A card that is named has been found by what encodes: it is there.
        named = self.device not in ("auto", "cpu")
        return Device(self.device) if named else device_from(self.device)

    def _pictures(self, out: Path, source: Path) -> tuple[dict[str, Any], list[str]]:
        """Draw with both on the card that is named, or by `auto` on what computes: a report."""
        from diffquant.runtime.compare import DEFAULT_PROMPTS, ImageSettings, compare_pictures

        on = self._drawing
        lines = prompts_from(self.prompts) if self.prompts else DEFAULT_PROMPTS
        settings = ImageSettings(prompts=lines, device=on.name)
        report, _, notes = compare_pictures(out, source, settings, progress=self.options.bar())
        found = {**to_json(report), "device": on.name, "device_why": on.why}
        return found, [*fell_back(on), *notes]
