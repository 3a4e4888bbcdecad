"""Read-only facts about files: what they are, whether they keep their rules, how two differ.

Headers are read without torch and numba; only `diff` and `health` decode weights, and load what
they need then. Nothing is imported here, so that a question loads what answers it and no more:

- `describe`, `many`, `subject`, `encodings`, `lora`, `inversion`: what a file is
- `loaders`: who can load it; `fit`, `latents`: whether it fits, what it goes with
- `audit`, `health`, `hashes`, `diff`: its rules, its numbers, its bytes, another file
- `repository`: what a repository on a hub holds
"""

__all__: list[str] = []
