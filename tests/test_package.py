"""The package as others install it: public names, imports, the wheel."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diffquant

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "diffquant"
FILES = sorted(SOURCE.rglob("*.py"))
PUBLIC = sorted(
    one.name
    for one in pkgutil.walk_packages(diffquant.__path__, "diffquant.")
    if not any(part.startswith("_") for part in one.name.split("."))
)
NEEDS = {"diffquant.quant.codecs.triton": "triton", "diffquant.runtime.kernels.triton": "triton"}


@pytest.mark.parametrize("name", ["diffquant", *PUBLIC])
def test_public_modules_say_what_is_public_and_have_it(name):
    for prefix, needed in NEEDS.items():
        if name.startswith(prefix):
            pytest.importorskip(needed)
    module = importlib.import_module(name)
    assert module.__doc__
    assert isinstance(module.__all__, list | tuple)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert not [entry for entry in module.__all__ if not hasattr(module, entry)]
    assert not [entry for entry in module.__all__ if re.fullmatch(r"_[^_].*", entry)]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_imports_both_inspects(path):
    found = imports(path)
    ours = any(name.startswith("diffquant.inspect") for name in found)
    assert not (ours and "inspect" in found)
    assert not any(name == "inspect" for name in found if SOURCE / "inspect" in path.parents)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_above_600_lines(path):
    assert path.read_text(encoding="utf-8").count("\n") <= 600


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling")
    pytest.importorskip("build")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"diffquant-{diffquant.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        texts = {name: file.read(name).decode() for name in names if ".dist-info/" in name}
    inside = {name for name in names if ".dist-info/" not in name}
    sources = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == sources
    assert any(name.endswith(".html.jinja") for name in inside)
    assert not [name for name in names if "test" in name]
    entry = next(text for name, text in texts.items() if name.endswith("entry_points.txt"))
    assert "diffquant = diffquant.cli:main" in entry
