"""What is asked of a program that draws for a comparison."""

import numpy as np

from diffquant.core.progress import NO_PROGRESS
from diffquant.runtime.drawing import Shots, draw_all


class Recorder:
    """A side that draws black and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def draw(self, request, *_):
        self.asked.append(request)
        return (np.zeros((request.height, request.width, 3), np.float32),)


def test_every_pair_is_drawn_with_the_settings_asked_for():
    side = Recorder()
    shots = Shots(("a", "b"), (3, 4), 7, 2.5, (32, 16), "ddim")
    drawn = draw_all(side, shots, "reference", NO_PROGRESS)
    found = [(one.prompt, one.seed) for one in side.asked]
    assert found == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    for one in side.asked:
        assert (one.steps, one.cfg, one.sampler) == (7, 2.5, "ddim")
        assert (one.width, one.height) == (32, 16)
    assert [picture.shape for picture in drawn.pictures] == [(16, 32, 3)] * 4
