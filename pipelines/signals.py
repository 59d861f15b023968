"""Which signals a student follows beside the teacher's logits, as settings; and what follows from them by arithmetic.

Layers count from 1; 0 is the output of the embedding; -1 is the last, -2 the one before. The hidden states of layer n
are the residual stream after it, before any norm. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol


class HiddenKind(Enum):
    mse = "mse"  # mean over channels of the squared difference, after the projection
    cosine = "cosine"  # 1 - cos, after the projection
    relational = "relational"  # squared differences of the tokens' cosine similarities; no projection


class AttentionKind(Enum):
    kl = "kl"  # KL(teacher's distribution || student's)
    mse = "mse"  # squared distance of the distributions
    scores = "scores"  # mean squared difference of the scores before the softmax


class Heads(Enum):
    mean = "mean"  # the means over the heads, whose numbers may differ
    each = "each"  # head by head


class ScheduleShape(Enum):
    linear = "linear"
    cosine = "cosine"


@dataclass
class HiddenLossConfig:
    """One loss between the hidden states of two layers, or of every student layer with its teacher layer."""

    student_layer: int | None = None  # None: every layer m and the embedding, with teacher layer round(m * N / M)
    teacher_layer: int | None = None  # None with student_layer None only
    kind: HiddenKind = HiddenKind.mse
    weight: float = 1.0  # of the mean over the entry's pairs of layers
    rank: int | None = (
        None  # of the projection; None: full rank where widths differ, no projection where they are equal
    )


@dataclass
class AttentionLossConfig:
    """One loss between the attention of two layers, or of every student layer with its teacher layer."""

    student_layer: int | None = None
    teacher_layer: int | None = None
    kind: AttentionKind = AttentionKind.kl
    heads: Heads = Heads.mean
    weight: float = 1.0


@dataclass
class ScheduleConfig:
    """From the setting's own value to `end`."""

    end: float | None = None  # None: no schedule
    shape: ScheduleShape = ScheduleShape.linear
    first_step: int = 0  # the setting's own value until then
    steps: int | None = None  # None: until the end of training


@dataclass
class SchedulesConfig:
    kd: ScheduleConfig = field(default_factory=ScheduleConfig)
    ce: ScheduleConfig = field(default_factory=ScheduleConfig)
    temperature: ScheduleConfig = field(default_factory=ScheduleConfig)
    features: ScheduleConfig = field(default_factory=ScheduleConfig)  # a factor, 1 at first, of hidden and attention


@dataclass
class TaidConfig:
    """The target moves from the student's own distribution to the teacher's (arXiv 2501.16937)."""

    enabled: bool = False
    start: float = 0.4  # t, the teacher's share, before the first step
    end: float = 1.0  # t after the last
    momentum: float = 0.99
    alpha: float = 5e-4  # by how much t may rise per step beyond the line from start to end


class LayerPair(Protocol):
    """What HiddenLossConfig and AttentionLossConfig have in common."""

    student_layer: int | None
    teacher_layer: int | None


@dataclass(frozen=True)
class FeatureLoss:
    """One loss between one layer of each model. Layers from 1, 0 the embedding's output; kind "mse", "cosine",
    "relational", or with heads "kl", "mse", "scores"; heads: None for hidden states, "mean" or "each" for attention."""

    student_layer: int
    teacher_layer: int
    kind: str
    weight: float
    rank: int | None = None
    heads: str | None = None

    @property
    def across_tokens(self) -> bool:
        """Whether it compares the tokens of a row with each other; such a loss needs no projection."""
        return self.heads is not None or self.kind == "relational"

    @property
    def name(self) -> str:
        what = "attention" if self.heads else "hidden"
        return f"{what}_{self.kind}_{self.student_layer}_{self.teacher_layer}"


def across_tokens(hidden: list[HiddenLossConfig], attention: list[AttentionLossConfig]) -> bool:
    """Whether a loss compares the tokens of a row with each other, whichever documents they are of."""
    return bool(attention) or any(entry.kind is HiddenKind.relational for entry in hidden)


def feature_losses(
    hidden: list[HiddenLossConfig],
    attention: list[AttentionLossConfig],
    *,
    student_layers: int,
    teacher_layers: int,
) -> list[FeatureLoss]:
    """Every pair of layers by number, entry by entry; an entry's weight is shared evenly by its pairs."""
    losses: list[FeatureLoss] = []
    for entry in (*hidden, *attention):
        heads = entry.heads.value if isinstance(entry, AttentionLossConfig) else None
        rank = entry.rank if isinstance(entry, HiddenLossConfig) else None
        pairs = list(layer_pairs(entry, 1 if heads else 0, student_layers, teacher_layers))
        for student, teacher in pairs:
            losses.append(FeatureLoss(student, teacher, entry.kind.value, entry.weight / len(pairs), rank, heads))
    return losses


def everywhere(
    hidden: list[HiddenLossConfig],
    attention: list[AttentionLossConfig],
    *,
    student_layers: int,
    teacher_layers: int,
    largest_rank: int,
    equal_heads: bool,
) -> list[FeatureLoss]:
    """The same kinds of losses on every layer of other models, each once: ranks are cut to the largest one, and heads
    that cannot be paired are compared by their mean."""
    uniform: dict[str, None] = {"student_layer": None, "teacher_layer": None}
    losses = feature_losses(
        [replace(e, rank=None if e.rank is None else min(e.rank, largest_rank), **uniform) for e in hidden],
        [replace(e, heads=e.heads if equal_heads else Heads.mean, **uniform) for e in attention],
        student_layers=student_layers,
        teacher_layers=teacher_layers,
    )
    return list({loss.name: loss for loss in losses}.values())


def layer_pairs(entry: LayerPair, first: int, student_layers: int, teacher_layers: int) -> Iterator[tuple[int, int]]:
    """(student layer, teacher layer), counted from 1; first: 0 where the embedding's output is a layer too, else 1.

    Uniform, as arXiv 1909.10351 maps them: layer m of M follows layer round(m * N / M) of N, on whatever pipeline stage
    both are as long as the stages divide both models evenly.
    """
    if entry.student_layer is None or entry.teacher_layer is None:
        for layer in range(first, student_layers + 1):
            yield layer, (2 * layer * teacher_layers + student_layers) // (2 * student_layers)
    else:
        yield _from_the_front(entry.student_layer, student_layers), _from_the_front(entry.teacher_layer, teacher_layers)


def _from_the_front(layer: int, layers: int) -> int:
    return layers + 1 + layer if layer < 0 else layer


def projection_sizes(loss: FeatureLoss, student_width: int, teacher_width: int) -> list[tuple[int, int]]:
    """(out, in) of each factor of the projection that a loss needs; empty where it needs none."""
    if loss.across_tokens or (loss.rank is None and student_width == teacher_width):
        return []
    if loss.rank is None:
        return [(teacher_width, student_width)]
    return [(loss.rank, student_width), (teacher_width, loss.rank)]


def pipeline_stage(layer: int, layers: int, stages: int) -> int:
    """Where a layer's output is: stage 0 for the embedding's; layers are divided evenly."""
    return max(layer - 1, 0) // (layers // stages)


def in_words(
    hidden: list[HiddenLossConfig],
    attention: list[AttentionLossConfig],
    schedules: SchedulesConfig,
    taid: TaidConfig,
) -> str:
    """What is added to the loss and what changes in it, e.g. " + 0.125 * cosine(hidden, layers -1 and -1)"."""
    words = ""
    for entry in (*hidden, *attention):
        if isinstance(entry, AttentionLossConfig):
            what = "attention of each head" if entry.heads is Heads.each else "attention, mean of the heads"
        else:
            what = "hidden" + (f" projected at rank {entry.rank}" if entry.rank else "")
        given = entry.student_layer is not None
        layers = f"layers {entry.student_layer} and {entry.teacher_layer}" if given else "mean of all layers"
        words += f" + {float(entry.weight)} * {entry.kind.value}({what}, {layers})"
    if taid.enabled:
        words += f"; teacher = (1 - t) * student + t * teacher in logits, t from {taid.start} to {taid.end} (TAID)"
    for name, schedule in vars(schedules).items():
        if schedule.end is not None:
            words += f"; {name} to {float(schedule.end)}"
    return words
