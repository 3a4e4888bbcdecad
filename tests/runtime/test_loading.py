"""Building models around packed weights."""

import pytest
import torch

from diffquant.core.errors import MissingKeys, UnknownFormat, UnmappedKeys, UnsupportedShape
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import MODELS, build


def clip_weights(width=8):
    shapes = {
        "text_model.embeddings.token_embedding.weight": (20, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
    }
    layer = "text_model.encoder.layers.0"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
        shapes[f"{layer}.{name}.weight"] = (width, width)
        shapes[f"{layer}.{name}.bias"] = (width,)
    for name in ("layer_norm1", "layer_norm2"):
        shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
    shapes |= {f"{layer}.mlp.fc1.weight": (12, width), f"{layer}.mlp.fc1.bias": (12,)}
    shapes |= {f"{layer}.mlp.fc2.weight": (width, 12), f"{layer}.mlp.fc2.bias": (width,)}
    return {key: PackedWeight.of(torch.randn(shape).half()) for key, shape in shapes.items()}


def test_weights_stay_packed_and_small_parameters_take_the_compute_dtype():
    model = build("clip", clip_weights(), {"num_attention_heads": 2}, dtype=torch.bfloat16)
    fc1 = model.text_model.encoder.layers[0].mlp.fc1
    assert fc1.bound().formats == ("f16",)
    assert fc1.bias.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.zeros(1, 77, dtype=torch.int64)).last.dtype == torch.bfloat16


def test_missing_keys_are_all_carried():
    weights = clip_weights()
    gone = {"text_model.final_layer_norm.bias", "text_model.encoder.layers.0.mlp.fc2.weight"}
    with pytest.raises(MissingKeys, match=r"clip: missing .*fc2\.weight") as caught:
        build("clip", {k: v for k, v in weights.items() if k not in gone}, {})
    assert set(caught.value.keys) == gone


def test_unexpected_keys_are_refused():
    weights = {**clip_weights(), "text_model.embeddings.position_ids": clip_weights().popitem()[1]}
    with pytest.raises(UnmappedKeys, match="position_ids"):
        build("clip", weights, {})


@pytest.mark.parametrize(
    "key", ["text_model.final_layer_norm.bias", "text_model.encoder.layers.0.mlp.fc2.weight"]
)
def test_a_shape_against_its_neighbours_is_named(key):
    weights = {**clip_weights(), key: PackedWeight.of(torch.zeros(5, 5))}
    with pytest.raises(UnsupportedShape, match=key):
        build("clip", weights, {"num_attention_heads": 2})


def test_unknown_kind_lists_the_known():
    with pytest.raises(UnknownFormat, match="vae_kl"):
        build("vae", {}, {})


@pytest.mark.parametrize("kind", MODELS)
def test_an_empty_part_is_a_missing_key(kind):
    with pytest.raises(MissingKeys):
        build(kind, {}, {})
