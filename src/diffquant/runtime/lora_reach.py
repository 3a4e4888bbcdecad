"""From canonical weights, which LoRAs are matched against, to the layers of a module.

Most modules carry canonical names, and a weight is a layer. OpenCLIP text encoders (text_encoder_2
of SDXL) are built with transformers' names: their canonical `attn.in_proj_weight` is three layers,
q, k and v, and `text_projection` is a layer's transpose. The component's own key rules tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from diffquant.convert.architectures.base import Component
from diffquant.convert.rules import Assignment, Piece, Shapes, apply_rules
from diffquant.runtime.layers import PackedLayer
from diffquant.runtime.loading import MODELS, model_for

__all__ = ["Reached", "View", "view_of"]


@dataclass(frozen=True, slots=True)
class Reached:
    """A layer that some rows of a canonical weight are.

    Attributes:
        layer: None where the rows are a bare parameter of the module.
        rows: first and last + 1 row of the layer; None: all.
        start, stop: which of the rows asked for they are.
    """

    layer: PackedLayer | None
    rows: tuple[int, int] | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class View:
    """A module by canonical names.

    Attributes:
        shapes: canonical key -> shape of every weight and parameter.
        made: canonical key -> the rows of the module's own tensors it is made of.
        layers: the module's own key of the weight -> layer.
    """

    shapes: Shapes
    made: Mapping[str, Assignment]
    layers: Mapping[str, PackedLayer]

    def transposed(self, key: str) -> bool:
        """Whether the canonical weight is the transpose of the layer's."""
        return self.made[key].transpose

    def reach(self, key: str, rows: tuple[int, int] | None) -> Iterator[Reached]:
        """The layers behind rows of a canonical weight; None: all of them."""
        made = self.made[key]
        at = 0
        for piece in made.pieces:
            count = piece.stop - piece.start
            low, high = (0, at + count) if rows is None else rows
            first, last = max(low, at), min(high, at + count)
            if first < last:
                inside = (piece.start + first - at, piece.start + last - at)
                layer = self.layers.get(piece.key)
                whole = layer is not None and inside == (0, layer.logical_shape[0])
                yield Reached(layer, None if whole else inside, first - low, last - low)
            at += count


def view_of(module: nn.Module, component: Component) -> View:
    """See a module by the canonical names of its component."""
    layers = {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, PackedLayer)
    }
    shapes = {key: layer.outline().shape for key, layer in layers.items()}
    shapes |= {key: tuple(one.shape) for key, one in module.named_parameters()}
    kind = model_for(component.kind)
    layout = MODELS[kind].layout if kind is not None else "canonical"
    if layout == "canonical":
        made = {
            key: Assignment(key, shape, (Piece(key, 0, shape[0] if shape else 1),))
            for key, shape in shapes.items()
        }
    else:
        rules = component.rules(shapes, layout, "canonical")
        made = {one.target: one for one in apply_rules(rules, shapes)}
    return View({key: one.shape for key, one in made.items()}, made, layers)
