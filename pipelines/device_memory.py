"""Bytes in a device's memory over a distillation at a layout: weights, gradients, optimizer, and by activations.py what
lies there during a step. No torch.

A device's memory is that of the fullest pipeline stage: the first with the embedding, or the last with the head.
"""

from collections.abc import Sequence
from dataclasses import fields

from pipelines.activations import activation_bytes
from pipelines.config import DistilConfig, Layout, Precision, TeacherPrecision, TrainingConfig, teacher_precision
from pipelines.families import EMBEDDING, HEAD, ModelShape
from pipelines.signals import FeatureLoss, pipeline_stage, projection_sizes


def parameters_per_device(shape: ModelShape, tensor: int, pipeline: int) -> int:
    """Of the fullest pipeline stage: tensor-parallel tensors cut, norms whole, the vocabulary padded to divide."""
    (matrices, norms), outer = _shard_parameters(shape, tensor, pipeline)
    return (matrices + norms) * _layers_per_stage(shape, pipeline) + outer


def _shard_parameters(shape: ModelShape, tensor: int, pipeline: int) -> tuple[tuple[int, int], int]:
    """Of a layer, its matrices and its norms, and of what is no layer on the pipeline stage that has most of it."""
    padded = shape.replace(vocab_size=-(-shape.vocab_size // tensor) * tensor)
    sizes, matrices, norms, outer = padded.tensor_shapes(), 0, 0, {}
    for name, entry in padded.tensors().items():
        count = 1
        for size in sizes[name]:
            count *= size
        count = count // tensor if entry.parallel_dim is not None else count
        if ".layers." not in name:
            outer[name] = count
        elif len(sizes[name]) > 1:
            matrices += count
        else:
            norms += count
    head = outer.get(HEAD, outer[EMBEDDING] if pipeline > 1 else 0)  # a tied head is a copy on the last stage
    last = head + sum(count for name, count in outer.items() if name not in (EMBEDDING, HEAD))
    whole = outer[EMBEDDING] + last if pipeline == 1 else max(outer[EMBEDDING], last)
    return (matrices // shape.num_hidden_layers, norms // shape.num_hidden_layers), whole


def _layers_per_stage(shape: ModelShape, pipeline: int) -> int:
    return -(-shape.num_hidden_layers // pipeline)


def teacher_bytes(teacher: ModelShape, ranks: Layout, distil: DistilConfig) -> int:
    """Of the frozen teacher's weights on a device; offloaded, two of its layers at a time. In fp8 its layers' matrices
    have 1 byte per weight, and all else has 2."""
    (matrices, norms), outer = _shard_parameters(teacher, ranks.tensor, ranks.pipeline)
    layers = 2 if distil.teacher_offload else _layers_per_stage(teacher, ranks.pipeline)
    precision = teacher_precision(distil)
    weight = 4 if precision is TeacherPrecision.fp32 else 2
    of_matrix = 1 if precision is TeacherPrecision.fp8 else weight
    return layers * (of_matrix * matrices + weight * norms) + weight * outer


def projections_per_device(
    teacher: ModelShape, student: ModelShape, pipeline: int, losses: Sequence[FeatureLoss]
) -> int:
    """Weights of the projections on the pipeline stage that has most; every tensor-parallel device has all of them."""
    return max(projections_by_stage(teacher, student, pipeline, losses))


def projections_by_stage(
    teacher: ModelShape, student: ModelShape, pipeline: int, losses: Sequence[FeatureLoss]
) -> list[int]:
    stages = [0] * pipeline
    for loss in losses:
        stage = pipeline_stage(loss.student_layer, student.num_hidden_layers, pipeline)
        sizes = projection_sizes(loss, student.hidden_size, teacher.hidden_size)
        stages[stage] += sum(out * into for out, into in sizes)
    return stages


def bytes_per_device(
    teacher: ModelShape,
    student: ModelShape,
    ranks: Layout,
    training: DistilConfig,
    losses: Sequence[FeatureLoss] = (),
    follows_logits: bool = True,
) -> dict[str, int]:
    """What lies in a device's memory: for the whole run, and from activations on, an estimate (activations.py), at the
    end of a micro batch's forward pass. Communication buffers come on top.

    bf16: 2 bytes per weight, 4 per gradient, and 12 of optimizer state (fp32 weight and two moments); fp32: 4, 4 and 8.
    The teacher has weights alone.
    The distributed optimizer cuts the optimizer's state over the data-parallel and context-parallel ranks.
    """
    trained = parameters_per_device(student, ranks.tensor, ranks.pipeline)
    beside = projections_per_device(teacher, student, ranks.pipeline, losses)
    weight, gradient, optimizer = (2, 4, 12) if training.precision is Precision.bf16 else (4, 4, 8)
    cut = ranks.data * ranks.context if training.distributed_optimizer else 1
    parts = {
        "teacher_weights": teacher_bytes(teacher, ranks, training),
        "student_weights": weight * trained,
        "student_gradients": gradient * trained,
        "optimizer": optimizer * trained // cut,
        "projections": (weight + gradient) * beside + optimizer * beside // cut,
        **activation_bytes(teacher, student, ranks, training, losses, follows_logits),
    }
    return {**parts, "total": sum(parts.values())}


def training_bytes(shape: ModelShape, ranks: Layout, training: TrainingConfig) -> dict[str, int]:
    """As `bytes_per_device`, of plain training without a teacher."""
    own = {entry.name: getattr(training, entry.name) for entry in fields(TrainingConfig)}
    parts = bytes_per_device(shape, shape, ranks, DistilConfig(**own), follows_logits=False)
    parts["total"] -= parts.pop("teacher_weights")
    return parts
