"""From tensors to tensors: recognition, rules, plans, and the one streaming loop."""

__all__: list[str] = []
