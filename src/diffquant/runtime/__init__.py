"""The bundled runtime: generates pictures from packed weights with torch, and judges them."""

__all__: list[str] = []
