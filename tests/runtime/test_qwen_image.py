"""The Qwen-Image transformer against diffusers' QwenImageTransformer2DModel."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import build
from diffquant.runtime.models import qwen_image

CASES = {
    "text to image": {},
    "three heads, four blocks": {
        "num_attention_heads": 3,
        "num_layers": 4,
        "axes_dims_rope": (8, 12, 12),
        "in_channels": 32,
        "out_channels": 8,
    },
    "edit 2511": {"zero_cond_t": True},
    "layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}
SIZES = {
    "one picture": [(1, 3, 5)],
    "one odd picture": [(1, 7, 1)],
    "three pictures": [(1, 4, 2), (1, 3, 3), (1, 6, 1)],
    "frames": [(2, 3, 2), (1, 2, 2)],
}


def tiny(oracle, **changes):
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 24,
        **changes,
    }
    config["attention_head_dim"] = sum(config["axes_dims_rope"])
    return oracle.randomize(oracle.diffusers.QwenImageTransformer2DModel(**config), seed=3)


def ours_of(oracle, reference):
    weights = {key: PackedWeight.of(value) for key, value in reference.state_dict().items()}
    return build("qwen_image", weights, reference.config)


def inputs(config, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    length = sum(frames * rows * columns for frames, rows, columns in sizes)
    img = torch.randn(2, length, config.in_channels, generator=generator)
    txt = torch.randn(2, 6, config.context, generator=generator)
    condition = torch.tensor([0, 1]) if config.condition else None
    return img, torch.tensor([0.75, 0.31]), txt, condition


@pytest.mark.oracle
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_diffusers(name, sizes, padded, oracle):
    reference = tiny(oracle, **CASES[name])
    ours = ours_of(oracle, reference)
    sizes = SIZES[sizes]
    img, t, txt, condition = inputs(ours.config, sizes, seed=len(sizes))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]) if padded else None
    with torch.no_grad():
        wanted = reference(
            hidden_states=img,
            timestep=t,
            encoder_hidden_states=txt,
            encoder_hidden_states_mask=mask,
            img_shapes=[sizes] * 2,
            additional_t_cond=condition,
        ).sample
        found = ours(img, t, txt, sizes, mask, condition)
    oracle.assert_close(found, wanted)


@pytest.mark.oracle
def test_padding_says_nothing(oracle):
    ours = ours_of(oracle, tiny(oracle))
    img, t, txt, _ = inputs(ours.config, [(1, 3, 5)], seed=0)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    with torch.no_grad():
        short = ours(img, t, txt[:, :4], [(1, 3, 5)])
        padded = ours(img, t, txt, [(1, 3, 5)], mask)
        unmasked = ours(img, t, txt, [(1, 3, 5)])
    oracle.assert_close(padded, short)
    assert (unmasked - short).abs().max() > 1e-3


@pytest.mark.oracle
def test_other_pictures_are_modulated_at_time_zero_only_where_the_config_says_so(oracle):
    plain, edit = (ours_of(oracle, tiny(oracle, zero_cond_t=still)) for still in (False, True))
    one, two = [(1, 3, 5)], [(1, 3, 5), (1, 2, 2)]
    with torch.no_grad():
        for sizes, equal in ((one, True), (two, False)):
            img, t, txt, _ = inputs(plain.config, sizes, seed=1)
            assert torch.equal(plain(img, t, txt, sizes), edit(img, t, txt, sizes)) is equal


@pytest.mark.oracle
def test_wrong_inputs_are_refused(oracle):
    plain, layered = (
        ours_of(oracle, tiny(oracle)),
        ours_of(oracle, tiny(oracle, **CASES["layered"])),
    )
    img, t, txt, _ = inputs(plain.config, [(1, 3, 5)], seed=0)
    with pytest.raises(UsageError, match="do not add up to the 15 tokens"):
        plain(img, t, txt, [(1, 3, 4)])
    with pytest.raises(UsageError, match="takes no additional timestep condition"):
        plain(img, t, txt, [(1, 3, 5)], condition=torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="needs an additional timestep condition"):
        layered(img, t, txt, [(1, 3, 5)])


@pytest.mark.oracle
def test_what_is_not_implemented_is_refused(oracle):
    reference = tiny(oracle)
    weights = {key: PackedWeight.of(value) for key, value in reference.state_dict().items()}
    for field, value in (("guidance_embeds", True), ("patch_size", 1)):
        with pytest.raises(ArchitectureError, match=f"config field {field} is {value}"):
            build("qwen_image", weights, {**reference.config, field: value})
    with pytest.raises(
        ArchitectureError, match=r"\(16, 56, 56\) do not add up to the head width 16"
    ):
        build("qwen_image", weights, {})


def test_positions_count_from_the_middle_and_text_follows():
    pictures, words = qwen_image.positions([(1, 3, 2)], 2)
    assert pictures.tolist() == [[0, row, column] for row in (-2, -1, 0) for column in (-1, 0)]
    assert words.tolist() == [[1, 1, 1], [2, 2, 2]]
    layered, words = qwen_image.positions([(1, 1, 1)] * 4, 1, layered=True)
    assert layered[:, 0].tolist() == [0, 1, 2, -1]
    assert words.tolist() == [[3, 3, 3]]
