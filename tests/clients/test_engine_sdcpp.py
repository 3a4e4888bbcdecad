"""The sdcpp engine beside the bundled one: a GGUF of ours at SD1.5's real width, the same noise.

Weights are random, so the picture means nothing and must agree; the program computes in float16
where the bundled runtime has float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import UsageError
from diffquant.quant.types import type_named

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_it_samples_our_gguf_as_the_bundled_runtime_does(
    tmp_path: Path, client: Callable[[str], Any], random_checkpoint: Callable[..., Path]
) -> None:
    client("cyllama.sd")
    from diffquant.runtime.engines import EngineFiles, open_side
    from diffquant.runtime.request import PictureRequest

    source = random_checkpoint("sd15.checkpoint.ldm-webui-fp16")
    out = tmp_path / "sd15.gguf"
    run_job(source, out, Request("gguf", type=type_named("q8_0")))
    request = PictureRequest(
        "a red circle",
        seed=7,
        steps=2,
        cfg=1.0,
        width=128,
        height=128,
        sampler="euler",
        schedule="normal",
    )
    side = open_side("sdcpp", EngineFiles(out, base=source))
    assert side.how == "read and run by stable-diffusion.cpp"
    theirs = side.draw(request)
    with pytest.raises(UsageError, match="cannot honour rng"):
        side.draw(PictureRequest("x", rng="philox"))
    tokens = _tokenizer(tmp_path / "words")
    from diffquant.runtime.opening import open_pipeline

    opened = open_pipeline(out, base=source, added={"tokenizer": tokens})
    ours = opened.pipeline.run(request).images.numpy()
    psnr = -10 * np.log10(float(((ours - theirs) ** 2).mean()))
    print(f"sd.cpp against the bundled runtime: {psnr:.1f} dB")
    assert theirs.std() > 0.05
    assert psnr > 45  # 55.2 dB measured


def _tokenizer(folder: Path) -> Path:
    """CLIP's words, from the reference data."""
    words = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "clip_l"
    if not words.is_dir():
        pytest.skip("needs CLIP's tokenizer from the reference data")
    return words
