"""The hub that takes uploads."""

from upload_hub import upload_hub

__all__ = ["upload_hub"]
