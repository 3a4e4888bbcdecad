"""Read-only facts about files: what they are, whether they keep their rules, how two differ.

Headers are read without torch and numba; only `diff` decodes weights, and loads what it needs then.
"""

from diffquant.inspect.audit import AuditReport, audit
from diffquant.inspect.describe import FileReport, PartReport, StorageCount, describe
from diffquant.inspect.diff import DIFF_CLASSES, DiffReport, TensorDiff, diff
from diffquant.inspect.encodings import Encoding
from diffquant.inspect.loaders import (
    LOADERS,
    LoaderVerdict,
    Reason,
    check_loader,
    judge,
    loader_report,
)
from diffquant.inspect.many import Unreadable, describe_each
from diffquant.inspect.repository import RepositoryFile, RepositoryReport, list_repository
from diffquant.inspect.subject import Subject, open_subject

__all__ = [
    "DIFF_CLASSES",
    "LOADERS",
    "AuditReport",
    "DiffReport",
    "Encoding",
    "FileReport",
    "LoaderVerdict",
    "PartReport",
    "Reason",
    "RepositoryFile",
    "RepositoryReport",
    "StorageCount",
    "Subject",
    "TensorDiff",
    "Unreadable",
    "audit",
    "check_loader",
    "describe",
    "describe_each",
    "diff",
    "judge",
    "list_repository",
    "loader_report",
    "open_subject",
]
