"""The quantization error as a LoRA: names, sizes, what it holds, what is refused."""

import numpy as np
import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import to_canonical
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.lora.match import match_lora
from diffquant.convert.lora.parse import factors, parse_lora
from diffquant.convert.lora.written import kohya_modules
from diffquant.convert.output import fingerprint
from diffquant.convert.plan import Request
from diffquant.core.errors import UnsupportedShape, UsageError
from diffquant.io import open_source
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.io.inputs import LayerInputs, open_inputs, write_inputs
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named

CASES = {
    "nf4 file": ("flux1-shapes", "nf4", "safetensors", ".safetensors"),
    "nvfp4 file": ("qwen-image-shapes", "nvfp4", "safetensors", ".safetensors"),
    "q4_k GGUF": ("flux1-shapes", "q4_k_s", "gguf", ".gguf"),
    "UNet file": ("sd15-shapes", "nf4", "safetensors", ".safetensors"),
    "UNet GGUF": ("sdxl-shapes", "q4_0", "gguf", ".gguf"),
    "nf4 folder": ("flux1-shapes", "nf4", "folder", ""),
    "UNet folder": ("sd15-shapes", "nf4", "folder", ""),
}


def make(source, tmp_path, kind, container, suffix, *, rank=8, rules=(), **rest):
    out, lora = tmp_path / f"out{suffix}", tmp_path / "error.safetensors"
    request = Request(container, type=type_named(kind), lora_rank=rank, rules=rules)
    rest.setdefault("verify", "none")
    return out, lora, run_job(source, out, request, error_lora=lora, **rest)


def canonical(path):
    """Canonical key -> values of the denoiser's weights, whether they are packed, shapes of all."""
    with opened(path) as (_, logical, match):
        part = next(one for one in match.parts if one.name == "denoiser")
        values, packed, shapes = {}, {}, {}
        for one in to_canonical(part):
            shapes[one.target] = one.shape
            if len(one.shape) > 1 and not one.transpose and not one.axis:
                rows = [logical.read(p.key, (p.start, p.stop)) for p in one.pieces]
                values[one.target] = np.concatenate(rows)
                packed[one.target] = {logical.tensors[p.key].is_quantized for p in one.pieces}
        return values, packed, shapes, match.architecture


def deltas(lora, architecture, shapes):
    """Canonical key -> what the LoRA adds, by our own reader; and how it matched."""
    with open_source(lora) as source:
        file = parse_lora(source)
        found = match_lora(file.layers, ARCHITECTURES[architecture], {"denoiser": shapes})
        out = {target.key: np.zeros(shapes[target.key], np.float32) for target in found.targets}
        for target in found.targets:
            down, up = factors(bind(source), target.layer)
            product = up @ down * target.layer.scale
            rows = slice(*target.rows) if target.rows else slice(None)
            part = slice(*target.up_rows) if target.up_rows else slice(None)
            out[target.key][rows] += product[part]
        return out, file, found


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_best_correction_of_its_rank(examples, tmp_path, case):
    model, kind, container, suffix = CASES[case]
    out, lora, report = make(examples / model, tmp_path, kind, container, suffix)
    source, _, shapes, architecture = canonical(examples / model)
    decoded, packed, *_ = canonical(out)
    added, file, found = deltas(lora, architecture, shapes)
    assert (found.unmatched, found.shape_mismatch, file.ignored) == ((), (), ())
    assert found.matched == report.error_lora.layers == len(file.layers)
    reached = {target.key for target in found.targets}
    rows = {key: sum(t.key == key for t in found.targets) for key in reached}
    assert {key for key in packed if packed[key] == {True}} >= reached
    before = after = 0.0
    for key in reached:
        error = (source[key] - decoded[key]).astype(np.float64)
        rest = error - added[key]
        before, after = before + (error**2).sum(), after + (rest**2).sum()
        if rows[key] == 1:  # a fused weight of a folder has a LoRA for each of its pieces
            best = (np.linalg.svd(error, compute_uv=False)[:8] ** 2).sum()
            assert 0.97 * best <= (error**2).sum() - (rest**2).sum() <= 1.001 * best, key
    size = sum((source[key].astype(np.float64) ** 2).sum() for key in reached)
    assert report.error_lora.error == pytest.approx((before / size) ** 0.5, rel=1e-4)
    assert report.error_lora.corrected_error == pytest.approx((after / size) ** 0.5, rel=1e-4)
    assert after < before


def test_names_are_those_that_loaders_know(examples, tmp_path):
    _, lora, _ = make(examples / "flux1-shapes", tmp_path, "nf4", "safetensors", ".safetensors")
    with open_source(lora) as source:
        name = "lora_unet_double_blocks_0_img_attn_qkv"
        assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= set(
            source.specs
        )
        assert all(key.startswith("lora_unet_") for key in source.specs)
        assert {spec.dtype for spec in source.specs.values()} == {"F16"}
        assert source.read(f"{name}.alpha").view("<f2")[0] == 8
        assert source.metadata["ss_network_dim"] == source.metadata["ss_network_alpha"] == "8"
        assert source.metadata["ss_base_model_version"] == "flux1"
        assert source.metadata["modelspec.architecture"] == "flux-1-dev/lora"
        assert source.metadata["diffquant.kind"] == "error_lora"
        assert source.metadata["diffquant.lora.base.name"] == "out.safetensors"
        with open_source(tmp_path / "out.safetensors") as base:
            assert source.metadata["diffquant.lora.base.fingerprint"] == fingerprint(base)


def test_a_unet_goes_by_diffusers_names(examples, tmp_path):
    _, lora, _ = make(examples / "sd15-shapes", tmp_path, "nf4", "safetensors", ".safetensors")
    with open_source(lora) as source:
        names = {key.partition(".")[0] for key in source.specs}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    assert not any("input_blocks" in name for name in names)
    component = ARCHITECTURES["flux1"].component("denoiser")
    assert kohya_modules(component, {"img_in.weight": (8, 8)}) == {}


def test_a_folder_gets_peft_names(examples, tmp_path):
    _, lora, _ = make(examples / "sd15-shapes", tmp_path, "nf4", "folder", "")
    with open_source(lora) as source:
        assert all(key.startswith("unet.") for key in source.specs)
        ends = {key.rpartition(".lora_")[2] for key in source.specs}
    assert ends == {"A.weight", "B.weight"}


def test_the_plan_states_its_size_and_memory(examples, tmp_path):
    source = examples / "flux1-shapes"
    _, lora, dry = make(source, tmp_path, "q4_k_s", "gguf", ".gguf", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert any(note.startswith("error LoRA error.safetensors: rank 8") for note in dry.notes)
    assert (dry.error_lora.error, dry.error_lora.corrected_error) == (None, None)
    _, lora, made = make(source, tmp_path, "q4_k_s", "gguf", ".gguf")
    with open_source(lora) as found:
        assert sum(spec.nbytes for spec in found.specs.values()) == dry.error_lora.nbytes
    assert made.error_lora.nbytes == dry.error_lora.nbytes
    assert dry.peak_nbytes == made.peak_nbytes


def test_convolutions_are_counted_and_left_out(examples, tmp_path):
    rules = (Rule("in_layers.2.weight", "q8_0", "test"),)
    source = examples / "sd15-shapes"
    request = Request("gguf", type=type_named("q4_0"), lora_rank=8, rules=rules, target="sdcpp")
    report = run_job(
        source, tmp_path / "a.gguf", request, error_lora=tmp_path / "l.safetensors", dry_run=True
    )
    packed = [r for r in report.tensors if r.stored == "q8_0" and "in_layers.2" in r.key]
    if packed:
        assert report.error_lora.without["weights that are no matrix"] == len(packed)
        assert "without" in report.notes[-1]


def test_other_parts_are_counted_and_left_out(examples, tmp_path):
    request = Request("safetensors", type=type_named("fp8_scaled"), lora_rank=4, all_parts=True)
    report = run_job(
        examples / "flux1-shapes",
        tmp_path / "a.safetensors",
        request,
        error_lora=tmp_path / "l.safetensors",
        dry_run=True,
    )
    assert any(why.startswith("weights of text_encoder") for why in report.error_lora.without)


def test_all_layers_have_one_rank_that_of_the_largest_at_most(examples, tmp_path):
    """Diffusers scales layers of another rank than most wrongly."""
    rules = (Rule("img_in.weight", "nf4", "test"),)  # 64 columns, where others have 256
    _, lora, report = make(
        examples / "flux1-shapes",
        tmp_path,
        "nf4",
        "safetensors",
        ".safetensors",
        rank=1024,
        rules=rules,
    )
    with open_source(lora) as source:
        downs = [s for key, s in source.specs.items() if key.endswith("lora_down.weight")]
        ups = [s for key, s in source.specs.items() if key.endswith("lora_up.weight")]
    ranks = {spec.shape[0] for spec in downs} | {spec.shape[1] for spec in ups}
    full = [min(up.shape[0], down.shape[1]) for up, down in zip(ups, downs, strict=True)]
    assert ranks == {max(full)} == {report.error_lora.rank}
    assert min(full) < max(full)
    assert report.error_lora.corrected_error < 0.02 * report.error_lora.error


def test_threads_do_not_change_the_bytes(examples, tmp_path, digest):
    found = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        _, lora, _ = make(
            examples / "flux1-shapes", folder, "q4_k_s", "gguf", ".gguf", workers=workers
        )
        found.append(digest(lora))
    assert found[0] == found[1]


QKV = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture
def skewed(tmp_path):
    """Statistics that say: of this layer's 256 columns, the first 16 are what counts."""
    squares = np.where(np.arange(256) < 16, 1e4, 1e-2).astype(np.float32)
    path = tmp_path / "inputs.safetensors"
    write_inputs(path, {QKV: LayerInputs(np.zeros(256, "f4"), np.diag(squares), 5)}, {})
    matrix = ImportanceMatrix(
        {QKV: Entry(squares.reshape(1, -1).astype(np.float64), np.array([1]))}, files=("m.gguf",)
    )
    return path, matrix


@pytest.mark.parametrize("by", ["matrix", "inputs"])
def test_statistics_weigh_the_error(examples, tmp_path, skewed, by):
    def error_at(**rest):
        out, lora, report = make(
            examples / "flux1-shapes",
            tmp_path,
            "nf4",
            "safetensors",
            ".safetensors",
            rank=4,
            force=True,
            **rest,
        )
        source, _, shapes, _ = canonical(examples / "flux1-shapes")
        decoded = canonical(out)[0]
        added, _, _ = deltas(lora, "flux1", shapes)
        rest = source[QKV] - decoded[QKV] - added[QKV]
        return float((rest[:, :16] ** 2).sum()), report

    plain, told = error_at()
    assert told.error_lora.weighed_gain_db is None
    with open_inputs(skewed[0]) as inputs:
        given = {"inputs": inputs} if by == "inputs" else {"matrix": skewed[1]}
        weighed, told = error_at(**given)
    assert weighed < 0.85 * plain
    assert told.error_lora.weighed_gain_db > 0.5
    assert "1 weighed by" in told.notes[-1]
    assert not any("changes nothing" in text for text in told.warnings)


def test_statistics_of_another_model_are_refused(examples, tmp_path):
    path = tmp_path / "inputs.safetensors"
    write_inputs(path, {QKV: LayerInputs(np.zeros(8, "f4"), np.eye(8, dtype="f4"), 5)}, {})
    with open_inputs(path) as inputs, pytest.raises(UnsupportedShape, match="has 8 columns"):
        make(
            examples / "flux1-shapes", tmp_path, "nf4", "safetensors", ".safetensors", inputs=inputs
        )
    assert list(tmp_path.iterdir()) == [path]


def test_targets_are_checked_before_the_work(examples, tmp_path):
    source = examples / "flux1-shapes"
    request = Request("gguf", type=type_named("q4_k_s"), lora_rank=8)
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    out = tmp_path / "a.gguf"
    for lora, why in (
        (tmp_path / "l.gguf", "written as .safetensors"),
        (taken, "use --force"),
        (tmp_path / "none" / "l.safetensors", "does not exist"),
        (source / "transformer" / "l.safetensors", "or part of it"),
    ):
        with pytest.raises(UsageError, match=why):
            run_job(source, out, request, error_lora=lora)
    request = Request("safetensors", type=type_named("nf4"), lora_rank=8)
    same = tmp_path / "same.safetensors"
    with pytest.raises(UsageError, match="or part of it"):
        run_job(source, same, request, error_lora=same)
    assert [one.name for one in tmp_path.iterdir()] == ["taken.safetensors"]


def test_nothing_packed_is_refused(examples, tmp_path):
    with pytest.raises(UsageError, match="packs no linear layer"):
        make(examples / "flux1-shapes", tmp_path, "bf16", "gguf", ".gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_output_and_no_half_lora(examples, tmp_path, monkeypatch):
    from diffquant.convert.lora import error

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(error, "best_factors", interrupted)
    with pytest.raises(KeyboardInterrupt, match="is whole, its error LoRA was not written"):
        make(examples / "flux1-shapes", tmp_path, "q4_k_s", "gguf", ".gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["out.gguf"]
