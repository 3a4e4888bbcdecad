"""Files of input statistics: what is written comes back, and every damaged field is refused."""

import numpy as np
import pytest

from diffquant.core.errors import (
    MalformedFile,
    PlanMismatch,
    UnsupportedContainer,
    UsageError,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io import safetensors
from diffquant.io.inputs import (
    LayerInputs,
    check_inputs_target,
    covariance_shape,
    open_inputs,
    write_inputs,
)

RAN = {"diffquant.architecture": "flux1"}


def layer(columns=3, count=7):
    rows = np.random.default_rng(columns).normal(size=(5, columns)).astype(np.float32)
    return LayerInputs(rows.mean(0), rows.T @ rows / np.float32(5), count)


def test_what_is_written_comes_back(tmp_path):
    path, one = tmp_path / "in.safetensors", layer()
    write_inputs(path, {"b.weight": layer(4), "a.weight": one}, RAN)
    with open_inputs(path) as found:
        assert dict(found.columns) == {"a.weight": 3, "b.weight": 4}
        assert found.metadata["diffquant.architecture"] == "flux1"
        assert np.array_equal(found.mean("a.weight"), one.mean)
        assert np.array_equal(found.covariance("a.weight"), one.covariance)
        assert found.count("a.weight") == 7


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (1, (1, 1)),
        (4096, (4096, 4096)),
        (4100, (2, 2050, 2050)),
        (12288, (3, 4096, 4096)),
        (15360, (4, 3840, 3840)),
        (4099, (4099, 1, 1)),  # a prime
    ],
)
def test_wide_layers_keep_diagonal_blocks(columns, shape):
    assert covariance_shape(columns) == shape


def damaged(path, *, metadata=None, **changes):
    """Write a layer `a.weight` of three columns, with some arrays replaced or left out."""
    arrays = {
        "a.weight.mean": np.zeros(3, np.float32),
        "a.weight.covariance": np.eye(3, dtype=np.float32),
        "a.weight.count": np.array(2, np.int64),
    }
    arrays |= {f"a.weight.{name}": value for name, value in changes.items()}
    arrays = {key: value for key, value in arrays.items() if value is not None}
    dtypes = {"float32": "F32", "int64": "I64", "float64": "F64"}
    specs = [TensorSpec(key, dtypes[str(v.dtype)], v.shape) for key, v in arrays.items()]
    known = {"diffquant.kind": "inputs"} if metadata is None else metadata
    with safetensors.create(path, specs, known) as sink:
        for key, value in arrays.items():
            sink.write(key, 0, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        sink.commit()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "no mean"),
        ({"count": None}, "no count"),
        ({"mean": np.zeros((3, 1), np.float32)}, "expected F32"),
        ({"mean": np.zeros(0, np.float32)}, "at least one column"),
        ({"mean": np.zeros(3, np.float64)}, "expected F32"),
        ({"covariance": np.zeros((3, 4), np.float32)}, "expected F32"),
        ({"covariance": np.zeros((1, 3, 3), np.float32)}, "expected F32"),
        ({"count": np.array(0, np.int64)}, "at least 1"),
        ({"count": np.array(-5, np.int64)}, "at least 1"),
        ({"odd": np.zeros(3, np.float32)}, "is none of"),
    ],
)
def test_a_damaged_entry_is_refused_on_opening(tmp_path, changes, message):
    with pytest.raises(MalformedFile, match=message):
        open_inputs(damaged(tmp_path / "in.safetensors", **changes))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mean": np.array([0, np.nan, 0], np.float32)}, "mean"),
        ({"covariance": np.full((3, 3), np.inf, np.float32)}, "covariance"),
        ({"covariance": -np.eye(3, dtype=np.float32)}, "covariance"),
    ],
)
def test_values_that_cannot_be_are_refused_when_read(tmp_path, changes, what):
    with (
        open_inputs(damaged(tmp_path / "in.safetensors", **changes)) as found,
        pytest.raises(MalformedFile, match=r"a\.weight"),
    ):
        getattr(found, what)("a.weight")


def test_another_file_is_told_from_statistics(tmp_path):
    with pytest.raises(UnsupportedContainer, match="diffquant calibrate --inputs"):
        open_inputs(damaged(tmp_path / "in.safetensors", metadata={}))


def test_targets_are_checked_before_the_work(tmp_path):
    with pytest.raises(UsageError, match=r"\.safetensors"):
        check_inputs_target(tmp_path / "in.gguf")
    (tmp_path / "in.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="--force"):
        check_inputs_target(tmp_path / "in.safetensors")
    with pytest.raises(PlanMismatch, match="differ"):
        write_inputs(
            tmp_path / "new.safetensors",
            {"a": LayerInputs(np.zeros(3, np.float32), np.zeros((2, 2), np.float32), 1)},
            RAN,
        )
