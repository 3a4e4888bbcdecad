"""generate_elsewhere(): pictures by another engine, from the same options, saved the same way.

What the bundled runtime does beyond one run of one model is refused here by name, never left out.
"""

from __future__ import annotations

import time

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.engines import EngineFiles, open_side
from diffquant.runtime.facts_of_run import facts_of
from diffquant.runtime.job import FIELDS, Job, files_of
from diffquant.runtime.judges import defects
from diffquant.runtime.parameters import save_png
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.session import Made, numbered

__all__ = ["generate_elsewhere"]

_ELSEWHERE = ("refiner_switch", "hires", "hires_strength", "size")
_LEFT_TO_US = {
    "--image": "image",
    "--mask": "mask",
    "--refiner": "refiner",
    "--hires-model": "hires_model",
    "--preview": "preview",
    "--from-image": "recipe",
}


def generate_elsewhere(job: Job, engine: str, progress: Progress = NO_PROGRESS) -> Made:
    """Draw with another program, and save pictures that say so.

    Raises:
        DiffquantError: an option the engine has no word for, a program that is not there, a file
            it refuses.
    """
    refused = [option for option, name in _LEFT_TO_US.items() if getattr(job, name) is not None]
    refused += [f"--add {name}" for name in job.added if name != "vae"]
    refused += [f"--{name.replace('_', '-')}" for name in _ELSEWHERE[:3] if name in job.fields]
    if job.preset not in (None, "auto", "none"):
        refused.append("--preset")
    if refused:
        raise UsageError(f"--engine {engine} takes no {', '.join(refused)}")
    dtype = "float32" if job.dtype == "auto" else job.dtype
    if engine == "sdcpp" and job.dtype != "auto":
        raise UsageError("--engine sdcpp computes in its own types: leave --dtype out")
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    progress.start("load", 1, "part")
    vae = job.added.get("vae")
    side = open_side(engine, EngineFiles(job.model, job.base, vae, job.loras, dtype, job.device))
    progress.stop()
    seconds["load"] = round(time.perf_counter() - started, 3)
    width, height = job.fields.get("size") or side.size
    direct = {
        name: job.fields[name] for name in FIELDS if name in job.fields and name not in _ELSEWHERE
    }
    request = PictureRequest(**direct, width=width, height=height)
    started = time.perf_counter()
    progress.start("draw", request.steps, "step")
    pictures = side.draw(request, lambda _done, _total: progress.advance(1))
    progress.stop()
    seconds["draw"] = round(time.perf_counter() - started, 3)
    facts = facts_of(
        request,
        {},
        files_of(job),
        sampler=request.sampler or "",
        cfg=request.cfg if request.cfg is not None else 0.0,
        dtype=dtype,
        preset="none",
    )
    facts |= {"engine": side.engine, "how": side.how, "cfg": request.cfg}
    facts["sampler"] = request.sampler
    if engine == "sdcpp":
        del facts["dtype"]  # it computes in types of its own
    paths = numbered(job.output, len(pictures))
    warnings = [f"{side.engine}: {side.how}; no preset is looked for", *side.warnings]
    embedded = []
    for path, picture, seed in zip(paths, pictures, request.seeds, strict=True):
        warnings += [f"{path.name} looks {word}" for word in defects(picture)]
        embedded.append({**facts, "seed": seed})
        save_png(path, picture, embedded[-1])
    return Made(paths, tuple(embedded), (), (), None, seconds, tuple(warnings))
