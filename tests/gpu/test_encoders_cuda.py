"""Encoders on a card, byte for byte the CPU's; run by `scripts/test --gpu`.

The CPU's side is numba's, and the plain reference where numba is not installed.
"""

import hashlib
import importlib.util
import threading

import numpy as np
import pytest
import torch
from awkward_weights import awkward_weights, importance_rows, not_finite

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS, backend
from diffquant.quant.cards import cards_for
from diffquant.quant.codecs.triton import iq_search, launch
from diffquant.quant.formats import FORMATS
from diffquant.quant.staging import Stages
from diffquant.quant.types import type_named

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytest.importorskip("triton")

import scale_bits

pytestmark = pytest.mark.gpu
NAMES = [name for name, row in FORMATS.items() if (row.codec, "encode", "cuda") in BACKENDS]
CPU = "cpu" if importlib.util.find_spec("numba") else "reference"


def wanted(name, weight, stats=None, **weigh):
    with np.errstate(all="ignore"):
        return backend(FORMATS[name].codec, "encode", CPU)(weight, stats, fmt=name, **weigh)


def flat_bytes(part):
    return part.reshape(-1).view(np.uint8)


def different(name, weight, stats=None, **weigh):
    if FORMATS[name].importance == "required" and not weigh:
        weigh = {"importance": np.ones(weight.shape[1], np.float32)}
    rows = torch.from_numpy(weight).cuda()
    there = {key: torch.from_numpy(one).cuda() for key, one in weigh.items()}
    found = backend(FORMATS[name].codec, "encode", "cuda")(rows, stats, fmt=name, **there)
    return {
        key: int((flat_bytes(found[key].cpu().numpy()) != flat_bytes(part)).sum())
        for key, part in wanted(name, weight, stats, **weigh).items()
    }


@pytest.fixture(scope="module")
def awkward():
    return awkward_weights()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_awkward_weights_are_the_cpus(name, awkward):
    found = {kind: different(name, weight) for kind, weight in awkward.items()}
    assert {kind: parts for kind, parts in found.items() if any(parts.values())} == {}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_layer_are_the_cpus(name):
    rows = 1031 if CPU == "cpu" else 67  # odd: the last program is partly empty
    weight = np.random.default_rng(3).standard_normal((rows, 3072), np.float32) * np.float32(0.02)
    assert not any(different(name, weight).values())


@pytest.mark.parametrize("name", [n for n in NAMES if FORMATS[n].codec in WEIGHTED_ON_CARDS])
def test_bytes_with_importance_are_the_cpus(name, awkward):
    for kind, importance in importance_rows().items():
        for what in ("gaussian", "outlier columns", "signed zeros", "blocks of all sizes"):
            found = different(name, awkward[what], importance=importance)
            assert not any(found.values()), (kind, what)


@pytest.mark.parametrize("name", [n for n in NAMES if FORMATS[n].passes == 2])
def test_bytes_of_a_part_of_a_weight_are_the_cpus(name, awkward):
    whole = np.concatenate([awkward["gaussian"], awkward["heavy tails"]])
    stats = backend(FORMATS[name].codec, "reduce", CPU)(whole, None, fmt=name)
    assert not any(different(name, awkward["gaussian"], stats).values())


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (1, 127), (5, 31), (33, 70), (130, 129)])
@pytest.mark.parametrize("name", [n for n in NAMES if not FORMATS[n].check((5, 31))])
def test_bytes_of_odd_shapes_are_the_cpus(name, shape, awkward):
    assert not any(different(name, np.resize(awkward["gaussian"], shape)).values())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nf4", "fp4"])
def test_bytes_of_weights_that_are_not_finite_are_the_cpus(name):
    pytest.importorskip("numba")  # the plain reference does not say so much
    assert not any(different(name, not_finite()).values())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_bytes_near_powers_of_two_are_the_cpus(name):
    assert not any(different(name, scale_bits.blocks_near_powers()).values())


def test_scales_are_the_cpus_near_every_power_of_two():
    found = scale_bits.different("cuda")
    assert not any(found.values()), found


@pytest.mark.parametrize("lanes", [(64, 1), (64, 2), (256, 4), (256, 8)])
@pytest.mark.parametrize("codec", ["q4_k", "q6_k", "q8_0", "asym_w4a8_int8", "iq3_xxs"])
def test_lanes_do_not_change_bytes(codec, lanes, monkeypatch):
    monkeypatch.setitem(launch.LANES, codec, launch.Lanes(*lanes))
    weight = np.random.default_rng(4).standard_normal((33, 1280), np.float32)
    assert not any(different(codec, weight).values())


@pytest.mark.parametrize("lanes", [(64, 1), (64, 2), (128, 4)])
@pytest.mark.parametrize("codec", ["iq2_xxs", "iq3_s"])
def test_lanes_of_trials_do_not_change_bytes(codec, lanes, monkeypatch):
    monkeypatch.setattr(iq_search, "_TRIALS", launch.Lanes(*lanes))
    weight = np.random.default_rng(4).standard_normal((33, 1280), np.float32)
    assert not any(different(codec, weight).values())


@pytest.mark.parametrize("codec", ["q4_k", "iq3_xxs"])
def test_weights_beyond_2_gib_are_addressed(codec):
    rows, columns = 1 << 16, (1 << 13) + 256  # 2.2 GB as float32
    some = torch.randn(256, columns, device="cuda")
    found = backend(codec, "encode", "cuda")(some.repeat(rows // 256, 1), None, fmt=codec)
    first = backend(codec, "encode", "cuda")(some, None, fmt=codec)
    assert torch.equal(found["weight"][-256:], first["weight"])


def test_threads_with_streams_of_their_own_do_not_disturb_each_other():
    stages = Stages(cards_for("cuda").devices)
    rng = np.random.default_rng(5)
    weights = [rng.standard_normal((64 + n, 2048), np.float32) for n in range(16)]
    found = {}

    def work(part):
        for n in range(part, 16, 4):
            for fmt in ("q8_0", "q4_k"):
                found[n, fmt] = stages.encode(weights[n], None, fmt=fmt)["weight"]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    for (n, fmt), part in found.items():
        assert np.array_equal(part, wanted(fmt, weights[n])["weight"]), (n, fmt)


@pytest.mark.parametrize("name", ["q4_k_s", "q8_0", "q5_k_m", "iq3_xxs"])
def test_whole_files_are_the_cpus(name, request, tmp_path):
    pytest.importorskip("numba")
    source = request.config.rootpath / "examples" / "flux1-shapes"
    digests = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.gguf"
        report = run_job(source, out, Request("gguf", type=type_named(name)), device=device)
        digests[device] = hashlib.sha256(out.read_bytes()).hexdigest()
        encoders = {row.encoder for row in report.tensors}
        assert ("cuda" in encoders) == (device == "cuda"), report.notes
    assert digests["cpu"] == digests["cuda"]
