"""Limits of control groups, the processor, memory and disks, from folders made for the purpose."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from diffquant.core.limits import Limits, limits
from diffquant.runtime.doctor.machine import machine
from diffquant.runtime.doctor.processor import processor

GIB = 1 << 30
FREE = Limits(None, None, None)


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "sys", root / "cgroup"


def test_version_2_takes_the_tightest_group_on_the_way_up(tmp_path):
    files = {
        "cgroup": "0::/pod/box\n",
        "sys/pod/box/memory.max": "max\n",
        "sys/pod/box/memory.current": f"{3 * GIB}\n",
        "sys/pod/box/cpu.max": "300000 100000\n",
        "sys/pod/memory.max": f"{8 * GIB}\n",
        "sys/pod/memory.current": f"{5 * GIB}\n",
        "sys/pod/memory.stat": f"anon 7\ninactive_file {GIB}\n",
        "sys/pod/cpu.max": "150000 100000\n",
    }
    assert limits(*tree(tmp_path, files)) == Limits(8 * GIB, 4 * GIB, 1.5)


def test_version_1_has_a_tree_per_controller(tmp_path):
    files = {
        "cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n1:cpuset:/\n0::/\n",
        "sys/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/memory/box/memory.usage_in_bytes": f"{GIB}\n",
        "sys/memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
        "sys/cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n",
        "sys/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        "sys/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "sys/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert limits(*tree(tmp_path, files)) == Limits(2 * GIB, GIB, 0.5)


def test_a_container_whose_group_is_the_mounted_root_is_read_there(tmp_path):
    files = {"cgroup": "0::/docker/not-here\n", "sys/memory.max": f"{GIB}\n"}
    assert limits(*tree(tmp_path, files)) == Limits(GIB, GIB, None)


def test_a_path_that_leaves_the_mount_is_not_followed(tmp_path):
    files = {"cgroup": "0::/../outside\n", "outside/memory.max": "1\n", "sys/cpu.max": "max 1\n"}
    assert limits(*tree(tmp_path, files)) == FREE


def test_more_than_the_limit_in_use_leaves_nothing(tmp_path):
    files = {"cgroup": "0::/\n", "sys/memory.max": "10\n", "sys/memory.current": "11\n"}
    assert limits(*tree(tmp_path, files)) == Limits(10, 0, None)


def test_no_control_groups_are_no_limits(tmp_path):
    assert limits(tmp_path / "none", tmp_path / "nothing") == FREE


CPUINFO = {
    "x86": (
        "processor\t: 0\nmodel name\t: Xeon 9\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n",
        "Xeon 9",
        ("AVX2", "AVX512", "AVX512_BF16", "AMX_BF16"),
    ),
    "arm": ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", None, ("NEON", "BF16", "I8MM")),
}


@pytest.mark.parametrize("kind", CPUINFO)
def test_linux_says_what_a_processor_can(kind, tmp_path):
    text, name, instructions = CPUINFO[kind]
    (tmp_path / "cpuinfo").write_text(text)
    found = processor(FREE, 4, tmp_path / "cpuinfo")
    assert found.instructions == instructions
    assert found.name == (name or platform.processor() or platform.machine())
    assert (found.cores, found.threads) == (4, os.cpu_count())


def test_elsewhere_llvm_is_asked(tmp_path, monkeypatch):
    from llvmlite import binding

    features = {"neon": True, "bf16": True, "avx2": False}
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    assert processor(FREE, None, tmp_path / "none").instructions == ("NEON", "BF16")


def test_no_llvm_leaves_instructions_unknown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert processor(FREE, None, tmp_path / "none").instructions is None


def test_macos_is_asked_for_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    ran = SimpleNamespace(stdout="Apple M9\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ran)
    assert processor(FREE, None, tmp_path / "none").name == "Apple M9"


def test_usable_cores_say_what_limits_them(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found = processor(FREE, 32, tmp_path / "none")
    assert (found.usable, found.limited_by) == (8, "affinity")
    found = processor(Limits(None, None, 1.5), 32, tmp_path / "none")
    assert (found.usable, found.limited_by) == (1.5, "quota of its control group")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processor(FREE, 32, tmp_path / "none").usable == 64


def test_a_control_group_bounds_available_memory(monkeypatch):
    import diffquant.runtime.doctor.machine as room

    monkeypatch.setattr(room, "limits", lambda: Limits(GIB, GIB // 2, None))
    memory = machine([]).memory
    assert (memory.limit, memory.available) == (GIB, GIB // 2)
    monkeypatch.setattr(room, "limits", lambda: Limits(1 << 50, 1 << 49, None))
    memory = machine([]).memory
    assert memory.limit is None
    assert memory.available <= memory.total == psutil.virtual_memory().total


def test_a_cache_is_told_only_where_it_was_set(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert [one.what for one in machine([]).disks] == ["working directory", "temporary files"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "later"))
    last = machine([]).disks[-1]
    assert (last.what, last.path, last.free) == ("HF_HOME", str(tmp_path / "later"), None)


def test_a_missing_psutil_leaves_memory_unknown_and_is_recorded(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    broken = []
    found = machine(broken)
    assert found.memory is None
    assert found.processor is not None
    assert {one.what for one in broken} == {"psutil"}
