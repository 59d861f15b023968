"""The order of candidates, and which of them are looked at more closely."""

from collections.abc import Callable, Mapping, Sequence

from pipelines.choices import Measure
from pipelines.families import ModelShape
from pipelines.grid import Candidate

TIE = 1e-4  # nats/token: losses that lie no further apart are equal, and the smaller model goes first


def alone(teacher: ModelShape, candidate: ModelShape) -> dict[tuple[str, str], ModelShape]:
    """{(axis, size): the teacher with this axis alone as the candidate has it}, for the axes that it makes smaller.

    Heads go with their KV groups and within them: the axis of heads stands for heads within groups, all groups kept.
    """
    groups, own = teacher.num_key_value_heads, candidate.num_key_value_heads
    of_group = candidate.num_attention_heads // own
    changes = {
        "hidden_size": {"hidden_size": candidate.hidden_size},
        "intermediate_size": {"intermediate_size": candidate.intermediate_size},
        "num_key_value_heads": {
            "num_key_value_heads": own,
            "num_attention_heads": own * (teacher.num_attention_heads // groups),
        },
        "num_attention_heads": {"num_attention_heads": groups * of_group},
        "num_hidden_layers": {"num_hidden_layers": candidate.num_hidden_layers},
    }
    shapes = {axis: teacher.replace(**sizes) for axis, sizes in changes.items()}
    return {(axis, str(getattr(shape, axis))): shape for axis, shape in shapes.items() if shape != teacher}


def ordered(candidates: Sequence[Candidate], losses: Mapping[str, float], above: float) -> list[Candidate]:
    """By loss in steps of TIE above `above` (the teacher's), then the smaller first."""
    return sorted(candidates, key=lambda c: (round((losses[c.name] - above) / TIE), c.parameters, c.name))


def spread(ranked: Sequence[Candidate], count: int) -> list[Candidate]:
    """`count` of them in their order: first the best of each number of layers, in order, then the best of the rest.

    A short retraining changes the order of candidates (arXiv 2407.14679), above all of those of other depths: what the
    losses before it rank low should still be compared.
    """
    seen: set[int] = set()
    first: list[Candidate] = []
    rest: list[Candidate] = []
    for candidate in ranked:
        layers = candidate.shape.num_hidden_layers
        (rest if layers in seen else first).append(candidate)
        seen.add(layers)
    chosen = {candidate.name for candidate in [*first, *rest][:count]}
    return [candidate for candidate in ranked if candidate.name in chosen]


def winner(
    candidates: Sequence[Candidate], figure: Callable[[Candidate], float], by: Measure
) -> tuple[Candidate, Candidate | None, bool]:
    """(the best, the next best, whether smaller was what decided between equals). figure: a loss, or a task's score."""
    sign, within = (1, TIE) if by is Measure.loss else (-1, 0.0)
    best = min(sign * figure(c) for c in candidates)
    equals = sorted(
        (c for c in candidates if sign * figure(c) <= best + within),
        key=lambda c: (c.parameters, c.seconds or 0.0, c.name),
    )
    others = sorted((c for c in candidates if c is not equals[0]), key=lambda c: (sign * figure(c), c.parameters))
    return equals[0], others[0] if others else None, len(equals) > 1
