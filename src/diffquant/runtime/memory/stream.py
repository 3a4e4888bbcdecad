"""Streaming: a part's groups pass through two slots, the next one arriving while one computes.

Nobody tells in which order a model calls its layers, and nobody has to: the first asks of a new
group bring it, and what followed it last time is fetched ahead. Before a model has run once, the
order of its modules is the guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from diffquant.convert.footprint.levels import SLOTS
from diffquant.runtime.layers import PackedLayer, PackedWeight
from diffquant.runtime.memory.groups import Group
from diffquant.runtime.memory.lanes import open_lane

__all__ = ["Stream"]


class Stream:
    """Streams groups to a device.

    Attributes:
        fetched: groups brought so far; `late`: those that no guess had started on.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        device: torch.device,
        pinned: bool,
        kept: Iterable[Group] = (),
    ) -> None:
        """Take the slots, and bring what stays.

        Args:
            groups: in the order they are likely called, `kept` among them where they are called.
            device: what is computed on.
            pinned: see lanes.open_lane.
            kept: groups that stay on the device.

        Raises:
            torch.OutOfMemoryError: slots and what stays do not fit.
        """
        self.fetched = self.late = 0
        staying = set(kept)
        self._after = dict(zip(groups, [*groups[1:], *groups[:1]], strict=True))
        self._of = {layer: group for group in groups for layer in group.layers}
        streamed = [group for group in groups if group not in staying]
        nbytes = max((group.nbytes for group in streamed), default=0)
        self._kept = {
            group: {layer: weight.to(device) for layer, weight in group.load()}
            for group in groups
            if group in staying
        }
        self._lane = open_lane(device, nbytes, pinned=pinned)
        self._held: list[Group | None] = [None] * SLOTS  # what is, or is arriving, in each slot
        self._arriving: set[int] = set()
        self._views: dict[tuple[Group, int], dict[PackedLayer, PackedWeight]] = {}
        self._group: Group | None = None
        self._slot = 0
        self._now: dict[PackedLayer, PackedWeight] = {}
        if streamed:
            self._start(streamed[0], 0)

    def weight(self, layer: PackedLayer) -> PackedWeight:
        """The layer's weight on the device, until a layer of another group is asked for."""
        group = self._of[layer]
        if group is not self._group:
            self._enter(group)
        return self._now[layer]

    def _enter(self, group: Group) -> None:
        if self._group is not None:
            self._after[self._group] = group
        self._group = group
        if group in self._kept:
            self._now = self._kept[group]
        else:
            self._now = self._brought(group)
        following = self._following(group)
        if following is not None and following not in self._held:
            self._start(following, (self._slot + 1) % SLOTS)

    def _brought(self, group: Group) -> dict[PackedLayer, PackedWeight]:
        """The weights of a streamed group, once it is in a slot."""
        if group not in self._held:
            self.late += 1
            self._start(group, (self._slot + 1) % SLOTS)
        slot = self._held.index(group)
        if (group, slot) not in self._views:
            self._views[group, slot] = group.views(self._lane.slots[slot])
        if slot in self._arriving:
            self._lane.wait(slot)
            self._arriving.discard(slot)
        self._slot = slot
        return self._views[group, slot]

    def _start(self, group: Group, slot: int) -> None:
        self.fetched += 1
        self._held[slot] = group
        self._arriving.add(slot)
        self._lane.start(group, slot)

    def _following(self, group: Group) -> Group | None:
        """The next streamed group, if what followed last time follows again."""
        following = self._after[group]
        for _ in range(len(self._after)):
            if following not in self._kept:
                return following
            following = self._after[following]
        return None

    @property
    def unlocked(self) -> int:
        """Bytes of host memory that were to be page-locked, and are not."""
        return self._lane.unlocked

    def close(self) -> None:
        """Let go of all memory; weights handed out are no longer good."""
        self._lane.close()
        self._views.clear()
        self._kept.clear()
        self._now = {}
        self._group = None
