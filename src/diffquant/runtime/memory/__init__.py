"""Memory: a plan before the first byte moves, and a rung to step down to when it fails.

::

    plan.py       budget + footprint -> Rung, predicted peaks, the rungs below
    rungs.py      what each rung takes, and which come after it
    placement.py  which parts are on the device; out of memory -> one rung down
    stream.py     groups of layers through two slots
    groups.py     what a group is, and the flat buffer it travels in
    lanes.py      from the file, or page-locked memory, into a slot
    pinned.py     page-locked memory
"""

__all__: list[str] = []
