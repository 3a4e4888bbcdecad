"""Where ComfyUI looks for a file of some kind.

Source: Comfy-Org/ComfyUI@4effd05 folder_paths.py (folder_names_and_paths); ComfyUI-GGUF reads its
files from the same folders: city96/ComfyUI-GGUF@795e451 nodes.py (update_folder_names_and_paths).
"""

from __future__ import annotations

from pathlib import Path

from diffquant.core.errors import UsageError

__all__ = ["COMFY_FOLDERS", "comfy_models"]

# Kind of inspect -> folder under models/.
COMFY_FOLDERS = {
    "checkpoint": "checkpoints",
    "diffusion_model": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "lora": "loras",
    "controlnet": "controlnet",
    "textual_inversion": "embeddings",
}


def comfy_models(root: Path) -> Path:
    """The folder of models in a ComfyUI folder.

    Raises:
        UsageError: it has none.
    """
    models = root / "models"
    if not models.is_dir():
        raise UsageError(
            f"--comfy-root {root}: no folder `models` in it; give the folder of ComfyUI itself"
        )
    return models
