"""Number formats, codecs and precision policies. Knows nothing of files or architectures."""

__all__: list[str] = []
