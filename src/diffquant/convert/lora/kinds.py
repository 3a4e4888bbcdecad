"""The kinds of adapter: which parts make one, and what shape of weight they are for.

    LoRA    W + s up @ down                       down (r, K...)  up (N, r)  mid (r, r, kh, kw)
    LoHa    W + s (w1_a @ w1_b) * (w2_a @ w2_b)   w1_a (N, r)  w1_b (r, K); with t1: w1_a (r, N)
    LoKr    W + s kron(w1, w2)                    w1 (a, b)  w2 (c, d, ...)  W is (a c, b d, ...)
    GLoRA   W + s (W a1 @ a2 + b1 @ b2)           a1 (K, r)  a2 (r, K)  b1 (N, r)  b2 (r, K)
    T-LoRA  W + p diag(lambda) q                  q (r, K)  p (N, r)
    OFT     R W                                   oft_blocks (n, b, b), N = n b; PEFT turns K
    BOFT    R_m ... R_1 W                         oft_blocks (m, n, b, b)
    IA3     rows or columns of W scaled           a vector of N or K numbers
    diff    W + diff, or W replaced               diff as W; diff_b as the bias; set_weight
    norm    a norm's weight and bias changed      w_norm, b_norm (N,)
    table   W + s (A^T B^T) of embeddings         lora_embedding_A (r, tokens)  B (width, r)

DoRA is no kind of its own: a magnitude beside LoRA, LoHa or LoKr. A solver raises `Contradiction`
where shapes deny each other; a dimension that the parts cannot tell is None.

Sources: lycoris-lora 4.1.3 (package), modules/*.py, weight_list and custom_state_dict; peft 0.21.2
(package), tuners/{lora,loha,lokr,oft,boft,ia3}/layer.py; Comfy-Org/ComfyUI@839df9f:
comfy/weight_adapter/; kohya-ss/sd-scripts@450630c:networks/; ComfyUI's `diff`, `set_weight`:
Comfy-Org/ComfyUI@17358c8:comfy/lora.py, load_lora.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from diffquant.convert.rules import Shape

__all__ = [
    "KINDS",
    "AdapterKind",
    "Contradiction",
    "Shapes",
    "Solved",
    "WeightShape",
    "kind_named",
    "kinds_of",
    "lacking",
]

Shapes: TypeAlias = Mapping[str, Shape]
WeightShape: TypeAlias = tuple[int | None, ...]


class Contradiction(Exception):  # noqa: N818 - says what is wrong, as the error tree does
    """Parts of one adapter that do not fit each other; the text says which and how."""


@dataclass(frozen=True, slots=True)
class Solved:
    """What the parts of an adapter say.

    Attributes:
        shape: the weight's, (N, K, ...); None for a dimension that cannot be told, () for nothing.
        rank: None for kinds without one, and for LoKr of two full factors.
        traits: "conv" for kernels above 1x1, "tucker" for a core tensor.
    """

    shape: WeightShape
    rank: int | None = None
    traits: tuple[str, ...] = ()

    def size(self, place: int) -> int:
        """A dimension that is known to be known."""
        size = self.shape[place]
        assert size is not None
        return size


@dataclass(frozen=True, slots=True, eq=False)
class AdapterKind:
    """One row.

    Attributes:
        slug: name in reports.
        title: name for people.
        needs: every entry must be met, by all roles of one of its alternatives.
        optional: further roles that belong to this kind alone.
        solve: roles' shapes -> what they say; called once `needs` is met.
        additive: adds a matrix to the weight that is known without the weight.
    """

    slug: str
    title: str
    needs: tuple[tuple[tuple[str, ...], ...], ...]
    solve: Callable[[Shapes], Solved]
    optional: tuple[str, ...] = ()
    additive: bool = False

    @property
    def roles(self) -> frozenset[str]:
        """Every role that belongs to this kind alone."""
        required = (role for group in self.needs for one in group for role in one)
        return frozenset((*required, *self.optional))


def lacking(kind: AdapterKind, roles: frozenset[str]) -> tuple[str, ...]:
    """Roles that are missing: of each unmet need, those of the alternative that is nearest."""
    found: list[str] = []
    for group in kind.needs:
        missing = [[role for role in one if role not in roles] for one in group]
        if all(missing):
            found += sorted(missing, key=len)[0]
    return tuple(found)


def _check(holds: bool, shapes: Shapes, expected: str, *roles: str) -> None:
    if not holds:
        found = ", ".join(f"{role} {shapes[role]}" for role in roles if role in shapes)
        raise Contradiction(f"expected {expected}, found {found}")


def _kernel(shape: tuple[int, ...], core: bool) -> tuple[str, ...]:
    conv = ("conv",) if math.prod(shape) > 1 else ()
    return (*conv, *(("tucker",) if core else ()))


def _lora(shapes: Shapes) -> Solved:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    fits = 2 <= len(down) <= 5 and 2 <= len(up) <= 5 and down[0] == up[1]
    fits = fits and math.prod(up[2:]) == 1
    _check(fits, shapes, "factors (r, K) and (n, r)", "down", "up")
    kernel = down[2:]
    if mid is not None:
        square = len(mid) >= 2 and mid[:2] == (down[0], down[0]) and math.prod(kernel) == 1
        _check(square, shapes, "a core (r, r, ...) between 1x1 factors", "down", "up", "mid")
        kernel = mid[2:]
    return Solved((up[0], down[1], *kernel), down[0], _kernel(kernel, mid is not None))


def _hadamard(shapes: Shapes, a: str, b: str, core: str) -> Solved:
    first, second, middle = shapes[a], shapes[b], shapes.get(core)
    _check(len(first) == len(second) == 2, shapes, "matrices", a, b)
    if middle is None:
        _check(first[1] == second[0], shapes, "(n, r) and (r, K)", a, b)
        return Solved((first[0], second[1]), second[0])
    rank = second[0]
    fits = first[0] == rank and len(middle) > 2 and middle[:2] == (rank, rank)
    _check(fits, shapes, "(r, n), (r, K) and a core (r, r, ...)", a, b, core)
    return Solved((first[1], second[1], *middle[2:]), rank, _kernel(middle[2:], core=True))


def _loha(shapes: Shapes) -> Solved:
    one = _hadamard(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
    two = _hadamard(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
    if one.shape != two.shape:
        raise Contradiction(f"expected two products of one shape, found {one.shape}, {two.shape}")
    return one


def _kronecker(shapes: Shapes, name: str, core: str) -> Solved:
    """One factor of a Kronecker product, whole or as a product itself."""
    if name in shapes:
        whole = shapes[name]
        _check(2 <= len(whole) <= 5, shapes, "a matrix or a kernel", name)
        return Solved(whole, None, _kernel(whole[2:], core=False))
    return _hadamard(shapes, f"{name}_a", f"{name}_b", core)


def _lokr(shapes: Shapes) -> Solved:
    one, two = _kronecker(shapes, "lokr_w1", "lokr_t1"), _kronecker(shapes, "lokr_w2", "lokr_t2")
    _check("conv" not in one.traits, shapes, "a matrix", "lokr_w1")
    rows, columns = one.size(0) * two.size(0), one.size(1) * two.size(1)
    ranks = [rank for rank in (one.rank, two.rank) if rank is not None]
    return Solved((rows, columns, *two.shape[2:]), max(ranks, default=None), two.traits)


def _glora(shapes: Shapes) -> Solved:
    a1, a2, b1, b2 = (shapes[role][:2] for role in ("glora_a1", "glora_a2", "glora_b1", "glora_b2"))
    roles = ("glora_a1", "glora_a2", "glora_b1", "glora_b2")
    _check(all(len(one) == 2 for one in (a1, a2, b1, b2)), shapes, "matrices", *roles)
    kernel = shapes.get("glora_bm", shapes["glora_b2"])[2:]
    traits = _kernel(kernel, "glora_bm" in shapes)
    if a1[1] == a2[0] == b1[1] == b2[0]:
        return Solved((b1[0], b2[1], *kernel), b2[0], traits)
    # As the first releases wrote it: every factor transposed.
    old = a1[0] == a2[1] == b1[0] == b2[1]
    _check(old, shapes, "a1 (K, r), a2 (r, K), b1 (n, r) and b2 (r, K)", *roles)
    return Solved((b2[0], b1[1], *kernel), b1[0], traits)


def _tlora(shapes: Shapes) -> Solved:
    q, p = shapes["q_layer"], shapes["p_layer"]
    fits = len(q) >= 2 and len(p) >= 2 and q[0] == p[1]
    _check(fits, shapes, "q (r, K) and p (n, r)", "q_layer", "p_layer")
    return Solved((p[0], q[1], *q[2:]), q[0], _kernel(q[2:], core=False))


def _oft(shapes: Shapes) -> Solved:
    if "oft_blocks" in shapes:
        blocks = shapes["oft_blocks"]
        square = len(blocks) in (3, 4) and blocks[-1] == blocks[-2]
        _check(square, shapes, "square blocks", "oft_blocks")
        return Solved((blocks[-3] * blocks[-1], None))
    blocks = shapes["oft_r"]
    if len(blocks) == 2:  # PEFT keeps what is above the diagonal: n = b (b - 1) / 2
        size = (1 + math.isqrt(1 + 8 * blocks[1])) // 2
        _check(size * (size - 1) // 2 == blocks[1], shapes, "triangles of blocks", "oft_r")
        return Solved((None, blocks[0] * size if blocks[0] > 1 else None))
    square = len(blocks) == 3 and blocks[1] == blocks[2]
    _check(square, shapes, "square blocks", "oft_r")
    return Solved((None, None))


def _boft(shapes: Shapes) -> Solved:
    role = "oft_blocks" if "oft_blocks" in shapes else "boft_r"
    blocks = shapes[role]
    square = len(blocks) == 4 and blocks[2] == blocks[3]
    _check(square, shapes, "factors of square blocks", role)
    if role == "oft_blocks":  # lycoris turns rows, PEFT columns
        return Solved((blocks[1] * blocks[2], None))
    rows = math.prod(shapes["boft_s"]) if "boft_s" in shapes else None
    return Solved((rows, blocks[1] * blocks[2]))


def _ia3(shapes: Shapes) -> Solved:
    scales = shapes["ia3"]
    _check(sum(size > 1 for size in scales) <= 1, shapes, "a vector", "ia3")
    if len(scales) >= 2 and "on_input" not in shapes:  # PEFT: (N, 1) or (1, K)
        return Solved((scales[0] if scales[0] > 1 else None, scales[1] if scales[1] > 1 else None))
    return Solved((None, None))


def _full(shapes: Shapes) -> Solved:
    for role in ("diff", "set_weight"):
        if role in shapes:
            return Solved(shapes[role] if len(shapes[role]) > 1 else (*shapes[role], None))
    return Solved((shapes["diff_b"][0], None) if shapes.get("diff_b") else ())


def _norm(shapes: Shapes) -> Solved:
    role = "w_norm" if "w_norm" in shapes else "b_norm"
    _check(len(shapes[role]) == 1, shapes, "a vector", role)
    return Solved((*shapes[role], None))


def _table(shapes: Shapes) -> Solved:
    a, b = shapes["embedding_a"], shapes["embedding_b"]
    fits = len(a) == len(b) == 2 and a[0] == b[1]
    _check(fits, shapes, "factors (r, tokens) and (width, r)", "embedding_a", "embedding_b")
    return Solved((a[1], b[0]), a[0])


KINDS = (
    AdapterKind("lora", "LoRA", ((("down", "up"),),), _lora, ("mid",), additive=True),
    AdapterKind(
        "loha",
        "LoHa",
        ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),),
        _loha,
        ("hada_t1", "hada_t2"),
        additive=True,
    ),
    AdapterKind(
        "lokr",
        "LoKr",
        (
            (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
            (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")),
        ),
        _lokr,
        ("lokr_t1", "lokr_t2"),
        additive=True,
    ),
    AdapterKind(
        "glora",
        "GLoRA",
        ((("glora_a1", "glora_a2", "glora_b1", "glora_b2"),),),
        _glora,
        ("glora_bm",),
    ),
    AdapterKind("tlora", "T-LoRA", ((("q_layer", "p_layer", "lambda"),),), _tlora),
    AdapterKind("oft", "OFT", ((("oft_blocks",), ("oft_r",)),), _oft, ("rescale",)),
    AdapterKind("boft", "BOFT", ((("oft_blocks",), ("boft_r",)),), _boft, ("rescale", "boft_s")),
    AdapterKind("ia3", "IA3", ((("ia3",),),), _ia3, ("on_input",)),
    AdapterKind("embedding", "LoRA of a table", ((("embedding_a", "embedding_b"),),), _table),
    AdapterKind("norm", "norm", ((("w_norm",), ("b_norm",)),), _norm),
    AdapterKind(
        "full",
        "full difference",
        ((("diff",), ("diff_b",), ("set_weight",)),),
        _full,
        ("reshape_weight",),
    ),
)
_BY_SLUG = {row.slug: row for row in KINDS}
# Of roles that two kinds have, the first: the blocks of lycoris' OFT and BOFT are told by shape.
_BY_ROLE = {role: row for row in reversed(KINDS) for role in row.roles}


def kind_named(slug: str) -> AdapterKind:
    """The row of that slug; KeyError without one."""
    return _BY_SLUG[slug]


def kinds_of(roles: Iterable[str]) -> tuple[AdapterKind, ...]:
    """The kinds these roles belong to, each once."""
    return tuple(dict.fromkeys(_BY_ROLE[role] for role in roles if role in _BY_ROLE))
