"""diffquant: read, convert, quantize and verify diffusion checkpoints and LoRAs.

The rooms are sub-packages: convert, quant, inspect, runtime, and core, io, publish, cli that serve
them. Importing this package imports nothing heavy.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
