"""PEFT's configuration of what is written: as Diffusers keeps it in the header, and as PEFT itself.

    folder/adapter_model.safetensors      base_model.model.<module>.lora_A.weight ...
    folder/adapter_config.json            {"peft_type": "LORA", "r": 16, "target_modules": ...}

A module's name in `rank_pattern` means every module that ends so, and in `target_modules` too:
where the model has others of that ending (`proj_out` of a model, and of each block), the pattern is
anchored and the targets are one regular expression.

Sources: peft 0.21.2 (package), utils/save_and_load.py, tuners/lora/config.py; utils/other.py,
get_pattern_key; tuners/tuners_utils.py, check_target_module_exists. diffusers 0.42.1 (package),
loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY and pack_lora_adapter_metadata ("unet.r").
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["CONFIG_FILE", "CONFIG_KEY", "WEIGHTS_FILE", "PeftPart", "config_file", "config_pair"]

CONFIG_KEY = "lora_adapter_metadata"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class PeftPart:
    """What is written for one part of a model.

    Attributes:
        ranks: module -> rank; alpha is the same.
        modules: names of all modules of the part.
        dora: whether they have magnitudes.
    """

    ranks: Mapping[str, int]
    modules: Collection[str]
    dora: bool = False

    def fields(self) -> dict[str, object]:
        """LoraConfig's fields."""
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        shared = _endings(self.modules) & self.ranks.keys()
        other = {
            f"^{name}" if name in shared else name: rank
            for name, rank in self.ranks.items()
            if rank != usual
        }
        names = sorted(self.ranks)
        targets: object = names
        if shared:
            targets = f"(?:{'|'.join(map(re.escape, names))})"
        found: dict[str, object] = {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": other,
            "alpha_pattern": other,
            "target_modules": targets,
        }
        return found | ({"use_dora": True} if self.dora else {})


def _endings(modules: Collection[str]) -> set[str]:
    """Everything that some module's name ends with behind a dot."""
    found = set()
    for name in modules:
        while "." in name:
            name = name.partition(".")[2]
            found.add(name)
    return found


def config_pair(parts: Mapping[str, PeftPart], *, alone: bool) -> dict[str, str]:
    """Header pairs of a file.

    Args:
        parts: Diffusers' folder -> what is written for it.
        alone: whether the fields go without the folder's name, as PEFT itself has them.
    """
    fields = {
        name if alone else f"{folder}.{name}": value
        for folder, part in parts.items()
        for name, value in part.fields().items()
    }
    return {CONFIG_KEY: json.dumps(fields, sort_keys=True), "format": "pt"}


def config_file(part: PeftPart) -> bytes:
    """adapter_config.json of one part."""
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **part.fields(),
    }
    return (json.dumps(fields, indent=2) + "\n").encode()
