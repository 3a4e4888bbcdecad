"""A file on any web server that takes range requests; its siblings are asked for beside it."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit

from diffquant.io.ranges import Resource
from diffquant.io.remote_name import UrlName
from diffquant.io.remote_path import RemoteEntry, RemoteTree
from diffquant.io.transport import Transport

__all__ = ["UrlTree"]


class UrlTree(RemoteTree):
    """The folder of a URL; the query of the URL (a signature) goes to the named file alone."""

    def __init__(self, name: UrlName, transport: Transport | None = None) -> None:
        split = urlsplit(name.url)
        base, _, last = split.path.rpartition("/")
        super().__init__(transport or Transport(), asked=unquote(last) or "index")
        self._url = name.url
        self._base = f"{split.scheme}://{split.netloc}{base}"

    def label(self, relative: str) -> str:
        """The URL without its query."""
        return f"{self._base}/{relative}"

    def url(self, relative: str) -> str:
        """Where a file is asked for."""
        return self._url if relative == self.asked else f"{self._base}/{quote(relative)}"

    def listing(self) -> Mapping[str, RemoteEntry]:
        """Empty: web servers have none."""
        return {}

    def resource(self, relative: str) -> Resource:
        """How to ask for a file."""
        return Resource(self.url(relative), self.label(relative))
