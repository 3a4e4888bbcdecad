"""Read-only facts about files: what they are, whether they keep their rules, how two differ.

Headers are read without torch and numba; only `diff` and `health` decode weights, and load what
they need then.
"""

from diffquant.inspect.audit import AuditReport, audit
from diffquant.inspect.describe import FileReport, PartReport, StorageCount, describe
from diffquant.inspect.diff import DIFF_CLASSES, DiffReport, TensorDiff, diff
from diffquant.inspect.encodings import Encoding
from diffquant.inspect.fit import FitReport, fit
from diffquant.inspect.hashes import FileHashes, hash_paths
from diffquant.inspect.health import HealthReport, health
from diffquant.inspect.health_findings import HealthFinding
from diffquant.inspect.inversion import InversionReport, TokenVectors, describe_inversion
from diffquant.inspect.latents import LatentReport, latents
from diffquant.inspect.loaders import (
    LOADERS,
    LoaderVerdict,
    Reason,
    check_loader,
    judge,
    loader_report,
)
from diffquant.inspect.lora import LoraHint, LoraReport, describe_lora
from diffquant.inspect.lora_parts import LoraBlocks, LoraPart
from diffquant.inspect.lora_training import Training
from diffquant.inspect.many import Unreadable, describe_each
from diffquant.inspect.repository import RepositoryFile, RepositoryReport, list_repository
from diffquant.inspect.subject import Subject, open_subject

__all__ = [
    "DIFF_CLASSES",
    "LOADERS",
    "AuditReport",
    "DiffReport",
    "Encoding",
    "FileHashes",
    "FileReport",
    "FitReport",
    "HealthFinding",
    "HealthReport",
    "InversionReport",
    "LatentReport",
    "LoaderVerdict",
    "LoraBlocks",
    "LoraHint",
    "LoraPart",
    "LoraReport",
    "PartReport",
    "Reason",
    "RepositoryFile",
    "RepositoryReport",
    "StorageCount",
    "Subject",
    "TensorDiff",
    "TokenVectors",
    "Training",
    "Unreadable",
    "audit",
    "check_loader",
    "describe",
    "describe_each",
    "describe_inversion",
    "describe_lora",
    "diff",
    "fit",
    "hash_paths",
    "health",
    "judge",
    "latents",
    "list_repository",
    "loader_report",
    "open_subject",
]
