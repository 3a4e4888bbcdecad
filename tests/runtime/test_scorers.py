"""The scorer must tell right pictures from wrong ones, so most tests here feed it wrong ones."""

from dataclasses import replace

import numpy as np
import pytest

from diffquant.runtime.scorers import (
    COLOURS,
    DEMO_PROMPTS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    parse,
    psnr_db,
    random_prompts,
    render,
    score,
)

RED_CIRCLE = parse("a small red circle on a blue background at the left")
SAMPLE = [*DEMO_PROMPTS, *random_prompts(60, seed=5)]


def test_grammar_size_and_round_trip() -> None:
    scenes = all_scenes()
    assert len(scenes) == 5 * 8 * 7 * 2 * 5 == len({s.prompt for s in scenes})
    assert all(parse(s.prompt) == s for s in scenes)


def test_parse_forgives_case_spaces_and_full_stop() -> None:
    assert parse("  A small RED circle on a  blue background at the left. ") == RED_CIRCLE


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a photo of a fox", "outside the demo grammar"),
        ("", "outside the demo grammar"),
        ("a small red hexagon on a blue background at the left", "unknown shape 'hexagon'"),
        ("a tiny red circle on a blue background at the left", "known: small, large"),
        ("a small red circle on a blue background in the corner", "unknown place"),
        ("a small blue circle on a blue background at the left", "both blue"),
    ],
)
def test_parse_names_what_is_wrong(prompt: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(prompt)


def test_random_prompts_repeat_by_seed_and_differ_from_each_other() -> None:
    assert random_prompts(50, seed=1) == random_prompts(50, seed=1)
    assert random_prompts(50, seed=1) != random_prompts(50, seed=2)
    assert len(set(random_prompts(2800, seed=3))) == 2800
    assert len(random_prompts(3000, seed=3)) == 3000
    assert random_prompts(0, seed=3) == []


def test_render_is_antialiased_and_keeps_the_border_free() -> None:
    for scene in all_scenes()[::97]:
        picture = render(scene)
        assert picture.shape == (128, 128, 3)
        assert picture.dtype == np.float32
        paper = np.array(COLOURS[scene.background], np.float32)
        edge = np.concatenate([picture[:3].reshape(-1, 3), picture[:, :3].reshape(-1, 3)])
        assert np.allclose(edge, paper, atol=1e-6)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2 or scene.shape == "square"


@pytest.mark.parametrize("prompt", SAMPLE)
def test_right_picture_scores_one(prompt: str) -> None:
    assert score(render(prompt), prompt).total == 1.0


@pytest.mark.parametrize("prompt", SAMPLE[:24])
def test_noise_blur_and_rounding_do_not_lower_the_score(prompt: str) -> None:
    picture = render(prompt)
    noisy = picture + np.random.default_rng(0).normal(0, 0.08, picture.shape)
    blurred = sum(np.roll(picture, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    assert score(noisy, prompt).total == 1.0
    assert score(blurred, prompt).total == 1.0
    assert score(np.rint(picture * 255).astype(np.uint8), prompt).total == 1.0


@pytest.mark.parametrize("side", [64, 100, 192, 256, 512])
def test_other_sizes_are_resized(side: int) -> None:
    for prompt in DEMO_PROMPTS:
        index = (np.arange(side) * 128) // side
        assert score(render(prompt)[index][:, index], prompt).total == 1.0


@pytest.mark.parametrize("prompt", SAMPLE[:24])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_pictures_score_zero(prompt: str, level: float) -> None:
    assert score(np.full((128, 128, 3), level, np.float32), prompt).total == 0.0


@pytest.mark.parametrize("prompt", SAMPLE[:24])
def test_flat_background_without_object_scores_zero(prompt: str) -> None:
    paper = np.broadcast_to(np.float32(COLOURS[parse(prompt).background]), (128, 128, 3))
    found = score(paper, prompt)
    assert found.background == 1.0
    assert found.total == 0.0


@pytest.mark.parametrize("prompt", SAMPLE[:24])
def test_noise_scores_near_zero(prompt: str) -> None:
    rng = np.random.default_rng(1)
    assert score(rng.random((128, 128, 3)), prompt).total < 0.05
    assert score(rng.integers(0, 2, (128, 128, 3)) * 1.0, prompt).total < 0.05


def _others(scene: Scene) -> list[tuple[str, Scene]]:
    tables = {"shape": SHAPES, "size": SIZES, "place": PLACES, "colour": COLOURS}
    tables["background"] = COLOURS
    return [
        (field, replace(scene, **{field: word}))
        for field, words in tables.items()
        for word in words
        if word != getattr(scene, field) and word not in (scene.colour, scene.background)
    ]


@pytest.mark.parametrize("prompt", SAMPLE[:16])
def test_each_wrong_attribute_is_found_and_only_that_one(prompt: str) -> None:
    for field, drawn in _others(parse(prompt)):
        found = score(render(drawn), prompt)
        right = {f: float(getattr(found, f)) for f in ("shape", "size", "place", "colour")}
        right["background"] = found.background
        assert right.pop(field) == 0.0, (field, drawn)
        assert set(right.values()) == {1.0}, (field, drawn)
        assert found.total <= 0.5


def test_scores_fall_as_a_picture_dissolves() -> None:
    picture, rng = render(RED_CIRCLE), np.random.default_rng(2)
    noise = rng.random(picture.shape)
    totals = [score((1 - a) * picture + a * noise, RED_CIRCLE).total for a in (0.0, 0.3, 0.6, 1.0)]
    assert totals[0] == 1.0
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.05


@pytest.mark.parametrize("shape", [(128, 128), (128, 64, 3), (128, 128, 1), (0, 0, 3)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"square colour picture"):
        score(np.zeros(shape, np.float32), RED_CIRCLE)


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        score(np.full((128, 128, 3), np.nan), RED_CIRCLE)


def test_psnr_of_a_known_error() -> None:
    picture = np.full((4, 4, 3), 0.5)
    assert psnr_db(picture, picture + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(picture, picture) == float("inf")
