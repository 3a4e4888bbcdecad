"""One comparison while it runs: one model in memory at a time, each drawn and measured.

The reference is drawn twice, as it is and with its denoiser in bfloat16 (the floor); the first
candidate once more with one block damaged (the control).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffquant.core.errors import UsageError
from diffquant.core.progress import Progress
from diffquant.runtime.compare_rows import drawn_row, judged_row, kept_by_control, unseen
from diffquant.runtime.compare_settings import CONTROL, FLOOR, CompareSettings
from diffquant.runtime.comparison import METRICS, Row
from diffquant.runtime.drawing import Drawn, Picture, Shots, draw_all
from diffquant.runtime.engines import EngineFiles, Side, open_rough, open_side
from diffquant.runtime.gates import GATES
from diffquant.runtime.metrics import MetricNeeds, Opened, open_judges
from diffquant.runtime.peak import watched
from diffquant.runtime.weight_errors import weigh

__all__ = ["Run"]


class Run:
    """One comparison while it runs.

    Attributes:
        exact: what the reference drew.
        beside: rows of floor and control, as far as the engine gives them.
        pictures: Row.name -> pictures.
    """

    exact: Drawn
    shots: Shots
    judges: Opened
    metrics: tuple[str, ...]
    reference_peak_mib: float | None
    engine: str
    synthetic: str

    def __init__(self, reference: Path, settings: CompareSettings, progress: Progress) -> None:
        self.reference, self.settings, self.progress = reference, settings, progress
        self.beside: list[Row] = []
        self.pictures: dict[str, tuple[Picture, ...]] = {}
        self.control: Row | None = None
        self.doubts: list[str] = []

    def draw_reference(self) -> None:
        """Draw with the reference, then with its denoiser in bfloat16."""
        settings = self.settings
        files = replace(self._common(self.reference), base=settings.base)
        with watched(settings.device) as memory:
            side = open_side(settings.engine, files)
            self.engine = side.engine
            self.synthetic = side.how if settings.synthetic else ""
            self.shots = Shots(
                settings.prompts,
                settings.seeds,
                settings.steps,
                settings.cfg,
                settings.size or side.size,
                settings.sampler,
            )
            self._open_judges()
            self.exact = draw_all(side, self.shots, "reference", self.progress)
            self.doubts += side.warnings
            del side
        self.reference_peak_mib = memory.mib
        broken = next((text for text in self.exact.failures if text), None)
        if broken is not None:
            raise UsageError(f"{self.reference}: the reference draws nothing to compare: {broken}")
        with watched(settings.device) as memory, open_rough(settings.engine, files) as rough:
            if rough is None:
                self.doubts.append(f"{self.engine} cannot be asked for bfloat16: no noise floor")
                return
            floor = draw_all(rough, self.shots, FLOOR, self.progress)
            self.doubts += rough.warnings
            del rough
        row = drawn_row(FLOOR, "floor", self.exact, floor, self.shots, self.judges)
        said = ("the reference with its denoiser in bfloat16",)
        self.beside.append(replace(row, peak_mib=memory.mib, problems=said))
        self._keep(FLOOR, floor)

    def _open_judges(self) -> None:
        settings = self.settings
        gated = (GATES[name].metric for name in settings.limits)
        wanted = (*settings.metrics, *(one for one in gated if one in METRICS))
        # A column that was asked for twice is an error of the user's, one that a gate adds is not.
        self.metrics = (
            *settings.metrics,
            *dict.fromkeys(m for m in wanted if m not in settings.metrics),
        )
        needs = MetricNeeds(
            settings.prompts,
            self.shots.size,
            settings.lpips_weights,
            settings.clip_model,
            settings.device,
        )
        self.judges = open_judges(self.metrics, needs)

    def draw_candidate(self, name: str, path: Path) -> Row:
        """Weigh and draw one candidate; the first is then damaged and drawn again."""
        settings = self.settings
        weighed = weigh(
            path,
            self.reference,
            part=settings.only,
            control="max_rel_error" in settings.limits,
            progress=self.progress,
        )
        with watched(settings.device) as memory:
            side = open_side(settings.engine, self._files(path))
            drawn = draw_all(side, self.shots, name, self.progress)
        self._keep(name, drawn)
        row = drawn_row(name, "candidate", self.exact, drawn, self.shots, self.judges)
        if self.control is None:
            self.control = self._damaged(side, row)
        row = judged_row(
            replace(row, peak_mib=memory.mib),
            weighed,
            settings.only or "denoiser",
            exact=self.exact,
            control=self.control,
            judges=self.judges,
            limits=settings.limits,
            synthetic=settings.synthetic,
        )
        # Other programs read some files themselves, and are handed others decoded: that is told.
        how = () if settings.engine == "bundled" else (side.how,)
        return replace(row, problems=(*row.problems, *how, *side.warnings))

    def _keep(self, name: str, drawn: Drawn) -> None:
        if self.settings.keep_pictures:
            self.pictures[name] = drawn.pictures

    def _common(self, model: Path) -> EngineFiles:
        settings = self.settings
        return EngineFiles(
            model,
            vae=settings.vae,
            dtype=settings.dtype,
            device=settings.device,
            synthetic=settings.synthetic,
            memory=settings.memory,
        )

    def _files(self, path: Path) -> EngineFiles:
        settings = self.settings
        if settings.only is not None:
            alone = replace(self._common(self.reference), swapped=((settings.only, path),))
            return replace(alone, base=settings.base)
        return replace(self._common(path), base=settings.base or self.reference)

    def _damaged(self, side: Side, whole: Row) -> Row:
        """Row of the control: scales of one block shuffled, or its rows where that does little."""
        row = Row(CONTROL, "control")
        for rows in (False, True):
            with side.damaged(rows=rows) as said:
                if said is None:
                    self.doubts.append(
                        f"no failing control: {side.engine} gives no access to weights"
                    )
                    return replace(row, problems=(f"{side.engine} gives no access to weights",))
                drawn = draw_all(side, self.shots, CONTROL, self.progress)
            row = drawn_row(CONTROL, "control", self.exact, drawn, self.shots, self.judges)
            row = replace(row, problems=(f"{said} in {whole.name}",))
            if not kept_by_control(row, self.settings.limits) and not unseen(row, whole):
                break
        self.beside.append(row)
        self._keep(CONTROL, drawn)
        return row

    def warnings(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """What is odd about the whole of it."""
        blind = unseen(self.control, rows[0]) if self.control is not None else ()
        told = [
            f"{METRICS[name].title} does not tell {rows[0].name} from the control "
            f"({self.control.problems[0]}): it judges nothing here"
            for name in blind
            if self.control is not None
        ]
        return tuple(dict.fromkeys((*self.doubts, *told)))
