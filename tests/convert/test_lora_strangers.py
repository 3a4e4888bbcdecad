"""Adapters that are not read are refused by name, by every command."""

import re

import numpy as np
import pytest

from diffquant.convert.lora.conversion import convert_lora
from diffquant.convert.lora.merge import LoraInput, merging
from diffquant.convert.lora.parse import parse_lora
from diffquant.core.errors import ArchitectureError
from diffquant.inspect.describe import describe
from diffquant.inspect.lora_check import check_lora
from diffquant.inspect.subject import open_subject
from diffquant.io import open_source

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = f"base_model.model.{MODULE}"
# PEFT's configuration class -> what the message says
KINDS = {
    "VeraConfig": "VeRA: all layers share projections",
    "RandLoraConfig": "RandLoRA: all layers share projections",
    "FourierFTConfig": "FourierFT: the frequencies",
    "VBLoRAConfig": "VB-LoRA: its vectors come from a bank",
    "AdaLoraConfig": "AdaLoRA: its factors are weighed",
    "HRAConfig": "an adapter of PEFT: this kind is not read here",
}
OPTIONS = {
    "VeraConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 16},
    "VBLoRAConfig": {"r": 4, "num_vectors": 32, "vector_length": 8},
    "AdaLoraConfig": {"init_r": 4, "total_step": 10},
    "HRAConfig": {"r": 4},
}


def refused(path, base, message, tmp_path):
    with pytest.raises(ArchitectureError, match=message) as raised:
        convert_lora(path, tmp_path / "out.safetensors", to="kohya")
    assert "lora extract" in str(raised.value)
    with pytest.raises(ArchitectureError, match=message), merging(base, (LoraInput(path),)):
        pass
    with open_source(path) as source, pytest.raises(ArchitectureError, match=message):
        parse_lora(source)
    with open_subject(path) as subject, pytest.raises(ArchitectureError, match=message):
        check_lora(subject)
    if ".lora_A" in path.read_bytes().decode("latin-1"):  # inspect reads it as LoRA, and warns
        assert re.search(f"not read: .*{message}", " ".join(describe(path).warnings))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_peft_are_refused_by_name(kind, examples, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from safetensors.torch import save_file

    model = torch.nn.Module()
    model.to_q = torch.nn.Linear(32, 32)
    config = getattr(peft, kind)(target_modules=["to_q"], **OPTIONS[kind])
    wrapped = peft.get_peft_model(model, config)
    state = peft.get_peft_model_state_dict(wrapped)
    path = tmp_path / "a.safetensors"
    renamed = {key.replace(".to_q", f".{MODULE}"): one for key, one in state.items()}
    save_file({key: one.clone().contiguous() for key, one in renamed.items()}, path)
    refused(path, examples / "sd15-shapes", KINDS[kind], tmp_path)


def test_unknown_parts_beside_factors_are_not_overlooked(examples, write, tmp_path):
    tensors = {
        f"{NAME}.lora_A.weight": np.ones((2, 64), np.float32),
        f"{NAME}.lora_B.weight": np.ones((64, 2), np.float32),
        f"{NAME}.lora_gate": np.ones(2, np.float32),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    refused(path, examples / "sd15-shapes", "lora_gate is not known here", tmp_path)
