"""Bytes on disk of a run: checkpoints, models and corpus, from shapes and settings. Imports no torch.

A checkpoint holds the trained weights in the training's precision and the optimizer's state: in bf16 the fp32 weights
and two moments, in fp32 two moments; with the distributed optimizer the fp32 weights in either. While one is written,
the ones that are kept are still there.
"""

import math
from typing import Any

from pipelines import artifacts, index_header, planning, scores_origin
from pipelines.choices import Quantization
from pipelines.config import Config, DistilConfig, Layout, Precision, TeacherMode, TrainingConfig, layout
from pipelines.device_memory import parameters_per_device, projections_by_stage, projections_per_device
from pipelines.families import ModelShape
from pipelines.files import read_object

_GATHERED = 12  # bytes per value: "param", "exp_avg" and "exp_avg_sq" in fp32


def checkpoint_bytes(trained: int, training: TrainingConfig) -> int:
    """Of one checkpoint. trained: values that are trained."""
    if training.precision is Precision.bf16:
        return (2 + 12) * trained
    return (4 + 8 + (4 if training.distributed_optimizer else 0)) * trained


def distillation_checkpoint_bytes(training: DistilConfig, teacher: ModelShape, student: ModelShape) -> int:
    """Of one checkpoint of a distillation: the student and its projections to the teacher's width."""
    losses = planning.feature_losses_of(training, teacher, student)
    return checkpoint_bytes(student.parameters() + projections_by_stage(teacher, student, 1, losses)[0], training)


def host_memory(training: TrainingConfig, checkpoint: int, on_device: int, ranks: Layout) -> tuple[int, int]:
    """Bytes in the host's memory of one process: at a save, and while its files are written and the training goes on.

    checkpoint: its bytes, which the ranks share evenly. on_device: values that are trained on the fullest device. With
    the distributed optimizer Megatron gathers at each save, on every data-parallel rank, the whole fp32 weights and two
    moments of its tensor- and pipeline-parallel share (DistributedOptimizer.get_parameter_state_dp_zero), and copies
    from them what this rank writes before it lets them go. What it gathers a bucket from comes on top.
    """
    share = math.ceil(checkpoint / ranks.processes)
    gathered = _GATHERED * on_device if training.distributed_optimizer else 0
    return gathered + share, share if training.save_asynchronous else 0


def run_bytes(config: Config, teacher: ModelShape, student: ModelShape) -> dict[str, Any]:
    """{"checkpoint": of one, "checkpoints": at the most at a time, "host_peak", "host_held", "corpus", "corpus_tokens",
    "models", "total"}.

    host_peak, host_held: see `host_memory`, the larger of the distillation's and the teacher's training; they are not
    on the disk, and not in total. corpus: of the tokens and
    documents it has, where it is made already, else of as many tokens as the training reads, each once, or more where
    only then the calibration split has the sequences that pruning reads.
    """
    training, teaches = config.distil, config.teacher.mode is not TeacherMode.take
    one = distillation_checkpoint_bytes(training, teacher, student)
    checkpoints = _at_a_time(training) * one
    if teaches:
        checkpoints += _at_a_time(config.teacher) * checkpoint_bytes(teacher.parameters(), config.teacher)
    ranks = layout(config.parallel)
    losses = planning.feature_losses_of(training, teacher, student)
    beside = projections_per_device(teacher, student, ranks.pipeline, losses)
    hosts = [host_memory(training, one, parameters_per_device(student, ranks.tensor, ranks.pipeline) + beside, ranks)]
    if teaches:
        own = checkpoint_bytes(teacher.parameters(), config.teacher)
        on_device = parameters_per_device(teacher, ranks.tensor, ranks.pipeline)
        hosts.append(host_memory(config.teacher, own, on_device, ranks))
    weight = _width(training.precision)
    pruned = 0 if config.student.path else _width(config.prune.precision) * student.parameters()
    start = 4 * teacher.parameters() if config.teacher.mode is TeacherMode.pretrain else 0  # a random one, in fp32
    models = {
        "teacher": start + _width(config.teacher.precision) * teacher.parameters() if teaches else 0,
        "prune": pruned,
        "distil": weight * student.parameters(),
        "export": weight * student.parameters() * (2 if config.export.nemo else 1)
        + _quantized_bytes(config, teacher, student, weight),
    }
    tokens, documents = _counted(config) or (_needed(config, teacher), None)
    written = tokens * (2 if teacher.vocab_size < index_header.WIDE else 4)
    written += index_header.DOCUMENT_BYTES * (documents or 0)
    corpus = 0 if config.data.corpus else written
    return {
        "checkpoint": one,
        "checkpoints": checkpoints,
        "host_peak": max(peak for peak, _ in hosts),
        "host_held": max(held for _, held in hosts),
        "models": models,
        "corpus": corpus,
        "corpus_tokens": tokens,
        "corpus_is_counted": documents is not None,
        "total": checkpoints + sum(models.values()) + corpus,
    }


def _quantized_bytes(config: Config, teacher: ModelShape, student: ModelShape, weight: int) -> int:
    """Of the forms that export.quantize asks for: linear layers in fewer bits, all else as in the model; without the
    scales, of which there are few."""
    total = 0
    for shape in [student, teacher] if config.export.quantize_teacher else [student]:
        linear = planning.matrix_parameters(shape) - shape.vocab_size * shape.hidden_size
        for method in config.export.quantize:
            bits = 4 if method is Quantization.int4 else 8
            total += linear * bits // 8 + weight * (shape.parameters() - linear)
    return total


def _at_a_time(training: TrainingConfig) -> int:
    return training.keep_checkpoints + training.keep_best + 1


def _width(precision: Precision) -> int:
    return 2 if precision is Precision.bf16 else 4


def _counted(config: Config) -> tuple[int, int] | None:
    """Tokens and documents of the corpus, where it is made already."""
    counts = artifacts.corpus_directory(config) / "counts.json"
    if not counts.is_file():
        return None
    splits = read_object(counts).get("splits", {}).values()
    return sum(int(split.get("tokens", 0)) for split in splits), sum(int(split.get("documents", 0)) for split in splits)


def _needed(config: Config, teacher: ModelShape) -> int:
    """Tokens of the smallest corpus of which every split has what is read of it."""
    trainings: list[TrainingConfig] = [config.distil]
    if config.teacher.mode is not TeacherMode.take:
        trainings.append(config.teacher)
    fractions = {name: getattr(config.data, f"{name}_fraction") for name in ("validation", "test", "calibration")}
    read = max(training.steps * training.global_batch_size * training.sequence_length for training in trainings)
    needed = read / max(1 - sum(fractions.values()), 1e-9)
    if not config.student.path and fractions["calibration"] and scores_origin.reads_calibration(config, teacher):
        scored = config.prune.calibration_samples * config.prune.sequence_length
        needed = max(needed, scored / fractions["calibration"])
    return round(needed)
