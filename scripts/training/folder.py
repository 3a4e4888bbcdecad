"""Save a trained pipeline as a Diffusers folder with the published key names, and pack it."""

import inspect
import io
import json
import shutil
import tarfile
from pathlib import Path

import diffusers
import torch
from assemble import Parts
from loop import STAGES, Stage
from safetensors.torch import load_file, save_file

__all__ = ["folder_bytes", "load", "pack", "save"]

_QWEN_KEYS = (("model.language_model.", "model."), ("model.visual.", "visual."))


def save(parts: Parts, target: Path) -> None:
    """Write the folder, replacing an older one."""
    family = parts.family
    shutil.rmtree(target, ignore_errors=True)
    dtype = getattr(torch, family.dtype)
    modules = {name: module.cpu().to(dtype) for name, module in parts.modules.items()}
    cls, config = family.scheduler
    known = inspect.signature(getattr(diffusers, cls).__init__).parameters
    scheduler = getattr(diffusers, cls)(**{k: v for k, v in config.items() if k in known})
    more: dict[str, object] = {}
    if family.name == "sd15":
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if family.name == "sdxl":
        more = {"add_watermarker": False}
    pipeline_class = getattr(diffusers, family.pipeline)
    pipeline = pipeline_class(scheduler=scheduler, **modules, **parts.tokenizers, **more)
    pipeline.save_pretrained(target, safe_serialization=True)
    # Fields of other samplers stay in the file, as in the published one, for who switches to them.
    path = target / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}, indent=2) + "\n")
    path = target / "vae" / "config.json"
    autoencoder = json.loads(path.read_text())
    if "sample_size" not in autoencoder:
        # The class has no such field; diffusers passes over names that begin with an underscore.
        path.write_text(json.dumps({**autoencoder, "_sample_size": 128}, indent=2) + "\n")
    for name in parts.tokenizers:
        # transformers rewrites tokenizer files in its own version's way; ours suit every version.
        shutil.rmtree(target / name)
        shutil.copytree(parts.tokenizer_files / name, target / name)
    for name in family.text:
        _publish_keys(target / name / "model.safetensors", type(modules[name]).__name__)
    _forget_paths(target)


def load(parts: Parts, source: Path) -> list[Stage]:
    """Take every part's weights from a saved folder; return the stages behind them."""
    for name, module in parts.modules.items():
        kept = type(module).from_pretrained(source / name, torch_dtype=torch.float32)
        device = next(module.parameters()).device
        module.load_state_dict(kept.state_dict())
        module.to(device)
    return [Stage(**row) for row in json.loads((source / STAGES).read_text())]


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def pack(folder: Path, extra: list[Path], target: Path) -> None:
    """Write one plain tar of the folder and the extra files, without dates or owners."""
    files = [(f, f.relative_to(folder.parent)) for f in sorted(folder.rglob("*")) if f.is_file()]
    files += [(f, Path(f.name)) for f in extra]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w") as tar:
        for path, name in files:
            entry = tarfile.TarInfo(name.as_posix())
            entry.size, entry.mode = path.stat().st_size, 0o644
            tar.addfile(entry, io.BytesIO(path.read_bytes()))


def _publish_keys(path: Path, model: str) -> None:
    """Give text encoders the key names of the published files.

    transformers 5 saves CLIP text models without ``text_model.`` and Qwen2.5-VL with
    ``model.language_model.``; programs that read published checkpoints expect the older names.
    """

    def published(key: str) -> str:
        if model.startswith("CLIPText") and not key.startswith(("text_model.", "text_projection")):
            return "text_model." + key
        if model.startswith("Qwen2_5_VL"):
            for prefix, old in _QWEN_KEYS:
                if key.startswith(prefix):
                    return old + key.removeprefix(prefix)
        return key

    tensors = {published(key): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _forget_paths(folder: Path) -> None:
    """Drop the `_name_or_path` fields: they would name a folder of the training machine."""
    for path in folder.rglob("*.json"):
        if path.name not in ("config.json", "model_index.json"):
            continue
        config = json.loads(path.read_text("utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
