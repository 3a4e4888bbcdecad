"""LoRA files: which layers they hold (parse), and which weights of a model those are (match)."""

__all__: list[str] = []
