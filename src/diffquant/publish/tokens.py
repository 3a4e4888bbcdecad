"""Access tokens: where they come from, and how they stay out of everything that is printed.

A token is read from `--token-file`, from the environment, or from what `hf auth login` stored;
never from the command line, which other users of a machine can read. While one is in use, log
records and error messages pass through a Redactor; so do the signed parts of URLs, which are
passwords too.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from diffquant.core.errors import UsageError

__all__ = ["Redactor", "redacted_logs", "token_from"]

_MAX_NBYTES = 4096
_QUERY = re.compile(r"(https?://[^\s'\"<>?]+)\?[^\s'\"<>]+")
_LOGGERS = ("", "huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "modelscope_hub")


def token_from(path: Path) -> str:
    """Read a token from a file.

    Raises:
        UsageError: no file, or no token in it; its content is not repeated.
    """
    if not path.is_file():
        raise UsageError(f"--token-file {path}: no such file")
    if path.stat().st_size > _MAX_NBYTES:
        raise UsageError(f"--token-file {path}: larger than {_MAX_NBYTES} bytes, no token is")
    text = path.read_bytes().strip()
    if not re.fullmatch(rb"[!-~]{4,}", text):
        raise UsageError(f"--token-file {path}: expected one line with the token alone")
    return text.decode("ascii")


class Redactor(logging.Filter):
    """Takes tokens and signed queries out of text and of log records."""

    def __init__(self, *tokens: str) -> None:
        super().__init__()
        self._tokens = tuple(one for one in tokens if one)

    def clean(self, text: str) -> str:
        """Text that may be shown."""
        for token in self._tokens:
            text = text.replace(token, "***")
        return _QUERY.sub(r"\1?***", text)

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean a record in place; it is kept."""
        message = record.getMessage()
        clean = self.clean(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info:  # a traceback is text that nobody has looked at
            record.exc_info, record.exc_text = None, None
        return True


@contextlib.contextmanager
def redacted_logs(redactor: Redactor) -> Iterator[None]:
    """Clean whatever is logged meanwhile, by whichever handler."""
    handlers = {h for name in _LOGGERS for h in logging.getLogger(name).handlers}
    for handler in handlers:
        handler.addFilter(redactor)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(redactor)
