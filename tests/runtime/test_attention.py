"""Attention whose queries are cut: what it finds, and how much of a matrix of scores it holds."""

import pytest
import torch
from torch.nn import functional

from diffquant.runtime.models import attention

HEADS, QUERIES, KEYS = 3, 70, 45


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, n, 8, generator=generator) for n in (QUERIES, KEYS, KEYS)]


@pytest.fixture
def unfused(monkeypatch):
    """No fused kernel serves, and little may be held; what is asked of torch is written down."""
    asked, plain = [], functional.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None):
        asked.append(q.shape[2])
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(attention, "_is_fused", lambda *_: False)
    monkeypatch.setattr(attention, "SCORES_NBYTES", 8 * 2 * HEADS * KEYS * 16)
    return asked


def mask_of(*shape):
    found = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.4
    return found.index_fill(-1, torch.tensor([0]), True)  # nobody is left without a key


MASKS = {
    "none": lambda: None,
    "of keys": lambda: mask_of(2, 1, 1, KEYS),
    "of queries and keys": lambda: mask_of(2, 1, QUERIES, KEYS),
    "of heads too": lambda: mask_of(2, HEADS, QUERIES, KEYS),
}


@pytest.mark.parametrize("name", MASKS)
def test_cut_queries_find_what_all_find(qkv, unfused, name):
    mask = MASKS[name]()
    found = attention.attention(*qkv, mask)
    assert unfused == [16, 16, 16, 16, 6]
    wanted = functional.softmax(
        (qkv[0] @ qkv[1].mT / 8**0.5).masked_fill(
            torch.tensor(False) if mask is None else ~mask, -torch.inf
        ),
        dim=-1,
    )
    assert torch.allclose(found, wanted @ qkv[2], atol=1e-6)


def test_a_fused_kernel_is_given_all_queries(qkv, unfused, monkeypatch):
    monkeypatch.setattr(attention, "_is_fused", lambda *_: True)
    attention.attention(*qkv)
    assert unfused == [QUERIES]


def test_scores_within_the_limit_are_not_cut(qkv, unfused, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_NBYTES", 8 * 2 * HEADS * KEYS * QUERIES)
    attention.attention(*qkv)
    assert unfused == [QUERIES]


def test_a_query_at_a_time_is_the_least(qkv, unfused, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_NBYTES", 1)
    attention.attention(*qkv)
    assert unfused == [1] * QUERIES


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_cpu_has_a_fused_kernel_and_mps_has_none(device):
    found = attention._fused(torch.device(device), torch.float32, 64, False)
    assert found == (device == "cpu")


def test_whether_a_kernel_serves_is_a_constant_to_the_compiler(qkv, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_NBYTES", 4096)
    compiled = torch.compile(attention.attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*qkv), attention.attention(*qkv))
    torch.compiler.reset()
