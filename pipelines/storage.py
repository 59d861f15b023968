"""Bytes on disk of a run: checkpoints, models and corpus, from shapes and settings. Imports no torch.

A checkpoint holds the trained weights in the training's precision and the optimizer's state: in bf16 the fp32 weights
and two moments, in fp32 two moments; with the distributed optimizer the fp32 weights in either. While one is written,
the ones that are kept are still there.
"""

import math
from typing import Any

from pipelines import artifacts, index_header, planning, scores_origin
from pipelines.choices import Quantization
from pipelines.config import Config, DistilConfig, Precision, TeacherMode, TrainingConfig, layout
from pipelines.device_memory import projections_by_stage
from pipelines.families import ModelShape
from pipelines.files import read_object


def checkpoint_bytes(trained: int, training: TrainingConfig) -> int:
    """Of one checkpoint. trained: values that are trained."""
    if training.precision is Precision.bf16:
        return (2 + 12) * trained
    return (4 + 8 + (4 if training.distributed_optimizer else 0)) * trained


def distillation_checkpoint_bytes(training: DistilConfig, teacher: ModelShape, student: ModelShape) -> int:
    """Of one checkpoint of a distillation: the student and its projections to the teacher's width."""
    losses = planning.feature_losses_of(training, teacher, student)
    return checkpoint_bytes(student.parameters() + projections_by_stage(teacher, student, 1, losses)[0], training)


def run_bytes(config: Config, teacher: ModelShape, student: ModelShape) -> dict[str, Any]:
    """{"checkpoint": of one, "checkpoints": at the most at a time, "host_copy", "corpus", "corpus_tokens", "models",
    "total"}.

    host_copy: of the distillation's, in the memory of each process's host while its files are written and the training
    goes on; the ranks share a checkpoint evenly. It is not on the disk, and not in total. corpus: of the tokens and
    documents it has, where it is made already, else of as many tokens as the training reads, each once, or more where
    only then the calibration split has the sequences that pruning reads.
    """
    training, teaches = config.distil, config.teacher.mode is not TeacherMode.take
    one = distillation_checkpoint_bytes(training, teacher, student)
    checkpoints = _at_a_time(training) * one
    if teaches:
        checkpoints += _at_a_time(config.teacher) * checkpoint_bytes(teacher.parameters(), config.teacher)
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
        "host_copy": math.ceil(one / layout(config.parallel).processes) if training.save_asynchronous else 0,
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
