"""The command line: parse, call one public function, render. Commands load when they run."""

from diffquant.cli.main import main

__all__ = ["main"]
