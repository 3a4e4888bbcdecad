"""The command as a program: help, version, completion, pipes, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diffquant import __version__
from diffquant.cli.lora import LORA_COMMANDS
from diffquant.cli.main import COMMANDS

LOADED = """
import sys
sys.argv = ["diffquant", *sys.argv[1:]]
import diffquant, diffquant.inspect, diffquant.cli
try:
    diffquant.cli.main()
except SystemExit as error:
    assert not error.code, error.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def process(*args, **options):
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("flag", ["--version", "--help", "-h"])
def test_the_program_introduces_itself(command, flag):
    ran = command(flag)
    assert ran.code == 0
    assert ran.err == ""
    if flag == "--version":
        assert ran.out == f"diffquant {__version__}\n"
    else:
        assert all(f"  {name}" in ran.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command, name):
    ran = command(name, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: diffquant {name}")
    if name not in ("completion", "lora"):
        assert all(flag in ran.out for flag in ("--json", "-q", "-v", "--no-progress"))


@pytest.mark.parametrize("name", LORA_COMMANDS)
def test_every_lora_command_has_help(command, name):
    ran = command("lora", name, "--help")
    assert ran.code == 0
    assert f"lora {name}" in ran.out.splitlines()[0]
    assert all(flag in ran.out for flag in ("--json", "-q", "-v", "--no-progress"))


def test_no_arguments_show_the_overview(command):
    ran = command()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


@pytest.mark.parametrize("args", [("frobnicate",), ("inspect",), ("inspect", "--frob", "x")])
def test_wrong_usage_is_two_and_goes_to_stderr(command, args):
    ran = command(*args)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("Usage: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(command, shell):
    ran = command("completion", shell)
    assert ran.code == 0
    assert "_DIFFQUANT_COMPLETE" in ran.out


def test_completion_of_an_unknown_shell_is_a_usage_error(command):
    ran = command("completion", "tcsh")
    assert ran.code == 2
    assert "'bash', 'zsh', 'fish'" in ran.err


def test_formats_lists_both_tables(command):
    from diffquant.quant.formats import FORMATS
    from diffquant.quant.types import TYPES

    shown = command("formats")
    assert shown.code == 0
    assert all(name in shown.out for name in (*TYPES, *FORMATS))
    result = command("formats", "--json").result
    assert [row["name"] for row in result["types"]] == list(TYPES)
    assert [row["name"] for row in result["formats"]] == list(FORMATS)
    q4 = next(row for row in result["types"] if row["name"] == "q4_k_s")
    assert q4["containers"] == ["gguf"]
    assert q4["bits"] == 4.5


def test_python_m_is_the_same_program():
    ran = process("-m", "diffquant", "--version")
    assert (ran.returncode, ran.stdout) == (0, f"diffquant {__version__}\n")


def test_the_overview_imports_no_numbers():
    """It is read off a table: a hundredth of a second, and no command's module."""
    ran = process("-c", LOADED, "--help")
    assert ran.returncode == 0, ran.stderr
    assert not {"numpy", "psutil", "torch", "numba"} & set(ran.stderr.split())


@pytest.mark.parametrize("what", ["safetensors", "gguf", "folder"])
def test_inspect_imports_neither_torch_nor_numba(examples, unet, gguf_file, what):
    path = {"safetensors": unet, "gguf": gguf_file, "folder": examples / "sd15-shapes"}[what]
    ran = process("-c", LOADED, "inspect", path)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stderr.split())
    assert "diffquant" in loaded
    assert not loaded & {"torch", "numba", "triton", "gguf", "jinja2", "rich", "tqdm", "PIL",
                         "matplotlib", "skimage", "huggingface_hub", "transformers"}  # fmt: skip


@pytest.mark.parametrize("what", ["safetensors", "gguf"])
def test_an_audit_imports_neither_torch_nor_numba(unet, gguf_file, what):
    path = {"safetensors": unet, "gguf": gguf_file}[what]
    ran = process("-c", LOADED, "inspect", "--audit", "--full", path)
    assert ran.returncode == 0, ran.stderr
    assert "0 violations" in ran.stdout
    loaded = set(ran.stderr.split())
    assert "diffquant" in loaded
    assert not loaded & {"torch", "numba", "triton", "gguf", "tqdm"}


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("args", [["formats"], ["inspect", "--json"], ["--help"]])
def test_a_reader_that_left_is_no_error(examples, args):
    read, write = os.pipe()
    os.close(read)
    path = [str(examples / "sd15-shapes")] if args[0] == "inspect" else []
    ran = subprocess.run(
        [sys.executable, "-m", "diffquant", *args, *path],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert ran.stderr == ""
    assert ran.returncode == (1 if args == ["--help"] else 0)  # click itself answers --help


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals of POSIX")
@pytest.mark.parametrize("flags", [[], ["-q"], ["--no-progress"]])
def test_progress_goes_to_a_terminal_on_stderr_only(examples, tmp_path, flags):
    import fcntl
    import json
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    target = ["-o", str(tmp_path / "a.gguf"), "-t", "q8_0", "--json", *flags]
    with subprocess.Popen(
        [sys.executable, "-m", "diffquant", "quantize", str(examples / "flux1-shapes"), *target],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "NO_COLOR": "1"},
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # Linux says EIO when the other side is closed
                break
            if not data:
                break
            shown += data
        out = child.stdout.read()
    os.close(ours)
    assert child.returncode == 0
    assert json.loads(out)["ok"]
    assert (b"quantize:" in shown) == (not flags)
    assert b"\x1b[3" not in shown  # no colour; the bar moves its cursor


def test_nothing_is_coloured_even_for_a_terminal_without_no_color(command, unet):
    assert "\x1b" not in command("inspect", unet).out
