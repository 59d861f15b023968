"""What the devices of a layout send each other in a step of distillation: bytes by kind and by group. No torch.

Counted per device as rings send: an all-reduce of n bytes over g ranks sends 2 (g - 1) / g * n from each, an all-gather
or a reduce-scatter of n bytes, n being the whole, (g - 1) / g * n. Of the device that sends most of each kind, over all
micro batches of a step. The collectives are those of Megatron-Core, per micro batch of t tokens and hidden size h:

    tensor      each layer forward: two all-reduces of (t, h); backward two more. Under sequence parallelism two
                all-gathers and two reduce-scatters forward, four and two backward (arXiv 2205.05198, section 4.2.2, and
                inputs are gathered again for the gradient of weights). The teacher has the forward part alone, and
                recompute is one more forward. Embedding: one reduction of (t, h) per model. Loss: one reduction of the
                student's gradient (t, h), under sequence parallelism also both models' final states, gathered.
    pipeline    the states of both models to the next stage, and as much back as gradient
    context     keys and values of each layer once around the ring; backward them and their gradients
    data        once per step: the gradients in fp32, reduced; with the distributed optimizer scattered, and the weights
                gathered. Over the data-parallel and context-parallel ranks.

Left out: numbers per token of the loss, means, norms, and losses on hidden states and attention: below a hundredth.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import planning
from pipelines.config import DistilConfig, Layout, Precision, TeacherPrecision, teacher_precision
from pipelines.device_memory import parameters_per_device
from pipelines.families import ModelShape

GRADIENT_BYTES = 4  # reduced in fp32


@dataclass(frozen=True)
class Transfer:
    """bytes: that one device sends in a step. group: the axis of the layout. ranks: of the group."""

    group: str
    kind: str
    what: str
    ranks: int
    bytes: int


def all_reduce(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def all_gather(size: float, ranks: int) -> float:
    """A reduce-scatter sends as much. size: of the whole."""
    return (ranks - 1) / ranks * size


def communication(teacher: ModelShape, student: ModelShape, ranks: Layout, training: DistilConfig) -> dict[str, Any]:
    """{"transfers": each as Transfer, "bytes_per_device": by group}."""
    found = [part for part in transfers(teacher, student, ranks, training) if part.bytes]
    groups = ("tensor", "context", "pipeline", "data")
    sums = {group: sum(part.bytes for part in found if part.group == group) for group in groups}
    return {"transfers": [asdict(part) for part in found], "bytes_per_device": sums}


def transfers(teacher: ModelShape, student: ModelShape, ranks: Layout, training: DistilConfig) -> Iterator[Transfer]:
    tokens = training.micro_batch_size * training.sequence_length // ranks.context
    batches = training.global_batch_size // (training.micro_batch_size * ranks.data)
    own = 2 if training.precision is Precision.bf16 else 4
    held = 4 if teacher_precision(training) is TeacherPrecision.fp32 else 2
    models = [("student", student, own, 2 if training.recompute else 1, True)]
    taught = planning.runs_teacher(training)
    if taught:
        models.append(("teacher", teacher, held, 1, False))
    for who, shape, size, forwards, backward in models:
        layers = shape.num_hidden_layers // ranks.pipeline * batches
        states = tokens * shape.hidden_size * size
        if ranks.tensor > 1:
            yield from _tensor(who, states, layers, batches, ranks, forwards, backward)
        if ranks.context > 1:
            ring = 2 * shape.axis_size("key_value") // ranks.tensor * tokens * size * (ranks.context - 1)
            times = forwards + (2 if backward else 0)
            yield Transfer(
                "context", "point to point", f"{who}'s keys and values", ranks.context, layers * ring * times
            )
    if ranks.pipeline > 1:
        yield from _pipeline(tokens * batches, (student, own), (teacher, held) if taught else None, ranks)
    yield from _data(student, ranks, training, own)


def _tensor(
    who: str, states: int, layers: int, batches: int, ranks: Layout, forwards: int, backward: bool
) -> Iterator[Transfer]:
    """states: bytes of (tokens, hidden) of a micro batch; layers: of the stage, times micro batches."""
    group = ("tensor", ranks.tensor)
    reduced, gathered = all_reduce(states, ranks.tensor), all_gather(states, ranks.tensor)

    def of(kind: str, what: str, size: float) -> Transfer:
        return Transfer(group[0], kind, f"{who}'s {what}", group[1], round(size))

    if not ranks.sequence_parallel:
        yield of("all-reduce", "layers", layers * reduced * 2 * (forwards + backward))
        yield of("all-reduce", "embedding", batches * reduced)
        if backward:
            yield of("all-reduce", "gradient at the head", batches * reduced)
        return
    yield of("all-gather", "layers", layers * gathered * (2 * forwards + 4 * backward))
    yield of("reduce-scatter", "layers", layers * gathered * 2 * (forwards + backward))
    yield of("reduce-scatter", "embedding", batches * gathered)
    yield of("all-gather", "states at the head", batches * gathered)
    if backward:
        yield of("all-gather", "gradient of the embedding", batches * gathered)
        yield of("reduce-scatter", "gradient at the head", batches * gathered)


def _pipeline(
    tokens: int, student: tuple[ModelShape, int], teacher: tuple[ModelShape, int] | None, ranks: Layout
) -> Iterator[Transfer]:
    """A middle stage sends states forward and gradients back, the first and the last one of the two."""
    per_token = student[0].hidden_size * student[1] + (teacher[0].hidden_size * teacher[1] if teacher else 0)
    split = ranks.tensor if ranks.sequence_parallel else 1
    ways = 2 if ranks.pipeline > 2 else 1
    what = "states of both models, and gradients" if teacher else "states and gradients"
    yield Transfer("pipeline", "point to point", what, ranks.pipeline, ways * tokens * per_token // split)
    if student[0].tie_word_embeddings:
        shared = GRADIENT_BYTES * -(-student[0].vocab_size // ranks.tensor) * student[0].hidden_size
        yield Transfer("pipeline", "all-reduce", "gradient of the tied embedding", 2, round(all_reduce(shared, 2)))


def _data(student: ModelShape, ranks: Layout, training: DistilConfig, weight: int) -> Iterator[Transfer]:
    copies, trained = ranks.data * ranks.context, parameters_per_device(student, ranks.tensor, ranks.pipeline)
    if copies == 1:
        return
    gradients = GRADIENT_BYTES * trained
    if not training.distributed_optimizer:
        yield Transfer("data", "all-reduce", "gradients", copies, round(all_reduce(gradients, copies)))
        return
    yield Transfer("data", "reduce-scatter", "gradients", copies, round(all_gather(gradients, copies)))
    yield Transfer("data", "all-gather", "weights", copies, round(all_gather(weight * trained, copies)))
