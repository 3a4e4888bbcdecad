"""Build a family's parts with random weights, and count them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from families import Family, clip_config, qwen_text_config, t5_config
from tinytok import EOS, write_clip, write_qwen, write_t5

__all__ = ["Parts", "build", "count", "size_table"]


@dataclass
class Parts:
    """The live parts of one pipeline; modules by their Diffusers folder names."""

    family: Family
    modules: dict[str, torch.nn.Module]
    tokenizers: dict[str, Any]
    tokenizer_files: Path

    @property
    def denoiser(self) -> Any:
        """The unet or the transformer."""
        return self.modules[self.family.denoiser[0]]

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.modules["vae"]

    @property
    def text_encoders(self) -> list[Any]:
        """Text encoders in the pipeline's order."""
        return [self.modules[name] for name in self.family.text]


def build(family: Family, words: list[str], *, seed: int) -> Parts:
    """Write the tokenizers to a temporary folder and draw every part's weights from `seed`."""
    torch.manual_seed(seed)
    files = Path(tempfile.mkdtemp(prefix=f"{family.folder}-tokenizers-"))
    modules: dict[str, torch.nn.Module] = {}
    tokenizers: dict[str, Any] = {}
    for part, (kind, options) in family.text.items():
        name = part.replace("text_encoder", "tokenizer")
        modules[part], tokenizers[name] = _text_part(kind, options, files / name, words)
    slot, cls, config = family.denoiser
    modules[slot] = getattr(diffusers, cls)(**config)
    if slot == "transformer":
        _zero_gates(modules[slot])
    cls, config = family.vae
    modules["vae"] = getattr(diffusers, cls)(**config)
    return Parts(family, modules, tokenizers, files)


def count(module: torch.nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())


def size_table(parts: Parts) -> str:
    """Weights and megabytes (16 bits each) per part, as text."""
    lines = [f"{parts.family.folder:<24}{'weights':>12}{'MB':>8}"]
    total = 0
    for name, module in parts.modules.items():
        total += count(module)
        lines.append(f"  {name:<22}{count(module):>12,}{count(module) * 2e-6:>8.2f}")
    files = sum(f.stat().st_size for f in parts.tokenizer_files.rglob("*") if f.is_file())
    lines.append(f"  {'tokenizers':<22}{'':>12}{files * 1e-6:>8.2f}")
    lines.append(f"  {'total':<22}{total:>12,}{total * 2e-6 + files * 1e-6:>8.2f}")
    return "\n".join(lines)


def _text_part(
    kind: str, options: dict[str, Any], folder: Path, words: list[str]
) -> tuple[torch.nn.Module, Any]:
    if kind == "t5":
        config = transformers.T5Config(**t5_config(write_t5(folder, words), **options))
        tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)
        return transformers.T5EncoderModel(config), tokenizer
    if kind == "qwen":
        config = transformers.Qwen2_5_VLConfig(
            **qwen_text_config(write_qwen(folder, words), **options)
        )
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
        return transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer
    second = kind == "clip_projection"
    vocab = write_clip(folder, words, pad="!" if second else EOS)
    config = transformers.CLIPTextConfig(**clip_config(vocab, **options))
    model = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
    return model(config), transformers.CLIPTokenizer.from_pretrained(folder)


def _zero_gates(transformer: torch.nn.Module) -> None:
    """Start every block as the identity (adaLN-Zero, Peebles and Xie 2023, section 3.2)."""
    for name, module in transformer.named_modules():
        gate = name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear"))
        gate = gate or name.endswith(("_mod.1", "norm_out.linear")) or name == "proj_out"
        if gate and isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
