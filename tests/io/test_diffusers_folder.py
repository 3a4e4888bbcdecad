"""Diffusers folders: which file a component's tensors come from, configs, side files, output."""

import json

import numpy as np
import pytest

from diffquant.core.errors import CheckpointError, MalformedFile, MissingKeys, PlanMismatch
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.io.folder_sink import component_file

PLAIN = "diffusion_pytorch_model.safetensors"
FP16 = "diffusion_pytorch_model.fp16.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def put(tmp_path, writing):
    """Write a file of the pipeline: a tensor named after it, a shard index, or JSON."""
    _, write_all = writing

    def write(name, content=None):
        path = tmp_path / "pipe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        key = path.stem.split(".")[-1]
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        elif path.suffix == ".json":
            shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
            write_all(
                path.parent / shard,
                {"sharded": np.zeros(4, np.uint8)},
                [TensorSpec("sharded", "F32", (1,))],
            )
            path.write_text(json.dumps({"weight_map": {"sharded": shard}}))
        elif path.suffix == ".bin":
            torch = pytest.importorskip("torch")
            torch.save({"pickled": torch.zeros(1)}, path)
        else:
            write_all(path, {key: np.zeros(4, np.uint8)}, [TensorSpec(key, "F32", (1,))])
        return tmp_path / "pipe"

    return write


@pytest.mark.parametrize(
    ("names", "key"),
    [
        ((PLAIN,), "diffusion_pytorch_model"),
        ((PLAIN, FP16), "diffusion_pytorch_model"),
        ((FP16,), "fp16"),
        ((INDEX,), "sharded"),
        ((INDEX, FP16), "sharded"),
        (("diffusion_pytorch_model.bin", FP16), "fp16"),
        (("diffusion_pytorch_model.bin",), "pickled"),
        (("diffusion_pytorch_model.fp16.bin",), "pickled"),
        (("diffusion_pytorch_model.safetensors.index.fp16.json",), "sharded"),
        (("other.safetensors",), "other"),
    ],
)
def test_component_file_is_chosen_in_order(put, names, key):
    path = put("unet/config.json", {"in_channels": 4})
    for name in names:
        put(f"unet/{name}")
    with open_source(path) as source:
        assert list(source.specs) == [f"unet/{key}"]
        assert source.container == "diffusers_folder"


def test_model_index_gives_the_order_and_leaves_out_null(put):
    for name in ("vae", "unet", "safety_checker", "stray"):
        put(f"{name}/{PLAIN}")
    index = {"_class_name": "P", "_diffusers_version": "1", "unet": ["diffusers", "U"]}
    index |= {"vae": ["diffusers", "V"], "safety_checker": [None, None], "tokenizer": ["t", "T"]}
    path = put("model_index.json", index)
    with open_source(path) as source:
        assert list(source.components) == ["unet", "vae"]
        assert source.configs["model_index.json"]["_class_name"] == "P"


def test_no_model_index_takes_every_component(put):
    put(f"vae/{PLAIN}")
    path = put(f"transformer/{PLAIN}")
    with open_source(path) as source:
        assert list(source.components) == ["transformer", "vae"]


def test_bare_component_has_bare_keys(put):
    put("config.json", {"a": 1})
    path = put(PLAIN)
    with open_source(path) as source:
        assert list(source.specs) == ["diffusion_pytorch_model"]
        assert source.configs == {"config.json": {"a": 1}}
        assert source.read("diffusion_pytorch_model").size == 4


def test_configs_and_side_files(put):
    put(f"unet/{PLAIN}")
    put("unet/config.json", {"a": 1})
    put("scheduler/scheduler_config.json", {"b": 2})
    put("tokenizer/tokenizer_config.json", {"c": 3})
    put("tokenizer/vocab.json", {"x": 0})
    put("tokenizer/merges.txt", "a b")
    put("README.md", "hello")
    put(".git/config", "hidden")
    index = {name: ["l", "C"] for name in ("unet", "scheduler", "tokenizer")}
    path = put("model_index.json", index)
    with open_source(path) as source:
        assert set(source.configs) == {
            "model_index.json",
            "unet/config.json",
            "scheduler/scheduler_config.json",
            "tokenizer/tokenizer_config.json",
        }
        assert source.files == ("README.md", "tokenizer/merges.txt", "tokenizer/vocab.json")
        assert source.read_file("tokenizer/merges.txt") == b"a b"
        with pytest.raises(MissingKeys):
            source.read_file("../secret")


def test_malformed_config_and_no_tensors_are_refused(put):
    path = put("model_index.json", {"unet": ["diffusers", "U"]})
    with pytest.raises(CheckpointError, match="no component folder"):
        open_source(path)
    put(f"unet/{PLAIN}")
    put("unet/config.json", "[1]")
    with pytest.raises(MalformedFile, match="config is not a JSON object"):
        open_source(path)


def test_folder_of_checkpoints_is_no_pipeline(tmp_path, writing):
    plan, write_all = writing
    specs, tensors = plan()
    (tmp_path / "loras").mkdir()
    write_all(tmp_path / "loras" / "style.safetensors", tensors, specs)
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", f"unet/{PLAIN}"),
        ("transformer", f"transformer/{PLAIN}"),
        ("vae", f"vae/{PLAIN}"),
        ("text_encoder_2", "text_encoder_2/model.safetensors"),
        ("", PLAIN),
    ],
)
def test_component_file_names(component, name):
    assert component_file(component) == name


def test_written_folder_round_trips(tmp_path, put):
    for name in ("unet", "text_encoder"):
        put(f"{name}/{PLAIN}")
    put("tokenizer/merges.txt", "a b")
    names = {name: ["l", "C"] for name in ("unet", "text_encoder", "tokenizer")}
    path = put("model_index.json", names)
    with open_source(path) as source:
        files = {name: source.read_file(name) for name in source.files}
        specs = source.specs.values()
        with open_sink(tmp_path / "out", specs, {}, configs=source.configs, files=files) as sink:
            for key in source.specs:
                sink.write(key, 0, source.read(key))
            written = sink.commit()
    assert sorted(file.relative_to(tmp_path / "out").as_posix() for file in written) == [
        "model_index.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        f"unet/{PLAIN}",
    ]
    assert (tmp_path / "out/model_index.json").read_text() == json.dumps(names, indent=2) + "\n"
    with open_source(tmp_path / "out") as source:
        assert source.metadata["unet/format"] == "pt"
        assert source.read_file("tokenizer/merges.txt") == b"a b"


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "a/../x.json", ""])
def test_side_files_stay_inside(tmp_path, name):
    with pytest.raises(PlanMismatch, match="stay inside"):
        open_sink(tmp_path / "out", [], {}, files={name: b""})
    assert not list(tmp_path.iterdir())


def test_keys_without_a_component_are_refused(tmp_path):
    specs = [TensorSpec("unet/a", "F32", (1,)), TensorSpec("b", "F32", (1,))]
    with pytest.raises(PlanMismatch, match="component"):
        open_sink(tmp_path / "out", specs, {})
    with pytest.raises(PlanMismatch, match="component"):
        open_sink(tmp_path / "out", [TensorSpec("../a", "F32", (1,))], {})
