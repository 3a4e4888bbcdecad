"""Jobs handed to Ray: a cluster of this machine that lives as long as the batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffquant.publish.batch import run_batch

pytest.importorskip("ray", reason="needs diffquant[ray]")

EXAMPLES = Path(__file__).parents[2] / "examples"
UNET = EXAMPLES / "sd15-shapes" / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_makes_the_same_bytes_and_a_failing_task_stops_no_other(tmp_path):
    shutil.copy(UNET, tmp_path / "unet.safetensors")
    plan = tmp_path / "plan.toml"
    text = '[[model]]\nsource = "unet.safetensors"\ntypes = ["q8_0", "f16"]\n'
    text += '[[model]]\nsource = "unet.safetensors"\ntypes = "bf16"\n'
    for name in ("by-ray", "by-processes"):
        plan.write_text(f'output = "{name}"\n{text}')
        report = run_batch(plan, ray="local" if name == "by-ray" else None)
        assert [row.result for row in report.outputs] == ["written"] * 3
    files = [one for one in (tmp_path / "by-processes").iterdir() if one.is_file()]
    assert len(files) == 3
    for one in files:
        assert (tmp_path / "by-ray" / one.name).read_bytes() == one.read_bytes()
    plan.write_text(f'output = "by-ray"\n{text}')
    again = run_batch(plan, ray="local")
    assert [row.result for row in again.outputs] == ["done before"] * 3
    files[0].unlink()
    (tmp_path / "by-ray" / "unet-Q8_0.gguf").unlink()
    (tmp_path / "by-ray" / ".unet-Q8_0.gguf.resume").mkdir()  # the task cannot write there
    (tmp_path / "by-ray" / "unet-BF16.gguf").unlink()
    report = run_batch(plan, ray="local")
    assert [row.result for row in report.outputs] == ["failed", "done before", "written"]
    assert report.exit_code == 1
    assert ".resume" in report.outputs[0].message
