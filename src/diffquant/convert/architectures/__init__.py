"""The table of architectures: one file each, one row each."""

from diffquant.convert.architectures.base import Architecture
from diffquant.convert.architectures.flux1 import FLUX1
from diffquant.convert.architectures.qwen_image import QWEN_IMAGE
from diffquant.convert.architectures.sd2 import SD2
from diffquant.convert.architectures.sd15 import SD15
from diffquant.convert.architectures.sdxl import SDXL
from diffquant.convert.architectures.sdxl_refiner import SDXL_REFINER

__all__ = ["ARCHITECTURES"]

# Of two components of one kind, the first serves files that hold nothing else.
ARCHITECTURES: dict[str, Architecture] = {
    row.slug: row for row in (SD15, SDXL, SDXL_REFINER, SD2, FLUX1, QWEN_IMAGE)
}
