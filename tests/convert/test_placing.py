"""Encoding on cards: what goes there and why not, the same files, several cards, no torch without.

The cards here are the CPU under another name: what a card computes is tested in tests/quant.
"""

import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.convert import cutting, gather, jobs, placing, several, step_state
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.placing import place
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.several import Wanted, run_jobs
from diffquant.core.errors import QuantError, ResourceError, UnsupportedShape, UsageError
from diffquant.io.imatrix import Entry, ImportanceMatrix
from diffquant.quant import cards, staging
from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS, backend
from diffquant.quant.cards import NO_CARDS, Cards, cards_for
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Rule
from diffquant.quant.staging import Stages
from diffquant.quant.types import type_named

QKV = "double_blocks.0.img_attn.qkv.weight"
ONE = Cards(("cpu",), "card 0")


def q4_k_s(**changed):
    return Request("gguf", type=type_named("q4_k_s"), **changed)


def planned(source, found, request, **given):
    with opened(source) as (_, logical, match):
        return place([make_plan(logical, match, request, **given)], found)[0]


@pytest.fixture
def card(monkeypatch):
    """`cards_for` finds what is asked for; what "cards" encoded is noted."""
    calls = []

    def on_card(codec, operation, device="cpu"):
        if device != "cuda":
            return backend(codec, operation, device)

        def encode(weight, stats=None, *, fmt, **weigh):
            calls.append((fmt, tuple(weight.shape), bool(weigh)))
            weigh = {name: one.numpy() for name, one in weigh.items()}
            parts = backend(codec, operation)(weight.numpy(), stats, fmt=fmt, **weigh)
            return {name: torch.from_numpy(part) for name, part in parts.items()}

        return encode

    monkeypatch.setattr(staging, "backend", on_card)
    for module in (jobs, several):
        monkeypatch.setattr(module, "cards_for", lambda asked: NO_CARDS if asked == "cpu" else ONE)
    return calls


def test_searches_go_to_cards_and_casts_stay(examples):
    plan = planned(examples / "flux1-shapes", ONE, q4_k_s())
    found = {step.decision.format: step.encoder for step in plan.steps if step.decision.format}
    assert found == {"q4_k": "cuda", "bf16": "cpu", "f32": "cpu"}
    assert {step.encoder for step in plan.steps if not step.decision.format} == {"cpu"}
    note = plan.notes[-1]
    assert note.startswith("encoded on card 0: 13 weights (q4_k); on the CPU: ")
    assert "plain casts cost less than the way to a card" in note


def test_chunks_are_larger_where_a_card_encodes(examples, monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 1 << 12)
    alone = planned(examples / "flux1-shapes", NO_CARDS, q4_k_s())
    beside = planned(examples / "flux1-shapes", ONE, q4_k_s())
    count = [sum(len(cutting.chunks_of(step)) for step in one.steps) for one in (alone, beside)]
    assert count[0] > 2 * count[1]
    casts = planned(examples / "flux1-shapes", ONE, Request("gguf", type=type_named("f16")))
    assert {step.chunk for step in casts.steps} == {0}


def test_auto_takes_a_card_where_there_is_enough_to_search_for(examples, monkeypatch):
    source = examples / "flux1-shapes"
    plan = planned(source, NO_CARDS, q4_k_s())
    monkeypatch.setattr(cards, "_driver_cards", lambda: (1, ""))
    few = placing.cards_worth("auto", [plan], lambda _asked: ONE)
    assert few.devices == ()
    assert "cards are taken from 4.3 billion on, and with --device cuda" in few.why
    assert placing.cards_worth("cuda", [plan], lambda _asked: ONE) is ONE
    monkeypatch.setattr(placing, "AUTO_WEIGHTS", 1000)
    assert placing.cards_worth("auto", [plan], lambda _asked: ONE) is ONE
    monkeypatch.setattr(cards, "_driver_cards", lambda: (0, "none"))
    monkeypatch.setattr(placing, "AUTO_WEIGHTS", 1 << 32)
    assert placing.cards_worth("auto", [plan], lambda _asked: ONE) is NO_CARDS


def test_longer_searches_take_a_card_for_fewer_weights(examples, monkeypatch):
    source = examples / "flux1-shapes"
    plans = {
        name: Request("gguf", type=type_named(name), pure=True) for name in ("q4_k", "iq3_xxs")
    }
    plans = {name: planned(source, NO_CARDS, request) for name, request in plans.items()}
    weights = sum(
        math.prod(step.assignment.shape)
        for step in plans["iq3_xxs"].steps
        if step.decision.format == "iq3_xxs"
    )
    monkeypatch.setattr(placing, "AUTO_WEIGHTS", 10 * weights)
    monkeypatch.setattr(cards, "_driver_cards", lambda: (1, ""))
    for name, plan in plans.items():
        found = placing.cards_worth("auto", [plan], lambda _asked: ONE)
        assert found.devices == (("cpu",) if name == "iq3_xxs" else ()), name


@pytest.mark.parametrize(
    ("name", "container", "pays"),
    [("mxfp4", "gguf", False), ("nf4_dq", "safetensors", False), ("fp4_dq", "safetensors", True)],
)
def test_auto_starts_no_card_for_what_the_cpu_encodes_quickly(
    examples, monkeypatch, name, container, pays
):
    monkeypatch.setattr(placing, "AUTO_WEIGHTS", 1000)
    request = Request(container, type=type_named(name), pure=True)
    plan = planned(examples / "flux1-shapes", ONE, request)
    assert {step.encoder for step in plan.steps if step.decision.format == name} == {"cuda"}
    assert (placing.cards_worth("auto", [plan], lambda _asked: ONE) is ONE) == pays


def test_what_has_no_encoder_for_cards_stays_and_is_told(examples, monkeypatch):
    monkeypatch.delitem(BACKENDS, ("mxfp4", "encode", "cuda"))
    request = q4_k_s(rules=(Rule("img_attn.qkv", "mxfp4", "test"),))
    plan = planned(examples / "flux1-shapes", ONE, request)
    assert {s.encoder for s in plan.steps if s.decision.format == "mxfp4"} == {"cpu"}
    assert "mxfp4 has no encoder for cards" in plan.notes[-1]


def matrix():
    return ImportanceMatrix(
        {QKV: Entry(np.arange(1.0, 257).reshape(1, -1), np.array([2]))}, files=("m.gguf",)
    )


def test_importance_goes_along_where_a_card_weighs_by_it(examples, monkeypatch):
    source = examples / "flux1-shapes"
    q3_k = Request("gguf", type=type_named("q3_k_s"), pure=True)
    for request in (q4_k_s(), q3_k):
        plan = planned(source, ONE, request, matrix=matrix())
        assert {step.key: step.encoder for step in plan.steps}[QKV] == "cuda"
    monkeypatch.setattr(placing, "WEIGHTED_ON_CARDS", WEIGHTED_ON_CARDS - {"q3_k"})
    plan = planned(source, ONE, q3_k, matrix=matrix())
    by_key = {step.key: step.encoder for step in plan.steps}
    assert by_key[QKV] == "cpu"
    assert "cuda" in by_key.values()
    assert "q3_k weighed by the importance matrix" in plan.notes[-1]


def test_formats_that_need_importance_go_to_cards(examples):
    request = q4_k_s(rules=(Rule("blocks.0.img_attn.qkv", "iq2_xxs", "test"),))
    plan = planned(examples / "flux1-shapes", ONE, request, matrix=matrix())
    found = {step.key: (step.decision.format, step.encoder) for step in plan.steps}
    assert found[QKV] == ("iq2_xxs", "cuda")


def test_files_weighed_by_importance_are_the_same(examples, tmp_path, digest, card):
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.gguf"
        run_job(examples / "flux1-shapes", out, q4_k_s(), device=device, matrix=matrix())
        found.append(list(digest(out).values()))
    assert found[0] == found[1]
    assert [weighed for *_, weighed in card].count(True) == 1  # one chunk of one weight


def test_searched_scales_stay_with_the_cpu(examples):
    request = Request("safetensors", type=type_named("nf4"), rounding="search")
    plan = planned(examples / "flux1-shapes", ONE, request)
    searched = [step for step in plan.steps if step.rounding == "search"]
    assert searched
    assert {step.encoder for step in searched} == {"cpu"}
    assert "rounded by search" in plan.notes[-1]


def test_nothing_is_told_where_no_card_was_looked_for(examples):
    source = examples / "flux1-shapes"
    assert planned(source, NO_CARDS, q4_k_s()).notes == ()
    told = planned(source, Cards(why="triton is not installed"), q4_k_s()).notes
    assert told == ("encoded on the CPU: triton is not installed",)


@pytest.mark.parametrize(
    ("source", "name", "container"),
    [
        ("flux1-shapes", "q4_k_s", "gguf"),
        ("sd15-shapes", "q5_k_m", "gguf"),
        ("flux1-shapes", "nf4", "safetensors"),
        ("flux1-shapes", "int8_convrot", "safetensors"),
        ("flux1-shapes", "convrot_w4a4", "safetensors"),
        ("flux1-shapes", "asym_w4a8_int8", "safetensors"),
        ("flux1-shapes", "nvfp4", "safetensors"),
        ("flux1-shapes", "nf4_dq", "safetensors"),
    ],
)
def test_files_are_the_same_and_the_report_says_who_encoded(
    examples, tmp_path, digest, card, monkeypatch, source, name, container
):
    monkeypatch.setattr(cutting, "CHUNK", 1 << 14)
    monkeypatch.setattr(staging, "_SLAB", 1 << 12)  # chunks are cut once more
    request, found = Request(container, type=type_named(name)), {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.{container}"
        report = run_job(examples / source, out, request, device=device, workers=3)
        assert report.verdict == "pass"
        found[device] = (list(digest(out).values()), report.error)
        encoders = {row.encoder for row in report.tensors}
        assert encoders >= ({"cuda"} if device == "cuda" else {"cpu"})
    assert found["cpu"][0] == found["cuda"][0]
    assert found["cpu"][1] == pytest.approx(found["cuda"][1])  # sums over other chunks
    assert card
    slabs = [shape for fmt, shape, _ in card if all(part.per_row for part in FORMATS[fmt].parts)]
    assert all(rows * columns <= 1 << 14 for rows, columns in slabs)


def test_several_outputs_share_the_card(examples, tmp_path, digest, card):
    def run(folder, device):
        folder.mkdir()
        wanted = [
            Wanted(folder / f"{name}.gguf", Request("gguf", type=type_named(name)))
            for name in ("q8_0", "q5_0")
        ]
        run_jobs(examples / "flux1-shapes", wanted, device=device, workers=2)
        return digest(folder)

    assert run(tmp_path / "cpu", "cpu") == run(tmp_path / "card", "cuda")
    assert {fmt for fmt, _, _ in card} == {"q8_0", "q5_0"}


def test_a_dry_run_says_where_weights_would_be_encoded(examples, tmp_path, card):
    report = run_job(
        examples / "flux1-shapes", tmp_path / "o.gguf", q4_k_s(), dry_run=True, device="cuda"
    )
    assert report.notes[-1].startswith("encoded on card 0")
    assert not card


def test_weights_that_are_not_finite_are_refused_before_a_card_sees_them(
    examples, tmp_path, card, monkeypatch
):
    def damaged(logical, step, rows):
        weight = gather.float_rows(logical, step, rows).copy()
        if step.decision.format == "q4_k":
            weight[-1, -1] = np.nan
        return weight

    monkeypatch.setattr(step_state, "float_rows", damaged)
    with pytest.raises(QuantError, match="NaN or infinite"):
        run_job(examples / "flux1-shapes", tmp_path / "o.gguf", q4_k_s(), device="cuda", workers=1)
    assert not card
    assert not (tmp_path / "o.gguf").exists()


def test_bytes_of_the_kernels_make_the_same_file(examples, tmp_path, digest):
    source, script = examples / "flux1-shapes", Path(__file__).with_name("placing_interpreter.py")
    pytest.importorskip("triton")
    command = [sys.executable, script, source, tmp_path / "a.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_job(source, tmp_path / "b.gguf", Request("gguf", type=type_named("q8_0")), workers=1)
    assert digest(tmp_path / "a.gguf").popitem()[1] == digest(tmp_path / "b.gguf").popitem()[1]


def test_threads_are_spread_over_cards_and_stay_there(monkeypatch):
    made = []

    class Stage:
        def __init__(self, device):
            made.append(device.index)

        def encode(self, weight, stats, fmt, importance):
            return {"weight": np.zeros(1)}

    monkeypatch.setattr(staging, "_CardStage", Stage)
    stages, weight = Stages(("cuda:0", "cuda:1")), np.zeros((1, 32), np.float32)

    def work():
        for _ in range(3):
            stages.encode(weight, None, fmt="q8_0")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    assert made == [0, 1, 0, 1]


def test_one_thread_compiles_and_the_others_wait(monkeypatch):
    calls, seen = [], []

    def encode(weight, stats=None, *, fmt):
        calls.append(fmt)
        if not seen:
            time.sleep(0.1)
            seen.append(len(calls))  # who else came meanwhile
        return {"weight": weight}

    monkeypatch.setattr(staging, "backend", lambda *_: encode)
    stages, weight = Stages(("cpu",)), np.zeros((1, 32), np.float32)
    threads = [
        threading.Thread(target=stages.encode, args=(weight, None), kwargs={"fmt": "q8_0"})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]
    assert len(calls) == 4


def test_no_memory_on_a_card_is_told(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(staging, "backend", lambda *_: full)
    with pytest.raises(ResourceError, match=r"no memory on the card .* --device cpu"):
        Stages(("cpu",)).encode(np.zeros((1, 32), np.float32), None, fmt="q8_0")
    with pytest.raises(UnsupportedShape):
        Stages(("cpu",)).encode(np.zeros((1, 33), np.float32), None, fmt="q8_0")
    short = np.ones(32, np.float32)
    with pytest.raises(UnsupportedShape, match="importance of shape"):
        Stages(("cpu",)).encode(np.zeros((1, 256), np.float32), None, fmt="q4_k", importance=short)


@pytest.fixture
def machine(monkeypatch):
    """Set what the driver and torch say of this machine's cards."""

    def has(count, missing="", unusable=""):
        monkeypatch.setattr(cards, "_driver_cards", lambda: (count, missing))
        monkeypatch.setattr(cards, "_unusable", lambda: unusable)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")

    return has


def test_cards_are_found_as_asked(machine):
    machine(2)
    assert cards_for("cpu") is NO_CARDS
    both = Cards(("cuda:0", "cuda:1"), "cuda:0, cuda:1 (H100)")
    assert cards_for("auto") == cards_for("cuda") == both
    assert cards_for("cuda:1") == Cards(("cuda:1",), "cuda:1 (H100)")
    with pytest.raises(ResourceError, match="there are 2 cards, numbered from 0"):
        cards_for("cuda:2")


def test_without_cards_auto_is_quiet_and_cuda_an_error(machine):
    machine(0, "NVIDIA's driver is not installed")
    assert cards_for("auto") is NO_CARDS
    with pytest.raises(ResourceError, match="driver is not installed; --device cpu"):
        cards_for("cuda")


def test_a_card_that_cannot_serve_is_told(machine):
    machine(1, unusable="triton is not installed")
    assert cards_for("auto") == Cards(why="triton is not installed")
    with pytest.raises(ResourceError, match="triton is not installed"):
        cards_for("cuda:0")


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cuda:0000"])
def test_other_words_are_refused(asked, machine):
    machine(1)
    with pytest.raises(UsageError, match="expected one of auto, cpu, cuda, cuda:N"):
        cards_for(asked)


def test_without_a_card_torch_is_not_loaded(examples, tmp_path):
    code = (
        "import sys; from pathlib import Path; from diffquant.quant import cards;"
        "cards._driver_cards = lambda: (0, 'none');"
        "from diffquant.convert.jobs import run_job; from diffquant.convert.plan import Request;"
        "from diffquant.quant.types import type_named;"
        "run_job(Path(sys.argv[1]), Path(sys.argv[2]), Request('gguf', type=type_named('q8_0')),"
        " device='auto');"
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, examples / "flux1-shapes", tmp_path / "o.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
