"""Text encoders as GGUF files: names, policy, header and tokenizer of each kind."""

__all__: list[str] = []
