"""The T5 encoder against transformers."""

import pytest
import torch

from diffquant.runtime.loading import build
from diffquant.runtime.models.t5 import relative_buckets

CASES = {
    "v1.1": {"feed_forward_proj": "gated-gelu"},
    "other heads": {"feed_forward_proj": "gated-gelu", "num_heads": 3, "d_kv": 10, "num_layers": 3},
    "not gated": {"feed_forward_proj": "relu", "relative_attention_num_buckets": 16},
}


@pytest.mark.oracle
@pytest.mark.parametrize("length", [9, 200])
@pytest.mark.parametrize("name", CASES)
def test_states_equal_transformers(name, length, oracle):
    config = {
        "vocab_size": 60,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        **CASES[name],
    }
    settings = oracle.transformers.T5Config(**config)
    reference = oracle.randomize(oracle.transformers.T5EncoderModel(settings), seed=6)
    ours = build("t5", oracle.t5_weights(reference), settings.to_dict())
    ids = torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(ids).last_hidden_state
        found = ours(ids)
    oracle.assert_close(found, wanted)


def test_buckets_separate_before_and_after():
    table = relative_buckets(400, 32, 128)
    assert table[5, 5] == 0
    assert table[5, 4] == 1
    assert table[5, 6] == 17
    assert table[399, 0] == 15
    assert table[0, 399] == 31
