"""What an architecture is, as data: components, their two namings, precision policy, defaults.

An architecture file fills one `Architecture`. Nothing in it says how deep or wide a model is:
depths and widths come from the source's own keys and shapes. What shapes cannot say has a default
there, under the field name of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from diffquant.convert.architectures.links import Link, backward, forward, translate
from diffquant.convert.rules import Rename, Rule, Shape, Shapes
from diffquant.core.errors import NotInvertible

__all__ = [
    "PREFIXES",
    "WRAPPERS",
    "Architecture",
    "Component",
    "Defaults",
    "Facts",
    "Family",
    "Keep",
    "Latent",
    "Layout",
    "Sampling",
    "Signature",
    "Variant",
]

# Where a bare denoiser may sit in a single file, the one that is written first.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "model.")

# What training and other tools leave before the names of a whole model: read, never written.
# huggingface/diffusers@58eb52c: pipelines hold a `transformer` or a `unet`; torch's DataParallel
# says `module.`, torch.compile `_orig_mod.`; `model.model.` is among ComfyUI's own
# (Comfy-Org/ComfyUI@0b61ce5:comfy/model_detection.py, unet_prefix_from_state_dict).
WRAPPERS = ("model.model.", "transformer.", "unet.", "module.", "_orig_mod.")

Layout: TypeAlias = Literal["canonical", "diffusers", "alternate", "gguf"]
Facts: TypeAlias = dict[str, object]
Defaults: TypeAlias = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Signature:
    """Keys that tell a component in one layout.

    Attributes:
        required: keys that must all be there.
        forbidden: beginnings of keys that must not be there: those of look-alikes.
    """

    required: tuple[str, ...]
    forbidden: tuple[str, ...] = ()

    def missing(self, shapes: Shapes) -> tuple[str, ...]:
        """Required keys that `shapes` lacks."""
        return tuple(key for key in self.required if key not in shapes)

    def foreign(self, shapes: Shapes) -> tuple[str, ...]:
        """Keys of `shapes` that this component never has (at most one is named)."""
        if not self.forbidden:
            return ()
        return next(((key,) for key in shapes if key.startswith(self.forbidden)), ())


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model, and how its two namings correspond.

    Attributes:
        name: denoiser, vae, text_encoder, text_encoder_2 ...
        kind: which model it is: unet_ldm, flux, vae_kl, clip_text, t5_encoder ...
        folder: subfolder in Diffusers layout.
        prefixes: prefixes in single files, the canonical one first.
        signatures: by layout. "alternate" is any further naming that can only be read; "gguf" is
            llama.cpp's, where it has one.
        links: (shapes, layout) -> correspondence, for shapes in that layout; layouts that have no
            signature of their own are never asked for. None: the namings are recognised, and
            nobody has stated how they correspond; `facts` then gets the names there are.
        facts: Diffusers-named shapes -> what they say, as config.json fields and structure marks
            (names starting with "_", which are for recognition only).
        where: facts this component must have: name -> allowed values.
        same_names: canonical and Diffusers names are the same.
        ignored: (pattern, reason): keys under the prefix that carry nothing.
        published: alternate -> Diffusers links, needed where canonical names are neither.
        gguf: (shapes, their layout) -> rules to llama.cpp's names, or from them to canonical ones
            for shapes in layout "gguf".
    """

    name: str
    kind: str
    folder: str
    prefixes: tuple[str, ...]
    signatures: Mapping[Layout, Signature]
    links: Callable[[Shapes, Layout], list[Link]] | None
    facts: Callable[[Shapes], Facts]
    where: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    same_names: bool = False
    ignored: tuple[tuple[str, str], ...] = ()
    published: Callable[[Shapes], list[Link]] | None = None
    gguf: Callable[[Shapes, Layout], tuple[Rule, ...]] | None = None

    def links_of(self, shapes: Shapes, layout: Layout) -> list[Link]:
        """The correspondence, empty where none is known."""
        return self.links(shapes, layout) if self.links is not None else []

    def rules(self, shapes: Shapes, source: Layout, target: Layout) -> tuple[Rule, ...]:
        """Rules between two layouts; identity when they are the same.

        Raises:
            NotInvertible: the target is an alternate naming, or there is no way to it.
        """
        alike = self.same_names and not {"alternate", "gguf"} & {source, target}
        if source == target or alike or (self.links is None and target == "canonical"):
            return tuple(Rename(key, key) for key in shapes)
        if "gguf" in (source, target):
            if self.gguf is None or not self.same_names:
                raise NotInvertible(f"{self.kind}: llama.cpp has no names for it")
            return self.gguf(shapes, source)
        if target == "alternate":
            raise NotInvertible(f"{self.kind}: {target} names are read, never written")
        if self.links is None:
            raise NotInvertible(
                f"{self.kind}: how its {source} names become {target} ones is not known here; "
                "write a file that keeps the names: .safetensors or .gguf"
            )
        if source == "canonical":
            return backward(self.links(shapes, source), shapes)
        if source == "alternate" and target == "diffusers" and not self.same_names:
            if self.published is None:
                raise NotInvertible(f"{self.kind}: no rules from {source} to {target} names")
            return forward(self.published(shapes), shapes)
        return forward(self.links(shapes, source), shapes)

    def facts_of(self, shapes: Shapes, layout: Layout) -> Facts:
        """What names and shapes say, whatever the layout."""
        if self.links is None:
            return self.facts(shapes)
        return self.facts(translate(self.rules(shapes, layout, "diffusers"), shapes))


@dataclass(frozen=True, slots=True)
class Keep:
    """Canonical keys (regular expression, searched) that stay in high precision.

    `table` marks weights that are no layer's matrix, such as embedding tables. `frees` marks linear
    layers that diffusers was seen to unpack all the same (tests/clients/test_freed_layers.py), and
    whose width no loader reads: `--free-kept` may choose for these (docs/allocate.md).
    """

    pattern: str
    reason: str
    source: str
    table: bool = False
    frees: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """A family of tensors that mixes treat alike; families are exclusive, first match wins."""

    name: Literal["v", "qkv", "ffn_down"]
    pattern: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A member of the family that facts can tell; `when` maps fact names to required values.

    Attributes:
        name: what the Match says.
        when: every fact must have the given value.
        evidence: said to the user; also what cannot be told.
        keys: keys anywhere in the source that must be there (marker tensors).
        starts: beginning of a key of the denoiser that must be there.
    """

    name: str
    when: Mapping[str, object]
    evidence: str
    keys: tuple[str, ...] = ()
    starts: str = ""

    def matches(self, facts: Facts, keys: Mapping[str, Shape]) -> bool:
        """Whether the facts and marker keys are this variant's."""
        if any(facts.get(name) != value for name, value in self.when.items()):
            return False
        if self.starts and not any(key.startswith(self.starts) for key in keys):
            return False
        return all(key in keys for key in self.keys)


@dataclass(frozen=True, slots=True)
class Latent:
    """The latent space: channels, pixels per latent pixel, and decoded = latent / scale + shift.

    `patch` latent pixels along a side make a token; `space` is a key of SPACES, "" where unknown.
    """

    channels: int
    downscale: int
    scaling_factor: float | None
    shift_factor: float | None = None
    patch: int = 1
    space: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Defaults for generation: what the makers recommend.

    Attributes:
        steps: number of steps.
        cfg: classifier-free guidance scale; 1 runs the model once per step.
        guidance: value of the distilled guidance input, None where there is none.
        sampler: sampler name.
        schedule: noise schedule name.
        width: native width in pixels.
        height: native height in pixels.
        source: where the numbers come from.
    """

    steps: int
    cfg: float
    guidance: float | None
    sampler: str
    schedule: str
    width: int
    height: int
    source: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of ARCHITECTURES.

    Attributes:
        slug: name in every interface.
        title: name for people.
        components: the denoiser first; several where members of a family differ in structure.
        variants: first match wins; the last row matches anything.
        keep: layers of the denoiser, or of a part that stands alone, kept in high precision.
        families: tensor families, in order.
        gguf_architecture: `general.architecture` in GGUF files.
        gguf_names: variant -> the same, where members of the family differ.
        gguf_note: said with a GGUF file that not every reader of GGUF knows.
        gguf_prefix: prefix of keys in GGUF files.
        latent: the latent space.
        variant_spaces: variant -> key of SPACES, for those whose space is another; "" where it
            works on pixels or nobody here knows.
        sampling: generation defaults by variant; "" is the default.
        hyper_defaults: component name or "scheduler" -> config.json field -> value.
        variant_defaults: variant -> overrides of `hyper_defaults`.
        edge_blocks: module list whose first and last block some mixes store finer, or "".
        pipelines: model_index.json class -> (variant the tensors show, variant it names).
        reshapes: whether ComfyUI-GGUF stores this architecture's awkward rows as rows of 256.
        tuned_keep: what `--policy tuned` keeps besides `keep`.
        tuned_families: what `--policy tuned` counts to a family before `families` does.
        packs_convolutions: whether types pack convolutions too: there is little else.
    """

    slug: str
    title: str
    components: tuple[Component, ...]
    variants: tuple[Variant, ...]
    keep: tuple[Keep, ...]
    families: tuple[Family, ...]
    gguf_architecture: str
    gguf_prefix: str
    latent: Latent
    sampling: Mapping[str, Sampling]
    hyper_defaults: Defaults
    variant_defaults: Mapping[str, Defaults] = field(default_factory=dict)
    edge_blocks: str = ""
    pipelines: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    reshapes: bool = False
    tuned_keep: tuple[Keep, ...] = ()
    tuned_families: tuple[Family, ...] = ()
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_note: str = ""
    variant_spaces: Mapping[str, str] = field(default_factory=dict)
    packs_convolutions: bool = False

    def space_for(self, variant: str = "") -> str:
        """Key of SPACES for a variant; "" where nobody here knows."""
        return self.variant_spaces.get(variant, self.latent.space)

    def gguf_architecture_for(self, variant: str = "") -> str:
        """`general.architecture` of a variant."""
        return self.gguf_names.get(variant, self.gguf_architecture)

    @property
    def is_tuned(self) -> bool:
        """Whether `--policy tuned` differs from the published policy here."""
        return bool(self.tuned_keep or self.tuned_families)

    @property
    def denoisers(self) -> tuple[Component, ...]:
        """The denoiser, and others of the family that are built differently."""
        return tuple(one for one in self.components if one.name == "denoiser")

    @property
    def companions(self) -> tuple[Component, ...]:
        """Every part that is no denoiser."""
        return tuple(one for one in self.components if one.name != "denoiser")

    def component(self, name: str, kind: str = "") -> Component:
        """The component of that name (and kind); KeyError when the architecture has none."""
        for one in self.components:
            if one.name == name and kind in ("", one.kind):
                return one
        raise KeyError(f"{self.slug} has no component {name!r}")

    def defaults(self, component: str, variant: str = "") -> dict[str, object]:
        """Defaults of one component, or of "scheduler", for a variant."""
        override = self.variant_defaults.get(variant, {}).get(component, {})
        return {**self.hyper_defaults.get(component, {}), **override}

    def sampling_for(self, variant: str = "") -> Sampling:
        """Generation defaults for a variant."""
        return self.sampling.get(variant, self.sampling[""])
