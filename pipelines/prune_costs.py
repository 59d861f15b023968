"""What the prune stage takes: passes over the calibration split, and files that are read, cut and hashed. No torch.

Passes are reckoned as planning.py reckons training, at plan.share_of_peak of the device's peak. What files cost is
reckoned with the two speeds below, and so is as good as they are for the machine at hand.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import protection, scores_origin
from pipelines.choices import BY_REMOVAL, DepthMethod, Importance, Measure, Precision
from pipelines.config import Config, Layout, searches
from pipelines.families import ModelShape
from pipelines.planning import (
    FORWARD,
    FORWARD_AND_BACKWARD,
    attention_flops,
    matrix_parameters,
    peak_flops,
)
from pipelines.prune_settings import PruneConfig

READ_BYTES_PER_SECOND = 1e9  # an assumption: one disk, or one client of a shared one; hashing is about as fast
CUT_BYTES_PER_SECOND = 0.15e9  # of the student, on one core; launchers/slicing_benchmark.py found 0.16 to 0.38


@dataclass(frozen=True)
class Passes:
    """Over `tokens` tokens each; flops: of them all together."""

    what: str
    passes: int
    tokens: int
    flops: int


def prune_cost(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> dict[str, Any]:
    """{"passes", "flops", "bytes_read", "bytes_written", "bytes_hashed", "seconds": by part, "minutes", "not_counted"}.

    student: what is cut out. Weights count 2 bytes with prune.precision=bf16, else 4.
    """
    done, by_task = list(passes(config, teacher, student)), _removes(config, teacher, Measure.task)
    peak = peak_flops(config.plan.gpu)
    assert peak is not None, config.plan.gpu
    speed = config.plan.share_of_peak * peak * ranks.processes
    width = 2 if config.prune.precision is Precision.bf16 else 4
    whole, cut = width * teacher.parameters(), width * student.parameters()
    read = whole if done or by_task else 0  # the cut reads again what it needs, and is counted by what it writes
    seconds = {
        "reading": read / READ_BYTES_PER_SECOND,
        **{entry.what: entry.flops / speed for entry in done},
        "cutting": cut / CUT_BYTES_PER_SECOND,
        "hashing": (whole + cut) / READ_BYTES_PER_SECOND,
    }
    return {
        "passes": [asdict(entry) for entry in done],
        "flops": sum(entry.flops for entry in done),
        "bytes_read": read,
        "bytes_written": cut,
        "bytes_hashed": whole + cut,
        "read_bytes_per_second": READ_BYTES_PER_SECOND,
        "cut_bytes_per_second": CUT_BYTES_PER_SECOND,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "minutes": round(sum(seconds.values()) / 60, 2),
        "not_counted": ["questions of prune.task"] * by_task + ["the search"] * searches(config),
    }


def passes(config: Config, teacher: ModelShape, student: ModelShape) -> Iterator[Passes]:
    """Scoring runs the teacher without its head; Taylor's also backward and with it, as a training step of the weights
    would; removals run what is left, with the head."""
    settings = config.prune
    needed = set() if settings.scores else set(scores_origin.needed(config, teacher))
    tokens = settings.calibration_samples * settings.sequence_length
    taylor, layers = settings.importance is Importance.taylor, teacher.num_hidden_layers
    if "block_influence" in needed or ("hidden" in needed and not taylor):
        yield Passes("scoring", 1, tokens, FORWARD * tokens * forward_flops(config, teacher, layers, head=False))
    if "taylor_layers" in needed or ("hidden" in needed and taylor):
        yield Passes("taylor", 1, tokens, FORWARD_AND_BACKWARD * tokens * forward_flops(config, teacher, layers))
    if _removes(config, teacher, Measure.loss):
        tokens = removal_samples(settings) * settings.sequence_length
        protected = protection.protected(settings.protect).all_layers
        runs = removals(settings.depth_method, layers, layers - student.num_hidden_layers, protected)
        flops = sum(times * tokens * forward_flops(config, teacher, run) for times, run in runs)
        yield Passes("layers left out", sum(times for times, _ in runs), tokens, flops)


def removal_samples(settings: PruneConfig) -> int:
    """Sequences of the calibration split that the loss of a removal is measured on."""
    return min(settings.depth_samples or settings.calibration_samples, settings.calibration_samples)


def _removes(config: Config, teacher: ModelShape, by: Measure) -> bool:
    """Whether removals are measured in this way."""
    measures = config.prune.depth_method in BY_REMOVAL and scores_origin.ranked(config, teacher)[1]
    return measures and config.prune.depth_measure is by


def blocks(layers: int, length: int, protected: Collection[int] = ()) -> list[tuple[int, ...]]:
    """Every block of `length` neighbouring layers, from 1, without a protected one, the lowest first."""
    every = (tuple(range(first, first + length)) for first in range(1, layers - length + 2))
    return [block for block in every if not set(block) & set(protected)]


def removals(method: DepthMethod, layers: int, drop: int, protected: Collection[int] = ()) -> list[tuple[int, int]]:
    """(passes, layers that each runs) of a measured depth_method (pruning/depth.py), the whole teacher first."""
    free = layers - len(set(protected))
    if method is DepthMethod.contiguous:
        return [(1, layers), (len(blocks(layers, drop, protected)), layers - drop)]
    if method is DepthMethod.greedy:
        return [(1, layers), *((free - gone + 1, layers - gone) for gone in range(1, drop + 1))]
    return [(1, layers), (free, layers - 1), *[(1, layers - drop)] * (drop > 1)]


def forward_flops(config: Config, shape: ModelShape, layers: int, head: bool = True) -> int:
    """Per token, of `layers` of the shape's layers."""
    run, outer = shape.replace(num_hidden_layers=layers), shape.vocab_size * shape.hidden_size
    weights = matrix_parameters(run) - (0 if head else outer)
    return 2 * weights + attention_flops(run, config.prune.sequence_length)
