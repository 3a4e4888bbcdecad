"""Groups pass through two slots: whatever the order, a layer gets its own weight."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from diffquant.convert.footprint.levels import SLOTS
from diffquant.runtime.layers import QuantEmbedding, QuantLinear
from diffquant.runtime.memory.groups import ALIGN, Group, blocks_of, layers_of, loose
from diffquant.runtime.memory.stream import Stream
from diffquant.runtime.stored import StoredPart, StoredSegment, StoredWeight

CPU = torch.device("cpu")


def stored(tensors, *, form="f32", reads=None):
    """A stored weight of one segment per tensor; `reads` counts loads."""

    def load(tensor):
        if reads is not None:
            reads.append(tensor)
        return tensor.clone()

    names = {torch.float32: "f32", torch.bfloat16: "bf16"}
    return StoredWeight.of(
        [
            StoredSegment(
                names[one.dtype],
                tuple(one.shape),
                {"weight": StoredPart(one.to("meta"), lambda one=one: load(one))},
            )
            for one in tensors
        ]
    )


class Block(nn.Module):
    def __init__(self, width, seed, reads):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one = QuantLinear(width, width, bias=False)
        self.two = QuantLinear(width, 2 * width, bias=False)
        self.one.bind_stored(stored([torch.randn(width, width, generator=generator)], reads=reads))
        halves = [torch.randn(width, width, generator=generator) for _ in range(2)]
        halves[1] = halves[1].bfloat16()  # segments of two dtypes, parts of odd sizes
        self.two.bind_stored(stored(halves, reads=reads))


class Model(nn.Module):
    def __init__(self, depth=5, width=7):
        super().__init__()
        self.reads = []
        self.before = QuantLinear(width, width, bias=False)
        self.before.bind_stored(stored([torch.eye(width)], reads=self.reads))
        self.table = QuantEmbedding(11, width)
        self.table.bind_stored(stored([torch.ones(11, width)], reads=self.reads))
        self.blocks = nn.ModuleList(Block(width, seed, self.reads) for seed in range(depth))


def groups(model):
    return blocks_of(layers_of(model))


def same(layer, weight):
    wanted = layer.stored.load()
    pairs = zip(wanted.segments, weight.segments, strict=True)
    return all(torch.equal(a.parts["weight"], b.parts["weight"]) for a, b in pairs)


def test_groups_are_blocks_and_the_rest_without_token_tables():
    model = Model()
    blocks = groups(model)
    assert [one.name for one in blocks] == [f"blocks.{index}" for index in range(5)]
    rest = loose(layers_of(model), blocks)
    assert rest.layers == (model.before,)


def test_a_list_of_one_block_is_no_list():
    assert groups(Model(depth=1)) == ()


def test_the_buffer_of_a_group_holds_every_part_at_aligned_places():
    group = groups(Model())[0]
    assert group.nbytes % ALIGN == 0
    buffer = torch.full((group.nbytes,), 255, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as readers:
        group.fill(buffer, readers)
    views = group.views(buffer)
    for layer in group.layers:
        assert same(layer, views[layer])
        for segment in views[layer].segments:
            part = segment.parts["weight"]
            assert (part.data_ptr() - buffer.data_ptr()) % ALIGN == 0


@pytest.mark.parametrize("kept", [(), (2,), (0, 4), (0, 1, 3, 4)])
def test_every_order_of_calls_gives_every_layer_its_own_weight(kept):
    model = Model()
    blocks = groups(model)
    stream = Stream(blocks, device=CPU, pinned=False, kept=[blocks[one] for one in kept])
    layers = [layer for group in blocks for layer in group.layers]
    for _ in range(2):
        assert all(same(layer, stream.weight(layer)) for layer in layers)
    shuffled = random.Random(0).choices(layers, k=60)
    assert all(same(layer, stream.weight(layer)) for layer in shuffled)
    stream.close()


def test_a_repeated_order_is_learned_and_nothing_is_late_again():
    blocks = groups(Model())
    stream = Stream(blocks, device=CPU, pinned=False)
    order = [blocks[one] for one in (0, 3, 1, 4, 2)]
    for _ in range(2):
        for group in order:
            stream.weight(group.layers[0])
    late = stream.late
    assert late > 0  # the first time round it could not be known
    for _ in range(3):
        for group in order:
            stream.weight(group.layers[0])
    assert stream.late == late


def test_blocks_that_stay_are_read_once():
    model = Model()
    blocks = groups(model)
    stream = Stream(blocks, device=CPU, pinned=False, kept=blocks[:4])
    for group in blocks:  # the streamed one is still being read until it is asked for
        stream.weight(group.layers[0])
    count = len(model.reads)
    for _ in range(3):
        for group in blocks:
            stream.weight(group.layers[0])
    assert len(model.reads) == count  # and the only streamed one stays in its slot
    stream.close()


def test_memory_is_two_slots_of_the_largest_streamed_group():
    blocks = groups(Model())
    stream = Stream(blocks, device=CPU, pinned=False)
    slots = stream._lane.slots
    assert [one.numel() for one in slots] == [max(group.nbytes for group in blocks)] * SLOTS
    stream.close()
    assert stream._lane.slots == ()


def test_an_error_of_a_file_reaches_the_caller():
    model = Model()

    def broken():
        raise OSError("the disk is gone")

    meta = torch.empty(7, 7, device="meta")
    layer = model.blocks[1].one
    layer.bind_stored(
        StoredWeight.of([StoredSegment("f32", (7, 7), {"weight": StoredPart(meta, broken)})])
    )
    stream = Stream(groups(model), device=CPU, pinned=False)
    with pytest.raises(OSError, match="the disk is gone"):
        stream.weight(layer)
    stream.close()


def test_one_group_alone_needs_no_second():
    group = Group("only", (Model().before,))
    stream = Stream([group], device=CPU, pinned=False)
    assert same(group.layers[0], stream.weight(group.layers[0]))
    stream.close()
