"""Which layers go by what their removal costs (prune.depth_method=loss, contiguous or greedy).

    loss        every layer is left out by itself; those go whose removal hurts least
    contiguous  every block of neighbours of the wanted length is left out; the one goes whose removal hurts least
                (arXiv 2408.11796, section 3.2, by the accuracy of a task: layers 16 to 31 of 32)
    greedy      one layer after the other goes, each time the one without which what is left is best

Layers count from 1. Of equal costs the lowest layers go. Measured are layers of the teacher at its full width.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import artifacts, console, protection, prune_costs
from pipelines.choices import DepthMethod, Measure
from pipelines.config import Config, UserError
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.pruning import scores_file
from pipelines.pruning.loaded_teacher import LoadedTeacher
from pipelines.pruning.removal import Cost, Layers, Removals, measured_inside, sources
from pipelines.scores_origin import measures_removals

CostOf = Callable[[Layers], Cost]


@dataclass(frozen=True)
class Depth:
    """dropped: the layers that go, and their cost together. candidates: what was compared to find them, with its cost.
    next_best: of the candidates, the one that would have been taken otherwise; for `loss` the next layer."""

    dropped: Layers
    cost: Cost | None = None
    candidates: dict[Layers, Cost] = field(default_factory=dict)
    next_best: Layers | None = None


def by_cost(
    method: DepthMethod,
    layers: int,
    drop: int,
    cost: CostOf,
    order: Callable[[Cost], tuple[float, ...]],
    protected: Collection[int] = (),
) -> Depth:
    """The layers that `method` (loss, contiguous or greedy) finds. cost: of leaving layers out; order: what sorts it.

    Raises UserError where no block of that length is free of protected layers.
    """
    free = [number for number in range(1, layers + 1) if number not in protected]
    candidates: dict[Layers, Cost] = {}

    def ranked(of: Sequence[Layers]) -> list[Layers]:
        found = {one: cost(one) for one in of}
        candidates.update(found)
        return sorted(of, key=lambda one: order(found[one]))  # stable: of equal costs the lowest first

    if method is DepthMethod.contiguous:
        best = ranked(prune_costs.blocks(layers, drop, protected))
        if not best:
            raise UserError(
                f"prune.depth_method=contiguous: expected {drop} neighbouring layers that prune.protect does not name, "
                "found none. Protect fewer, keep more layers, or set prune.depth_method=greedy."
            )
    elif method is DepthMethod.greedy:
        gone: Layers = ()
        for _ in range(drop):
            best = ranked([tuple(sorted((*gone, number))) for number in free if number not in gone])
            gone = best[0]
    else:
        assert method is DepthMethod.loss
        singles = ranked([(number,) for number in free])
        together = tuple(sorted(number for (number,) in singles[:drop]))
        best = [together, *singles[drop:]]
    return Depth(best[0], cost(best[0]), candidates, best[1] if len(best) > 1 else None)


def words(layers: Layers) -> str:
    """ "1, 16-31" """
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in _runs(layers))


def _runs(layers: Layers) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours."""
    starts = [number for number in layers if number - 1 not in layers]
    ends = [number for number in layers if number + 1 not in layers]
    yield from zip(starts, ends, strict=True)


def sentence(depth: Depth, whole: Cost, method: DepthMethod, told: Callable[[Cost], str]) -> str:
    """What was chosen, and what came next, in one line."""
    assert depth.cost is not None
    text = f"depth by {method.value}: layers {words(depth.dropped)} go: {told(depth.cost)}; all layers: {told(whole)}"
    if depth.next_best:
        alone = " alone" if method is DepthMethod.loss else ""
        text += f"; next best {words(depth.next_best)}{alone}: {told(depth.candidates[depth.next_best])}"
    return text


def figures(depth: Depth, whole: Cost, method: DepthMethod, measure: Measure) -> dict[str, Any]:
    """For the manifest: the costs by the layers' words."""

    def plain(cost: Cost) -> Any:
        return cost.loss if measure is Measure.loss else vars(cost.task)

    assert depth.cost is not None
    return {
        "method": method.value,
        "measure": measure.value,
        "whole": plain(whole),
        "chosen": plain(depth.cost),
        "next_best": words(depth.next_best) if depth.next_best else None,
        "candidates": {words(layers): plain(cost) for layers, cost in depth.candidates.items()},
    }


# In the stage


class LayerChoice:
    """The layers that go, for any number that stays: those that are given, or those that measuring finds.

    Every rank makes one and asks it alike.
    """

    def __init__(self, context: artifacts.StageContext, teacher: LoadedTeacher) -> None:
        self.context, self.teacher = context, teacher
        self._found: dict[int, dict[str, Any]] = {}

    def dropped(self, keep: int) -> list[int] | None:
        """Layers from 1, ascending; None where scores say. Collective where prune.depth_method measures.

        Raises UserError where the calibration split or the questions do not fit the teacher.
        """
        config = self.context.config
        if not measures_removals(config):
            return config.student.drop_layers
        if keep == self.teacher.shape.num_hidden_layers:
            return None
        if keep not in self._found:
            started = time.monotonic()
            removals = open_removals(self.context, self.teacher)
            whole, found = choose_by_cost(removals, config, self.teacher.shape, keep)
            told = figures(found, whole, config.prune.depth_method, config.prune.depth_measure)
            seconds = round(time.monotonic() - started, 2)
            self._found[keep] = told | {
                "dropped": list(found.dropped),
                "measured": removals.measured,
                "seconds": seconds,
            }
        return list(self._found[keep]["dropped"])

    def figures(self, keep: int) -> dict[str, Any]:
        """For the manifest; empty where nothing was measured."""
        return {"depth": self._found[keep]} if keep in self._found else {}


def choose_by_cost(removals: Removals, config: Config, teacher: ModelShape, keep: int) -> tuple[Cost, Depth]:
    """(cost of the whole teacher, the layers that go for `keep` to stay) by prune.depth_method and depth_measure.

    Shows a bar and says what was chosen. Collective.
    """
    settings, layers = config.prune, teacher.num_hidden_layers
    method, measure = settings.depth_method, settings.depth_measure
    protected = protection.protected(settings.protect).all_layers
    told = functools.partial(Cost.words, measure=measure, normalised=settings.task_normalised)
    order = functools.partial(Cost.order, measure=measure, normalised=settings.task_normalised)
    asked: set[Layers] = set()
    before = removals.measured
    count = sum(passes for passes, _ in prune_costs.removals(method, layers, layers - keep, protected))
    with console.progress("prune  leaving layers out", count, "removals") as bar:

        def cost(left_out: Layers) -> Cost:
            found = removals(left_out, measure)
            if left_out not in asked:
                asked.add(left_out)
                bar.advance(1, detail=f"{words(left_out) or 'none'}: {told(found)}")
            return found

        whole = cost(())
        found = by_cost(method, layers, layers - keep, cost, order, protected)
    if taken := len(asked) - (removals.measured - before):
        console.say(f"prune  {taken} of {len(asked)} removals were measured before: {removals.path}")
    console.say(f"prune  {sentence(found, whole, method, told)}")
    return whole, found


def open_removals(context: artifacts.StageContext, teacher: LoadedTeacher) -> Removals:
    """What leaving layers out costs, with what the stage's file and prune.scores know of it. Collective."""
    config, settings = context.config, context.config.prune
    samples = prune_costs.removal_samples(settings)
    origin = parallel.on_first_rank(lambda: sources(config, teacher.shape, samples))
    given = Path(settings.scores) if settings.scores else None
    measure = measured_inside(teacher, samples)
    return Removals(teacher.shape, measure, context.directory / scores_file.FILE, origin, given)
