"""The table of architectures: one file each, one row each."""

from diffquant.convert.architectures.anima import ANIMA
from diffquant.convert.architectures.auraflow import AURAFLOW
from diffquant.convert.architectures.base import Architecture
from diffquant.convert.architectures.chroma import CHROMA
from diffquant.convert.architectures.flux1 import FLUX1
from diffquant.convert.architectures.flux2 import FLUX2
from diffquant.convert.architectures.hidream import HIDREAM
from diffquant.convert.architectures.hunyuan import HUNYUAN
from diffquant.convert.architectures.ideogram4 import IDEOGRAM4
from diffquant.convert.architectures.kolors import KOLORS
from diffquant.convert.architectures.krea2 import KREA2
from diffquant.convert.architectures.ltx import LTX
from diffquant.convert.architectures.lumina2 import LUMINA2
from diffquant.convert.architectures.omnigen2 import OMNIGEN2
from diffquant.convert.architectures.pixart import PIXART
from diffquant.convert.architectures.qwen_image import QWEN_IMAGE
from diffquant.convert.architectures.sd2 import SD2
from diffquant.convert.architectures.sd3 import SD3
from diffquant.convert.architectures.sd15 import SD15
from diffquant.convert.architectures.sdxl import SDXL
from diffquant.convert.architectures.sdxl_refiner import SDXL_REFINER
from diffquant.convert.architectures.wan import WAN
from diffquant.convert.architectures.z_image import Z_IMAGE

__all__ = ["ARCHITECTURES"]

# Of two components of one kind, the first serves files that hold nothing else.
ARCHITECTURES: dict[str, Architecture] = {
    row.slug: row
    for row in (
        SD15,
        SDXL,
        SDXL_REFINER,
        SD2,
        SD3,
        FLUX1,
        FLUX2,
        CHROMA,
        QWEN_IMAGE,
        Z_IMAGE,
        LUMINA2,
        OMNIGEN2,
        HIDREAM,
        PIXART,
        AURAFLOW,
        KOLORS,
        WAN,
        HUNYUAN,
        LTX,
        KREA2,
        ANIMA,
        IDEOGRAM4,
    )
}
