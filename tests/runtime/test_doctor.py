"""A machine is examined with parts of it missing, broken or supposed; problems say what to do."""

import builtins
import dataclasses
import importlib.metadata
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import diffquant.runtime.doctor.examination as room
import diffquant.runtime.doctor.families as planning
from diffquant.convert.footprint.levels import CONTEXT_NBYTES
from diffquant.core.errors import UsageError
from diffquant.core.report import to_json
from diffquant.runtime import devices
from diffquant.runtime.doctor import Diagnosis, Problem, examine
from diffquant.runtime.doctor.accelerators import Accelerator, accelerators, nvidia_driver
from diffquant.runtime.doctor.decoders import decoders
from diffquant.runtime.doctor.families import TYPES_SHOWN, families
from diffquant.runtime.doctor.libraries import LIBRARIES, installed
from diffquant.runtime.doctor.machine import Disk, Memory
from diffquant.runtime.doctor.probe import Broken, probe
from diffquant.runtime.doctor.problems import problems
from diffquant.runtime.doctor.processor import Processor
from diffquant.runtime.families import FAMILIES
from diffquant.runtime.kernels import KERNELS
from diffquant.runtime.memory.plan import Budget

GIB = 1 << 30
CARD = Accelerator("cuda:0", "Card", "9.0", 24 * GIB, 20 * GIB)


@pytest.fixture(scope="module", autouse=True)
def _plans_once():
    """make_plan() is pure and takes most of the time: a type is planned once for all dtypes."""
    plan, made = planning.make_plan, {}

    def once(logical, match, request):
        shapes = tuple((key, spec.shape) for key, spec in logical.specs().items())
        key = (match.architecture, match.variant, request.type.name, shapes)
        if key not in made:
            made[key] = plan(logical, match, request)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "make_plan", once)
        yield


@pytest.fixture(scope="module")
def here(_plans_once) -> Diagnosis:
    return examine(ram=16 * GIB)


def planned(budget, compute="BF16", device="cuda"):
    return families(Budget(budget, 64 * GIB), device=device, compute=compute)


def rows(budget, compute="BF16"):
    return {row.title: row for row in planned(budget, compute)}


# What is looked at


def test_every_family_with_a_runtime_is_planned(here):
    assert {row.architecture for row in here.families} == set(FAMILIES)
    assert all(tuple(fit.type for fit in row.types) == TYPES_SHOWN for row in here.families)


def test_this_machine_is_planned_on_its_cpu_with_the_ram_that_was_asked_for(here):
    plan = here.planned
    assert (plan.device, plan.budget, plan.ram, plan.supposed) == ("cpu", 16 * GIB, 16 * GIB, True)
    assert plan.dtype == str(devices.native_dtype("cpu")).removeprefix("torch.")
    assert here.broken == ()


def test_a_diagnosis_is_json(here):
    told = to_json(here)
    assert set(told) == {field.name for field in dataclasses.fields(Diagnosis)}
    assert told["machine"]["processor"]["threads"] >= 1
    assert told["families"][0]["types"][0]["fits"] is True


def test_every_format_is_in_one_group_per_device():
    for device in ("cpu", "cuda", "mps"):
        found = decoders(device, "bfloat16")
        assert sorted(name for row in found for name in row.formats) == sorted(KERNELS)
        assert len({(row.backend, row.reason) for row in found}) == len(found)
        assert ("stored", ("bf16",)) in {(row.backend, row.formats) for row in found}


def test_a_supposed_gpu_is_planned_without_having_one():
    found = examine(vram=8 * GIB)
    assert (found.planned.device, found.planned.budget) == ("cuda", 8 * GIB)
    assert found.planned.dtype == "bfloat16"
    assert [one.device for one in found.compute][-1] == "cuda"
    assert {row.device for row in found.decoders} >= {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"device": "tpu"}, "expected cpu, cuda or mps"),
        ({"device": "cpu", "vram": GIB}, "use --ram"),
        ({"device": "cuda:7"}, "add --vram"),
    ],
)
def test_what_cannot_be_planned_is_refused(asked, word, monkeypatch):
    monkeypatch.setattr(room, "accelerators", lambda _: no_cards())
    with pytest.raises(UsageError, match=word):
        examine(**asked)


# Models


def test_a_peak_that_fits_is_within_the_budget():
    for budget in (2 * GIB, 6 * GIB, 24 * GIB, 200 * GIB):
        for row in planned(budget):
            for fit in row.types:
                assert fit.fits is (fit.peak_nbytes <= budget)


def test_more_memory_never_gives_a_slower_rung():
    order = ["none", "model", "blocks", "sequential"]
    small, large = rows(6 * GIB), rows(48 * GIB)
    for title, row in small.items():
        for less, more in zip(row.types, large[title].types, strict=True):
            assert order.index(more.level) <= order.index(less.level)


def test_everything_fits_without_offloading_where_there_is_room():
    assert {fit.rung for row in rows(200 * GIB).values() for fit in row.types} == {"none"}


def test_rungs_are_the_planners_own():
    row = rows(8 * GIB)["Flux.1 dev"].types[-1]
    assert (row.level, row.fits) == ("blocks", True)
    assert 0 < row.resident["t5_xxl"] < 24
    assert any(one.startswith("offload none") and "too much" in one for one in row.why)
    assert row.host_nbytes > 0


def test_what_fits_nowhere_says_the_least_it_needs():
    row = rows(GIB)["Flux.2 dev"].types[0]
    assert row.fits is False
    exact = rows(row.peak_nbytes)["Flux.2 dev"].types[0]
    assert (exact.fits, exact.peak_nbytes) == (True, row.peak_nbytes)
    assert rows(row.peak_nbytes - 1)["Flux.2 dev"].types[0].fits is False


def test_what_decodes_counts(monkeypatch):
    (large,) = [one for one in planning.published() if one.title == "Flux.2 dev"]
    monkeypatch.setattr(planning, "published", lambda: (large,))

    def least(backend):
        served = dict.fromkeys(("q4_k", "f16"), backend)
        (row,) = families(Budget(GIB, None), device="cuda", compute="BF16", backends=served)
        return row.types[-1].peak_nbytes

    assert least("torch") > least("triton")


def test_an_unknown_budget_gives_sizes_and_no_verdict():
    assert {fit.fits for row in rows(None).values() for fit in row.types} == {None}


def test_smaller_types_have_smaller_denoisers():
    for row in rows(None).values():
        sizes = [fit.denoiser_nbytes for fit in row.types]
        assert sizes == sorted(sizes, reverse=True)
    # 11.9 B weights of 16 bits, and of 8.5 and about 4.6 in blocks
    flux = [fit.denoiser_nbytes / 11.9e9 * 8 for fit in rows(None)["Flux.1 dev"].types]
    assert flux == pytest.approx([16, 8.5, 4.6], rel=0.02)


def test_wider_numbers_take_more():
    wide, narrow = rows(None, "F32"), rows(None, "BF16")
    for title, row in narrow.items():
        assert wide[title].types[0].peak_nbytes > row.types[0].peak_nbytes > CONTEXT_NBYTES["cuda"]


# Devices


def no_cards(**changes):
    base = accelerators([])
    return dataclasses.replace(base, **{"found": (), "driver": "", "built_for": "", **changes})


def cuda(monkeypatch, *, available=True, built="13.0"):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    facts = SimpleNamespace(name="Card", major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, 4 * GIB))


def test_a_card_is_described_and_planned_for(monkeypatch):
    cuda(monkeypatch, available=lambda: True)
    found = examine()
    assert found.accelerators.found == (Accelerator("cuda:0", "Card", "8.6", 4 * GIB, 3 * GIB),)
    assert found.accelerators.built_for == "CUDA 13.0"
    assert (found.planned.device, found.planned.dtype) == ("cuda:0", "bfloat16")
    assert (
        found.planned.budget == 3 * GIB + CONTEXT_NBYTES["cuda"]
    )  # a context that is already there
    assert "8.6; from 8.0" in found.compute[-1].why


def test_torchs_own_words_say_why_there_is_no_card(monkeypatch):
    def old():
        warnings.warn("the driver on your system is too old\n(found 11)", stacklevel=1)
        return False

    cuda(monkeypatch, available=old)
    assert accelerators([]).why_none["CUDA"] == "the driver on your system is too old"


def test_a_card_that_fails_is_a_finding_and_not_a_crash(monkeypatch):
    def fail():
        raise RuntimeError("CUDA unknown error\nmore")

    cuda(monkeypatch, available=fail)
    broken = []
    assert accelerators(broken).found == ()
    assert broken == [Broken("CUDA", "RuntimeError: CUDA unknown error")]


def test_a_mac_has_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = accelerators([]).found
    assert found == (Accelerator("mps", "Apple GPU", "", 8 * GIB, 7 * GIB),)


def test_the_driver_is_read_where_linux_keeps_it(tmp_path):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC version: 9\n"
    (tmp_path / "version").write_text(text)
    assert nvidia_driver(tmp_path / "version") == "580.65.06"


def test_reasons_follow_the_dtype(monkeypatch):
    monkeypatch.setattr(devices, "_cpu_multiplies_bf16", lambda: True)
    assert "multiplies bfloat16" in devices.why_native("cpu")
    monkeypatch.setattr(devices, "_cpu_multiplies_bf16", lambda: False)
    assert "does not" in devices.why_native("cpu")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "oneDNN" in devices.why_native("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "9.0; from 8.0" in devices.why_native("cuda")
    assert "macOS 14" in devices.why_native("mps")


# Libraries


def test_versions_are_those_that_are_installed():
    found = {one.name: one for one in installed()}
    assert found["torch"].version == importlib.metadata.version("torch")
    assert {one.name for one in LIBRARIES} >= set(found)


def test_a_library_is_left_out_where_no_system_has_it(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "triton" not in {one.name for one in installed()}


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError])
def test_a_torch_that_does_not_load_leaves_the_rest(error, monkeypatch):
    real = builtins.__import__

    def broken_import(name, *args, **kwargs):
        if name == "torch":
            raise error("libtorch.so: undefined symbol")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken_import)
    found = examine(ram=8 * GIB)
    assert found.accelerators.torch == ""
    assert (found.compute, found.decoders) == ((), ())
    assert found.planned.dtype == "float32"
    assert len(found.families) > 8
    assert any("undefined symbol" in one.what for one in found.problems)
    assert "undefined symbol" in next(one.error for one in found.libraries if one.name == "torch")


def test_a_numba_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    found = examine(ram=8 * GIB)
    (problem,) = [one for one in found.problems if one.what.startswith("numba")]
    assert "does not load" in problem.what
    assert problem.do == "pip install --force-reinstall numba"


def test_a_probe_keeps_the_first_line_of_an_error():
    def fail():
        raise KeyError

    broken = []
    assert probe("thing", lambda: 3, broken) == 3
    assert probe("thing", fail, broken) is None
    assert broken == [Broken("thing", "KeyError()")]


# Problems


@pytest.fixture
def sound(here) -> Diagnosis:
    """This machine as it would be with nothing to complain about."""
    machine = dataclasses.replace(
        here.machine,
        processor=Processor("P", 8, 8, 8.0, "", ()),
        memory=Memory(64 * GIB, 60 * GIB, None, 0, 0),
        disks=(Disk("working directory", "/w", 100 * GIB, 200 * GIB),),
    )
    return dataclasses.replace(
        here,
        machine=machine,
        accelerators=no_cards(threads=8),
        libraries=tuple(dataclasses.replace(one, version="1", error="") for one in here.libraries),
        families=planned(200 * GIB, "F32", "cpu"),
        broken=(),
    )


def only(found, environment=None) -> Problem:
    (problem,) = problems(found, environment or {})
    return problem


def test_a_sound_machine_has_no_problems(sound):
    assert problems(sound, {}) == ()


@pytest.mark.parametrize("name", ["torch", "numba", "tokenizers", "gguf", "psutil"])
def test_a_missing_library_says_what_is_lost(name, sound):
    libraries = tuple(
        dataclasses.replace(one, version="" if one.name == name else "1") for one in sound.libraries
    )
    problem = only(dataclasses.replace(sound, libraries=libraries))
    assert problem.what.startswith(f"{name} is not installed: ")
    assert problem.do.startswith("pip install")


def test_a_library_that_is_missing_is_not_called_broken_too(sound):
    libraries = tuple(
        dataclasses.replace(one, version="" if one.name == "numba" else "1")
        for one in sound.libraries
    )
    broken = (Broken("numba", "ModuleNotFoundError: No module named 'numba'"),)
    assert (
        "not installed" in only(dataclasses.replace(sound, libraries=libraries, broken=broken)).what
    )


@pytest.mark.parametrize(("built", "number"), [("CUDA 13.0", 1), ("ROCm 6.4", 0), ("", 0)])
def test_triton_is_missed_where_a_card_would_use_it(built, number, sound):
    libraries = tuple(
        dataclasses.replace(one, version="" if one.name == "triton" else "1")
        for one in sound.libraries
    )
    cards = (CARD,) if built else ()
    found = dataclasses.replace(
        sound,
        libraries=libraries,
        accelerators=no_cards(found=cards, built_for=built, threads=8),
    )
    if "triton" in {one.name for one in libraries}:
        assert len(problems(found, {})) == number


@pytest.mark.parametrize(
    ("changes", "environment", "word"),
    [
        ({"driver": "580"}, {}, "built without CUDA"),
        ({"driver": "580", "built_for": "CUDA 13.0"}, {"CUDA_VISIBLE_DEVICES": ""}, "hides"),
        ({"driver": "470", "built_for": "CUDA 13.0"}, {}, "no GPU is usable"),
    ],
)
def test_a_card_that_is_not_used_says_why(changes, environment, word, sound):
    found = dataclasses.replace(sound, accelerators=no_cards(threads=8, **changes))
    assert word in only(found, environment).what


@pytest.mark.parametrize(
    ("threads", "usable", "environment", "do"),
    [
        (64, 2.0, {}, "set OMP_NUM_THREADS=2"),
        (1, 0.5, {}, None),
        (1, 8.0, {"OMP_NUM_THREADS": "1"}, "unset OMP_NUM_THREADS for the fastest picture"),
        (1, 8.0, {}, None),
    ],
)
def test_threads_are_held_against_the_cores_there_are(threads, usable, environment, do, sound):
    processor = dataclasses.replace(sound.machine.processor, usable=usable)
    found = dataclasses.replace(
        sound,
        machine=dataclasses.replace(sound.machine, processor=processor),
        accelerators=no_cards(threads=threads),
    )
    assert [one.do for one in problems(found, environment)] == ([do] if do else [])


def test_kernels_that_are_interpreted_are_a_problem(sound):
    assert "plain Python" in only(sound, {"NUMBA_DISABLE_JIT": "1"}).what
    assert problems(sound, {"NUMBA_DISABLE_JIT": "0", "TRITON_INTERPRET": "1"}) == ()
    on_card = dataclasses.replace(sound, accelerators=no_cards(found=(CARD,), threads=8))
    assert "Triton kernels" in only(on_card, {"TRITON_INTERPRET": "1"}).what


def test_models_without_room_are_named_with_what_they_need(sound):
    plan = dataclasses.replace(sound.planned, budget=2 * GIB, dtype="float32")
    found = dataclasses.replace(sound, planned=plan, families=planned(2 * GIB, "F32", "cpu"))
    problem = only(found)
    assert problem.what.startswith("2.0 GiB of RAM are too little at native size for ")
    assert "Flux.2 dev (" in problem.what
    assert "SD 1.5" not in problem.what
    assert "--size" in problem.do
    assert "--dtype bfloat16" in problem.do
    unknown = dataclasses.replace(found, planned=dataclasses.replace(plan, budget=None))
    assert problems(unknown, {}) == ()


def test_full_disks_are_told_once_each(sound):
    disks = (
        Disk("working directory", "/w", GIB, 9 * GIB),
        Disk("temporary files", "/w/tmp", GIB, 9 * GIB),
        Disk("HF_HOME", "/h", 2 * GIB, 9 * GIB),
        Disk("HF_HUB_CACHE", "/later", None, None),
    )
    found = dataclasses.replace(sound, machine=dataclasses.replace(sound.machine, disks=disks))
    told = [one.what.split(" (")[0] for one in problems(found, {})]
    assert told == ["working directory", "HF_HOME"]
