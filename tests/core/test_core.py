import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffquant.core import errors
from diffquant.core.dtypes import GGML_IDS, STORAGE, storage, storage_nbytes
from diffquant.core.errors import UnknownFormat, UnsupportedDtype, UnsupportedShape, shorten
from diffquant.core.failures import explain
from diffquant.core.report import envelope, to_json
from diffquant.core.tensors import TensorSpec


def test_the_drawn_error_tree_is_the_real_one():
    drawn = {
        word
        for line in errors.__doc__.splitlines()
        for word in line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if word in errors.__all__
    }
    real = {
        name
        for name in errors.__all__
        if isinstance(getattr(errors, name), type)
        and issubclass(getattr(errors, name), errors.DiffquantError)
    }
    assert real <= drawn | {"DiffquantError"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("CheckpointError", 1),
        ("UsageError", 2),
        ("VerificationError", 3),
        ("UnknownArchitecture", 4),
        ("UnknownFormat", 4),
        ("UnsafePickle", 5),
        ("ResourceError", 6),
    ],
)
def test_exit_codes(name, code):
    assert getattr(errors, name).exit_code == code


def test_an_unknown_name_lists_the_known_and_the_closest_whatever_its_case():
    error = UnknownFormat("Q4_K", ["q4_k_s", "nf4"], what="type")
    assert "did you mean 'q4_k_s'" in str(error)
    assert "nf4" in str(error)


def test_shorten_counts_what_it_leaves_out():
    assert shorten("abcdefg", 3) == "a, b, c and 4 more"
    assert shorten("ab") == "a, b"


@pytest.mark.oracle
def test_ggml_sizes_are_those_of_gguf():
    constants = pytest.importorskip("gguf.constants")
    for kind, (elements, nbytes) in constants.GGML_QUANT_SIZES.items():
        row = GGML_IDS[int(kind)]
        assert (row.name, row.block_size, row.block_nbytes) == (kind.name, elements, nbytes)


@pytest.mark.oracle
def test_safetensors_knows_every_dtype_that_says_so(tmp_path):
    safe = pytest.importorskip("safetensors")
    for row in STORAGE.values():
        if not row.safetensors:
            continue
        header = json.dumps(
            {"x": {"dtype": row.name, "shape": [2], "data_offsets": [0, 2 * row.block_nbytes]}}
        ).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * row.block_nbytes))
        with safe.safe_open(path, "np") as file:
            assert list(file.keys()) == ["x"]


def test_block_sizes_follow_from_shapes():
    assert storage_nbytes("Q4_K", (3, 512)) == 3 * 2 * 144
    assert storage_nbytes("F32", ()) == 4
    assert storage_nbytes("BF16", (0, 7)) == 0
    with pytest.raises(UnsupportedShape, match="rows of 100 elements"):
        storage_nbytes("Q8_0", (4, 100))
    with pytest.raises(UnsupportedDtype, match="F7"):
        storage("F7")


def test_rows_are_slices_of_the_first_dimension():
    assert TensorSpec("w", "F16", (4, 3, 2)).rows == 4
    assert TensorSpec("w", "F16", (4, 3, 2)).row_nbytes == 12
    assert TensorSpec("b", "F16", (4,)).rows == 1
    assert TensorSpec("s", "F32", ()).row_nbytes == 4


def test_reports_become_json_without_nan():
    @dataclass(frozen=True)
    class Report:
        path: Path
        value: float
        rows: tuple[int, ...]

    body = envelope("inspect", Report(Path("a"), math.nan, (1, 2)), warnings=["w"])
    assert json.loads(json.dumps(body)) == {
        "schema_version": 1,
        "command": "inspect",
        "ok": True,
        "warnings": ["w"],
        "result": {"path": "a", "value": None, "rows": [1, 2]},
    }
    with pytest.raises(TypeError, match="not report data"):
        to_json(object())


def test_a_package_that_is_missing_is_no_fault_of_the_program():
    code, told = explain(ModuleNotFoundError("No module named 'numba'", name="numba"))
    assert code == 1
    assert told.startswith("the Python package numba is not installed here, or not whole: pip ")
    _, told = explain(ModuleNotFoundError("No module named", name="diffquant.quant.lost"))
    assert told.startswith("internal error")
