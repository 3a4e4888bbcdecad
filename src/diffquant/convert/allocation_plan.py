"""AllocationPlanner: from formats by tensor to the plan that stores them so, and its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffquant.convert.allocation_choice import Choice
from diffquant.convert.allocation_options import Among, label_type, step_nbytes
from diffquant.convert.allocation_part import AllocatedPart
from diffquant.convert.budgets import Measure
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match
from diffquant.convert.plan import Plan, make_plan
from diffquant.convert.request import Request
from diffquant.convert.step import Step
from diffquant.core.errors import PlanMismatch
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile
from diffquant.quant.allocate import Allocation, Item, allocate
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import QuantType

__all__ = ["AllocationPlanner", "Options", "Solved", "chosen_formats", "kept_because"]

Options = Mapping[str, Mapping[str, Step]]
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Solved:
    """A choice and the plan that it makes.

    Attributes:
        choice: options taken, and how near to the best they are.
        plan: that stores them.
        nbytes: what the plan takes of the budget.
    """

    choice: Allocation
    plan: Plan
    nbytes: int


@dataclass(frozen=True, slots=True)
class AllocationPlanner:
    """What every try of an allocation shares.

    Attributes:
        logical: the bound source.
        match: what it was recognised as.
        part: what is chosen for.
        request: as asked, without formats.
        among: formats to choose from.
        options: canonical key -> format -> step.
        kept: of layers that types keep and that were freed: key -> the step that keeps it.
        measure: of the budget.
        matrix: importance matrix.
        inputs: statistics of layer inputs.
    """

    logical: LogicalSource
    match: Match
    part: AllocatedPart
    request: Request
    among: Among
    options: Options
    kept: Mapping[str, Step]
    measure: Measure
    matrix: ImportanceMatrix | None = None
    inputs: InputsFile | None = None

    def nbytes(self, key: str, name: str) -> int:
        """Bytes that a tensor takes in a format."""
        return self.step_nbytes(self.options[key][name])

    def step_nbytes(self, step: Step) -> int:
        """Bytes that a step takes, as the budget counts them."""
        return step_nbytes(step, self.request.container) if self.measure.aligned else step.nbytes

    def label(self, formats: Mapping[str, str], *, casts: bool = True) -> QuantType:
        """The plainest type of the format that most weights have; without `casts`, quantized."""
        names = [*self.among.packed, *(self.among.casts if casts else ())]
        weights = dict.fromkeys(names, 0)
        for key, name in formats.items():
            if casts or not FORMATS[name].is_cast:
                weights[name] = weights.get(name, 0) + self.options[key][name].parameters
        container = self.request.container
        kinds = {name: kind for name in weights if (kind := label_type(name, container))}
        return kinds[max(kinds, key=lambda name: weights[name])]

    def written(self, formats: Mapping[str, str]) -> dict[str, str]:
        """What a recipe has to say: a layer that stays as types keep it needs no word."""
        kept = self.kept
        return {k: name for k, name in formats.items() if k not in kept or kept[k].stored != name}

    def freed(self, formats: Mapping[str, str]) -> dict[str, str]:
        """Why layers are packed that types keep, by key."""
        return {
            key: f"allocated; freed, types keep it {step.stored}: {kept_because(step)}"
            for key, step in self.kept.items()
            if formats[key] != step.stored
        }

    def plan(self, formats: Mapping[str, str]) -> Plan:
        """The plan that stores these tensors so; its type is named after its bits per weight."""
        choice = self.choice(formats)
        # Bits follow from formats alone, so the first plan tells the name of the second.
        bits = self._made(choice.into(self.request)).bits_per_weight(self.part.name)
        return self._made(replace(choice, type=f"{bits:.2f}bpw").into(self.request))

    def choice(self, formats: Mapping[str, str]) -> Choice:
        """The formats as data, but for the type's name and notes."""
        return Choice(
            architecture=self.match.architecture,
            part=self.part.name,
            formats=self.written(formats),
            reasons=self.freed(formats),
            type="",
            base=self.label(formats, casts=False).name,
            file_type=self.label(formats).file_type,
            target=self.among.target.name,
            allocated=self.request.allocated,
        )

    def _made(self, request: Request) -> Plan:
        return make_plan(self.logical, self.match, request, matrix=self.matrix, inputs=self.inputs)

    def solve(self, items: tuple[Item, ...], limit: int, fixed: int) -> Solved:
        """The best choice whose plan takes no more than a limit.

        Args:
            items: tensors and their options.
            limit: of the measure.
            fixed: about what a plan takes beside the items; corrected here.

        Raises:
            PlanMismatch: no choice was found though the smallest fits.
        """
        least = sum(min(one.nbytes for one in item.options) for item in items)
        room, best, seen = limit - fixed, None, set[int]()
        for _ in range(_TRIES):
            room = max(room, least)
            if room in seen:
                break
            seen.add(room)
            choice = allocate(items, room)
            plan = self.plan(chosen_formats(items, choice.chosen))
            taken = self.measure.of(plan)
            if taken <= limit and (best is None or choice.error <= best.choice.error):
                best = Solved(choice, plan, taken)
            # What this plan takes beside its items is what the next should leave for it.
            room = limit - (taken - choice.nbytes)
            if taken <= limit and room <= max(seen):
                break
        if best is None:
            raise PlanMismatch(f"no choice takes at most {limit} bytes, though the smallest does")
        return best


def kept_because(step: Step) -> str:
    """Why types keep a weight, without what the source had to say to it."""
    return step.decision.reason.removesuffix(f"; already {step.stored}")


def chosen_formats(items: tuple[Item, ...], chosen: tuple[int, ...]) -> dict[str, str]:
    """Tensor -> format of a choice."""
    return {item.key: item.options[at].format for item, at in zip(items, chosen, strict=True)}
