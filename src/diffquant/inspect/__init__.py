"""Read-only facts about files: what they are, whether they keep their rules, how two differ.

Headers are read without torch and numba; only `diff` decodes weights, and loads what it needs then.
"""

from diffquant.inspect.audit import AuditReport, audit
from diffquant.inspect.describe import FileReport, PartReport, StorageCount, describe
from diffquant.inspect.diff import DIFF_CLASSES, DiffReport, TensorDiff, diff
from diffquant.inspect.encodings import Encoding
from diffquant.inspect.many import Unreadable, describe_each
from diffquant.inspect.repository import RepositoryFile, RepositoryReport, list_repository
from diffquant.inspect.subject import Subject, open_subject

__all__ = [
    "DIFF_CLASSES",
    "AuditReport",
    "DiffReport",
    "Encoding",
    "FileReport",
    "PartReport",
    "RepositoryFile",
    "RepositoryReport",
    "StorageCount",
    "Subject",
    "TensorDiff",
    "Unreadable",
    "audit",
    "describe",
    "describe_each",
    "diff",
    "list_repository",
    "open_subject",
]
