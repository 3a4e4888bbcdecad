"""Metrics: what they say of known pairs, and what is said where they cannot run."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from diffquant.core.errors import (
    MissingKeys,
    UnknownFormat,
    UnsafePickle,
    UnsupportedShape,
    UsageError,
)
from diffquant.runtime.comparison import METRICS
from diffquant.runtime.metrics import JUDGE_ROWS, MetricNeeds, Missing, open_judges
from diffquant.runtime.metrics.lpips import ALEXNET
from diffquant.runtime.scorers import DEMO_PROMPTS, render

PROMPT = DEMO_PROMPTS[0]
PLAIN = ("psnr", "ssim", "flip", "ssimulacra2", "prompt")


def noisy(picture, amount, seed=0):
    noise = np.random.default_rng(seed).standard_normal(picture.shape).astype(np.float32)
    return np.clip(picture + amount * noise, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def picture():
    return render(PROMPT)


@pytest.fixture(scope="module")
def opened():
    return open_judges(PLAIN, MetricNeeds((PROMPT,), (128, 128)))


def test_every_metric_of_the_contract_has_a_judge_and_only_those():
    assert list(JUDGE_ROWS) == list(METRICS)


def test_identical_pictures_have_the_best_value_of_every_metric(opened, picture):
    assert opened.judge(picture, picture, PROMPT) == {
        "psnr": None, "ssim": 1.0, "flip": 0.0, "ssimulacra2": 100.0, "prompt": 1.0
    }  # fmt: skip


@pytest.mark.parametrize("name", ["psnr", "ssim", "flip", "ssimulacra2"])
def test_more_noise_is_worse_by_every_metric_that_looks_at_the_reference(opened, picture, name):
    found = [
        opened.judge(picture, noisy(picture, amount), PROMPT)[name] for amount in (0.01, 0.05, 0.2)
    ]
    assert sorted(found, reverse=METRICS[name].better == "up") == found
    assert len(set(found)) == 3


def test_the_prompt_score_looks_at_the_candidate_and_its_prompt_alone(opened, picture):
    other = render(DEMO_PROMPTS[1])
    assert opened.judge(other, picture, PROMPT)["prompt"] == 1.0
    assert opened.judge(picture, other, PROMPT)["prompt"] < 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_that_is_not_finite_is_nan_by_every_metric(opened, picture, value):
    broken = picture.copy()
    broken[3, 5, 1] = value
    found = opened.judge(picture, broken, PROMPT)
    assert list(found) == list(PLAIN)
    assert all(math.isnan(one) for one in found.values())


def test_flip_and_ssimulacra2_are_those_of_the_programs_on_8_bit_files(opened, picture, tmp_path):
    from flip_evaluator import evaluate
    from ssimulacra2 import compute_ssimulacra2

    rounded = [np.rint(one * 255) / 255 for one in (picture, noisy(picture, 0.05))]
    names = [str(tmp_path / f"{index}.png") for index in range(2)]
    for name, one in zip(names, rounded, strict=True):
        Image.fromarray(np.rint(one * 255).astype(np.uint8)).save(name)
    found = opened.judge(*(one.astype(np.float32) for one in rounded), PROMPT)
    assert found["ssimulacra2"] == compute_ssimulacra2(*names)
    assert found["flip"] == pytest.approx(evaluate(*names, "LDR")[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "needs", "told"),
    [
        ("prompt", MetricNeeds(("a red fox",), (128, 128)), "'a red fox' is outside"),
        ("prompt", MetricNeeds((PROMPT,), (128, 64)), "128x64"),
        ("ssim", MetricNeeds(size=(8, 6)), "8x6"),
        ("ssimulacra2", MetricNeeds(size=(7, 64)), "7x64"),
        ("lpips", MetricNeeds(size=(30, 64)), "30x64"),
        ("clip", MetricNeeds(), "--clip-model"),
    ],
)
def test_what_cannot_run_is_missing_with_its_reason(name, needs, told):
    found = open_judges([name], needs)
    assert not found.judges
    assert told in found.missing[name]


def test_flip_is_missing_where_its_program_is_not_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flip_evaluator" else find(name)
    )
    found = open_judges(["flip"], MetricNeeds())
    assert "pip install flip-evaluator" in found.missing["flip"]


def test_unknown_and_repeated_metrics_are_refused():
    with pytest.raises(UnknownFormat, match="did you mean 'psnr'"):
        open_judges(["psmr"], MetricNeeds())
    with pytest.raises(UsageError, match="twice"):
        open_judges(["psnr", "ssim", "psnr"], MetricNeeds())


# LPIPS. What lpips 0.1.4 says with these weights and pictures, on torchvision 0.29.1's AlexNet and
# torch 2.13 (`lpips.LPIPS(net="alex", pnet_rand=True)`, its state filled as `alexnet` does, called
# with normalize=True): (seed, height, width, noise) -> distance.
GOLDEN = {
    (1, 64, 64, 0.1): 0.12019289284944534,
    (2, 128, 96, 0.02): 0.00657253060489893,
    (3, 128, 128, 0.5): 0.7673578262329102,
}
CONVS = {
    "0": (64, 3, 11, 11), "3": (192, 64, 5, 5), "6": (384, 192, 3, 3), "8": (256, 384, 3, 3),
    "10": (256, 256, 3, 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def alexnet():
    """Seeded weights, by torchvision's names and the lpips package's: backbone, heads."""
    rng = np.random.default_rng(7)
    backbone, heads = {}, {}
    for index, shape in CONVS.items():
        deviation = (2 / np.prod(shape[1:])) ** 0.5
        weight = (rng.standard_normal(shape) * deviation).astype(np.float32)
        backbone[f"features.{index}.weight"] = weight
        bias = (rng.standard_normal(shape[:1]) * 0.1).astype(np.float32)
        backbone[f"features.{index}.bias"] = bias
    for place, shape in enumerate(CONVS.values()):
        weight = np.abs(rng.standard_normal((1, shape[0], 1, 1))).astype(np.float32)
        heads[f"lin{place}.model.1.weight"] = weight
    return backbone, heads


@pytest.fixture(scope="module")
def whole_file(alexnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file({**alexnet[0], **alexnet[1]}, path)
    return path


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """No torchvision cache, no lpips package."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("diffquant.runtime.metrics.lpips._of_package", lambda: None)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("case", GOLDEN)
def test_lpips_is_that_of_the_lpips_package(case, whole_file):
    seed, height, width, amount = case
    rng = np.random.default_rng(seed)
    one = rng.random((height, width, 3), dtype=np.float32)
    noise = rng.standard_normal((height, width, 3)).astype(np.float32)
    other = np.clip(one + amount * noise, 0, 1).astype(np.float32)
    needs = MetricNeeds(size=(width, height), lpips_weights=whole_file)
    judge = open_judges(["lpips"], needs).judges["lpips"]
    assert judge(one, other, "") == pytest.approx(GOLDEN[case], rel=2e-5)
    assert judge(one, one, "") == 0


def test_lpips_finds_torchvisions_file_and_the_packages_heads(
    alexnet, nothing_installed, monkeypatch
):
    def opened():
        return open_judges(["lpips"], MetricNeeds())

    assert ALEXNET in opened().missing["lpips"]
    nothing_installed.mkdir(parents=True)
    backbone, heads = (
        {key: torch.from_numpy(value) for key, value in part.items()} for part in alexnet
    )
    torch.save(backbone, nothing_installed / "alexnet-owt-7be5be79.pth")
    assert "heads" in opened().missing["lpips"]
    assert "pip install --no-deps lpips" in opened().missing["lpips"]
    torch.save(heads, nothing_installed / "alex.pth")
    monkeypatch.setattr(
        "diffquant.runtime.metrics.lpips._of_package", lambda: nothing_installed / "alex.pth"
    )
    assert list(opened().judges) == ["lpips"]


def test_the_lpips_packages_heads_are_found_without_importing_it(monkeypatch, tmp_path):
    from diffquant.runtime.metrics import lpips

    folder = tmp_path / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "alex.pth").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert lpips._of_package() == folder / "alex.pth"


def test_a_file_of_other_weights_is_refused(alexnet, tmp_path, nothing_installed):
    backbone, heads = alexnet

    def opened(name, tensors):
        save_file(tensors, tmp_path / name)
        return open_judges(["lpips"], MetricNeeds(lpips_weights=tmp_path / name))

    less = {key: value for key, value in backbone.items() if key != "features.10.bias"}
    with pytest.raises(MissingKeys, match=r"no features\.10\.bias"):
        opened("less.safetensors", {**less, **heads})
    wide = {**backbone, **heads, "features.3.weight": np.zeros((192, 64, 3, 3), np.float32)}
    with pytest.raises(UnsupportedShape, match=r"features\.3\.weight: expected \(192, 64, 5, 5\)"):
        opened("wide.safetensors", wide)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.system, ("touch hostile",)

    (tmp_path / "alex.pth").write_bytes(pickle.dumps(Hostile(), 2))
    with pytest.raises(UnsafePickle):
        open_judges(["lpips"], MetricNeeds(lpips_weights=tmp_path / "alex.pth"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP with its processor."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"{one}</w>" for one in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(
        __import__("json").dumps({w: i for i, w in enumerate(words)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 8,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={
            **small, "vocab_size": len(words), "max_position_embeddings": 77,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.CLIPModel(config).save_pretrained(folder)
        tokenizer = transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.oracle
def test_clip_score_is_the_cosine_that_transformers_gives(clip_folder, picture):
    import transformers

    needs = MetricNeeds(("a fox",), (128, 128), clip_model=str(clip_folder))
    judge = open_judges(["clip"], needs).judges["clip"]
    found = judge(picture, picture, "a fox")
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    levels = np.rint(picture * 255).astype(np.uint8)
    inputs = processor(text=["a fox"], images=[levels], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
        cosine = float(out.logits_per_image[0, 0] / model.logit_scale.exp())
    assert found == pytest.approx(cosine, abs=1e-6)
    assert judge(picture, picture, "a fox " * 200) != found  # cut, and no crash
    assert judge(picture, 1 - picture, "a fox") != found


def test_what_is_no_clip_model_is_said(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="--clip-model"):
        open_judges(["clip"], MetricNeeds(clip_model=str(tmp_path)))


def test_missing_is_said_and_not_raised():
    assert isinstance(JUDGE_ROWS["clip"].open(MetricNeeds()), Missing)


def test_reports_tell_no_folder_of_this_machine(monkeypatch, tmp_path):
    from diffquant.runtime.metrics import lpips

    monkeypatch.setattr(lpips, "_checkpoints", lambda: tmp_path / "somewhere")
    assert str(tmp_path) not in lpips._told(lpips._checkpoints())
    assert lpips._told(Path.home() / "cache" / "x") == "~/cache/x"
