"""Products of few rows without a card: tiles, limits, code as compiled.

Their numbers, by Triton's interpreter, are in test_products.py.
"""

import pytest
import torch
from packed_parts import random_parts

pytest.importorskip("triton")

from triton_compiled import compiled_call

from diffquant.runtime.kernels import products
from diffquant.runtime.kernels.triton import few, few_tiles
from diffquant.runtime.kernels.triton.few_tiles import FewTile

EVERY = [
    (rows, tile)
    for rows, tiles in (
        *few_tiles.CANDIDATES.items(),
        *((rows, (few_tiles.tile_for(name, rows, 2),)) for name, rows in few_tiles.TILES),
        *((rows, (few_tiles.tile_for("other", rows, 2),)) for rows in few_tiles.CLASSES),
    )
    for tile in tiles
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Compiled here and now, whatever the user's cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("name", ["q6_k", "nf4"])
def test_each_weight_is_decoded_once_and_small_cards_have_room(
    name, count, capability, cache, monkeypatch
):
    """A warp that decodes what another one has would round more weights than its share."""
    x, shape = torch.zeros(count, 1024, dtype=torch.bfloat16), (64, 1024)
    parts = random_parts(name, shape)
    found = compiled_call(
        monkeypatch,
        few,
        lambda: few.few_rows(x, name, parts, shape, None),
        capability=capability,
        of=2,
    )
    code, tile = found.asm["ptx"], few_tiles.tile_for(few.family(name), count, 2)
    assert ("mma.sync" in code or "wgmma" in code) == (count > 1)
    assert found.metadata.shared <= 99 << 10
    rounded = 2 * code.count("cvt.rn.bf16x2.f32") + code.count("cvt.rn.bf16.f32")
    written = max(1, tile.n * max(16, count) // (32 * tile.warps))
    assert rounded <= tile.n * tile.k // (32 * tile.warps) + written


def test_sums_of_shares_fit_the_oldest_cards(cache, monkeypatch):
    x, parts = torch.zeros(64, 4096, dtype=torch.bfloat16), random_parts("q4_k", (8, 4096))
    found = compiled_call(
        monkeypatch,
        few,
        lambda: few.few_rows(x, "q4_k", parts, (8, 4096), None),
        capability=80,
        of=2,
        which=1,
    )
    assert found.metadata.shared <= 48 << 10


def test_every_share_of_k_is_whole_steps_and_none_is_empty():
    for _, tile in EVERY:
        for tiles, units, step in ((1, 24, 4), (48, 240, 2), (6000, 96, 8), (7, 5, 8)):
            share = tile.share(tiles, units, step)
            shares = -(-units // share)
            assert share % step == 0
            assert (shares - 1) * share < units <= shares * share
            assert shares == 1 or (tiles * shares <= tile.programs and shares <= 16)


def test_no_tile_in_use_is_compiled_wrongly():
    families = {family for family, _ in few_tiles.TILES} | {few.family("nvfp4")}
    assert families == {few.family(name) for name in few.FORMATS_SERVED}
    for family in families:
        for rows in few_tiles.CLASSES:
            for itemsize in (2, 4):
                tile = few_tiles.tile_for(family, rows, itemsize)
                assert few_tiles.usable(family, tile, rows, itemsize), (family, rows)


@pytest.mark.parametrize(
    ("name", "rows", "tile"), [("q6_k", 2, FewTile(64, 64, 4)), ("nf4", 1, FewTile(4, 256, 1))]
)
def test_a_tile_that_is_compiled_wrongly_is_not_run(name, rows, tile):
    x, shape = torch.zeros(rows, 256, dtype=torch.bfloat16), (32, 256)
    with pytest.raises(AssertionError):
        few.few_rows(x, name, random_parts(name, shape), shape, None, tile=tile)


def test_tiles_are_by_family_and_rows(monkeypatch):
    own = FewTile(64, 256, 8)
    monkeypatch.setitem(few_tiles.TILES, ("4x16", 16), own)
    assert few.family("q6_k") == few.family("q3_k") == "4x16"
    assert few_tiles.tile_for("4x16", 9, 2) == own
    assert own not in (few_tiles.tile_for("4x16", 17, 2), few_tiles.tile_for("flat", 9, 2))


def test_formats_that_are_faster_decoded_first_are_served_up_to_their_limit(monkeypatch):
    parts, shape = random_parts("q4_k", (64, 1024)), (64, 1024)
    monkeypatch.setattr(products, "_triton", lambda _part: few)
    served = lambda fmt: products.few_rows_serve(fmt, parts, shape)  # noqa: E731
    assert served("q4_k") == few_tiles.MOST_ROWS
    monkeypatch.setitem(few_tiles.LIMITS, "q4_k", 16)
    assert (served("q4_k"), few_tiles.most_rows("q8_0")) == (16, few_tiles.MOST_ROWS)
    assert served("q6_k") == 0  # another layout
