"""The search for the student's shape: its limits, its grid, and what it distils its candidates with."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import capacity, grid, questions
from pipelines.choices import Measure
from pipelines.config import Config, Layout, UserError, distils_candidates, expect, searches
from pipelines.families import ModelShape
from pipelines.grid import Candidate
from pipelines.prune_settings import SearchConfig
from pipelines.speeds import MEASURED, MODELLED


def stages_with(config: Config, stages: Collection[str]) -> frozenset[str]:
    """The stages, and distil where prune distils candidates: by the same settings, which must be as right."""
    follows = "prune" in stages and distils_candidates(config)
    return frozenset(stages) | ({"distil"} if follows else frozenset())


def check(config: Config, ranks: Layout, teacher: ModelShape) -> list[Candidate]:
    """The candidates, the largest first. Raises UserError."""
    search = config.prune.search
    by_task = search.by is Measure.task
    remedy = "A search measures the teacher's weights: give the shape by student.*, or leave prune.random_weights out."
    expect(not config.prune.random_weights, "prune.random_weights", "false with prune.target", "true", remedy)
    expect(
        not by_task or bool(config.prune.task), "prune.search.by", "loss without prune.task", "task", "Set prune.task."
    )
    if by_task:
        questions.check(config, teacher)
    remedy = "Leave it at loss, or parallel.context=1."
    whole = not by_task or ranks.context == 1
    expect(whole, "prune.search.by", f"loss with parallel.context={ranks.context}", "task", remedy)
    fewer = search.candidates <= search.measured
    expected = f"at most prune.search.measured={search.measured}"
    expect(fewer, "prune.search.candidates", expected, search.candidates, "Lower it.")
    if search.speed not in (MODELLED, MEASURED):
        there = Path(search.speed).is_file()
        expect(
            there, "prune.search.speed", f"{MODELLED}, {MEASURED} or a table's file", search.speed, "Check the path."
        )
    found, _ = grid.candidates(config, ranks, teacher)
    return found


def representatives(candidates: list[Candidate]) -> list[ModelShape]:
    """Shapes that stand for all where a setting names a layer, counts heads or bounds a width: one of every number of
    layers, the narrowest, and those of fewest heads and KV groups; the largest first."""
    shapes = {candidate.shape.num_hidden_layers: candidate.shape for candidate in reversed(candidates)}
    for axis in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        least = min(candidates, key=lambda candidate: getattr(candidate.shape, axis))
        shapes[f"{axis} {least.name}"] = least.shape  # type: ignore[index]
    return [candidates[0].shape, *shapes.values()]


@contextmanager
def named(config: Config, shape: ModelShape) -> Iterator[None]:
    """Where the student is searched for, a refusal inside says which candidate it is about."""
    try:
        yield
    except UserError as error:
        which = f" (Of the candidate {grid.shape_name(shape)} of prune.target.)" if searches(config) else ""
        raise UserError(f"{error}{which}") from None


def warnings(
    config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape, student: ModelShape
) -> Iterator[str]:
    if not {"plan", "prune"} & set(stages):
        return
    targeted = any(value is not None for value in vars(config.prune.target).values())
    if targeted and config.student.path:
        yield f"prune.target has no effect with student.path={config.student.path}"
    if not targeted and config.prune.search != SearchConfig():
        yield "prune.search has no effect without prune.target"
    in_steps = bool(config.iterate.students)  # where each step has its own advice
    if not in_steps and (found := capacity.advice(config, ranks, teacher, student)):
        yield capacity.in_words(found)
