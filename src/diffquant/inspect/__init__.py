"""Read-only facts about files: what they are, from headers alone. Loads neither torch nor numba."""

from diffquant.inspect.describe import FileReport, PartReport, StorageCount, describe

__all__ = ["FileReport", "PartReport", "StorageCount", "describe"]
