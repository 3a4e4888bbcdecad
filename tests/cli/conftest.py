"""Commands run in this process; subprocesses only where a process is what is tested."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from diffquant.cli.main import cli


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def result(self) -> Any:
        assert self.json["ok"], self.json
        return self.json["result"]


@pytest.fixture
def command(monkeypatch, tmp_path) -> Callable[..., Ran]:
    """Run `diffquant ARGS...`: exit code, stdout, stderr. Nothing ever shows a traceback."""
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / ".cache"))
    monkeypatch.delenv("DIFFQUANT_DEBUG", raising=False)
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*args: object) -> Ran:
        found = CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="diffquant")
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert "Traceback" not in found.stderr
        assert "internal error" not in found.stderr
        assert "\x1b" not in found.output
        return Ran(found.exit_code, found.stdout, found.stderr)

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of demo checkpoints."""
    return Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def unet(examples) -> Path:
    """A denoiser in a file of its own."""
    return examples / "sd15-shapes" / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def gguf_file(examples, tmp_path_factory) -> Path:
    """flux1-shapes as q4_k_s."""
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.quant.types import type_named

    path = tmp_path_factory.mktemp("gguf") / "flux.gguf"
    run_job(examples / "flux1-shapes", path, Request("gguf", type=type_named("q4_k_s")))
    return path
