"""The ground floor: errors, dtypes, tensor specs, reports. Imports nothing from other rooms."""

__all__: list[str] = []
