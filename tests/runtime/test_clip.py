"""The CLIP text encoder against transformers."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError
from diffquant.runtime.loading import build
from diffquant.runtime.models import clip

CASES = {
    "quick_gelu, old eos": {"hidden_act": "quick_gelu", "eos_token_id": 2},
    "gelu, eos by id": {"hidden_act": "gelu", "eos_token_id": 98, "hidden_size": 48},
    "projected": {"hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 20},
    "deep": {"num_hidden_layers": 4, "num_attention_heads": 8, "layer_norm_eps": 1e-3},
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_states_equal_transformers(name, oracle):
    config = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 97,
        "eos_token_id": 99,
        "pad_token_id": 1,
        **CASES[name],
    }
    projected = "projection_dim" in config
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    settings = oracle.transformers.CLIPTextConfig(**config)
    reference = oracle.randomize(getattr(oracle.transformers, kind)(settings), seed=5)
    ours = build("clip", oracle.clip_weights(reference), settings.to_dict())
    ids = torch.full((2, 77), 98)
    ids[0, :9] = torch.tensor([97, 3, 4, 5, 6, 7, 8, 9, 99])
    ids[1, :4] = torch.tensor([97, 50, 99, 0])
    with torch.no_grad():
        wanted = reference(ids, output_hidden_states=True)
        found = ours(ids)
    oracle.assert_close(found.last, wanted.last_hidden_state)
    oracle.assert_close(found.hidden[-2], wanted.hidden_states[-2])
    if projected:
        oracle.assert_close(found.projected, wanted.text_embeds)
    else:
        oracle.assert_close(found.pooled, wanted.pooler_output)
        assert found.projected is None


def test_unknown_activation_lists_the_known():
    shapes = {
        "text_model.embeddings.token_embedding.weight": (10, 64),
        "text_model.embeddings.position_embedding.weight": (77, 64),
        "text_model.encoder.layers.0.mlp.fc1.weight": (128, 64),
    }
    assert clip.config_from(shapes, {}).heads == 1
    with pytest.raises(ArchitectureError, match="quick_gelu"):
        clip.config_from(shapes, {"hidden_act": "swiglu"})
