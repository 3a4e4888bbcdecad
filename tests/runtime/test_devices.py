"""Devices, and the dtype each multiplies in hardware."""

import pytest
import torch

from diffquant.runtime.devices import auto_device, available_devices, native_dtype


def cpu_with(monkeypatch, *, onednn=True, **capabilities):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_cpu_with_bf16_instructions_computes_in_bfloat16(name, monkeypatch):
    cpu_with(monkeypatch, avx512_f=True, **{name: True})
    assert native_dtype("cpu") is torch.bfloat16


def test_cpu_without_them_computes_in_float32(monkeypatch):
    cpu_with(monkeypatch, avx512_f=True, avx512_bf16=False, fp16_arith=True)
    assert native_dtype("cpu") is torch.float32


def test_instructions_nobody_uses_do_not_count(monkeypatch):
    cpu_with(monkeypatch, onednn=False, avx512_bf16=True)
    assert native_dtype("cpu") is torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_older_torch_is_asked_in_its_own_way(supported, monkeypatch):
    cpu_with(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    assert native_dtype("cpu") is (torch.bfloat16 if supported else torch.float32)


def test_torch_that_cannot_say_gets_float32(monkeypatch):
    cpu_with(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert native_dtype("cpu") is torch.float32


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_cuda_emulates_bfloat16_before_ampere(capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert native_dtype("cuda:1") is wanted


def test_every_device_here_has_a_native_dtype():
    assert all(native_dtype(name).is_floating_point for name in available_devices())


class Card:
    """A CUDA card, as far as choosing goes."""

    def __init__(self, monkeypatch, answers):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        self.ones, self.answers = torch.ones, answers
        monkeypatch.setattr(torch, "ones", self.made)

    def made(self, count, device):
        assert device == "cuda"
        if not self.answers:
            raise RuntimeError("CUDA error: no kernel image is available\nfor execution")
        return self.ones(count)


def test_a_card_that_computes_is_taken_and_one_that_does_not_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert auto_device() == ("cpu", "torch reaches no CUDA card", False)
    card = Card(monkeypatch, answers=True)
    assert auto_device() == ("cuda", "a card", False)
    card.answers = False
    found = auto_device()
    assert (found.name, found.failed) == ("cpu", True)
    assert found.why.endswith("not compute: CUDA error: no kernel image is available for execution")
