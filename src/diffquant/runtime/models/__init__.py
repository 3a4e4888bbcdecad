"""Model definitions: one file each, named by the keys of the canonical layout."""

__all__: list[str] = []
