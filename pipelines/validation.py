"""Every check of a configuration that needs nothing heavy, before anything is built or started. Imports no torch.

`validate` raises UserError with expected, found and remedy, and returns warnings for settings without effect. What is
checked depends on the stages asked for: `plan` needs no file of the teacher, `distil` no source of the corpus.
"""

import glob
import importlib.util
import json
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pipelines import artifacts, planning
from pipelines.config import Config, Layout, SourceKind, TeacherMode, TrainingConfig, UserError, layout
from pipelines.families import ModelShape
from pipelines.stages import STAGES


def validate(config: Config, stages: Collection[str]) -> list[str]:
    """stages: the names that are asked for. Returns warnings; raises UserError."""
    ranks = layout(config.parallel)
    _check_numbers(config)
    _check_name(config)
    if "corpus" in stages:
        _check_sources(config)
    _check_paths(config, stages)
    try:
        teacher = planning.teacher_shape(config)
        student = planning.student_shape(config)
    except ValueError as error:  # families.py knows no UserError
        raise UserError(str(error)) from None
    _check_shape(teacher, "model.shape")
    _check_target(config, teacher, student)
    if any(STAGES[name].ranks and name != "verify" for name in stages):  # verify makes shapes to fit the layout
        _check_layout(ranks, teacher, "teacher")
        _check_layout(ranks, student, "student")
    for name, lengths in _lengths(config, stages):
        _check_length(name, lengths, ranks, teacher)
    for name, training in _trainings(config, stages):
        _check_training(name, training, ranks)
    for name, loss in (("distil", config.distil), ("verify", config.verify)):
        weighted = name not in stages or loss.kd_weight > 0 or loss.ce_weight > 0
        _expect(weighted, name, "kd_weight or ce_weight above 0", "both 0", "Set one of them.")
    if "corpus" in stages:
        _check_tokenizer(config, teacher)
    return list(_warnings(config, ranks, stages))


def _expect(good: bool, setting: str, expected: str, found: Any, remedy: str) -> None:
    if not good:
        raise UserError(f"{setting}: expected {expected}, found {found}. {remedy}")


ABOVE_ZERO = ("learning_rate", "temperature")
ZERO_OR_MORE = ("warmup_steps", "weight_decay", "gradient_clip", "min_learning_rate", "kd_weight", "ce_weight")
ONE_OR_MORE = (
    *("processes", "tensor", "pipeline", "context", "workers", "tokenizer_vocab_size"),
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("vocab_size", "head_dim", "max_position_embeddings", "sequence_length", "micro_batch_size", "global_batch_size"),
    *("steps", "validation_interval", "validation_batches", "checkpoint_interval", "keep_checkpoints", "log_interval"),
    *("calibration_samples", "batches", "micro_batches", "new_tokens"),
)


def _check_numbers(settings: Any, path: str = "") -> None:
    """Signs of single numbers, by the name of the setting, in every group."""
    for name, value in vars(settings).items():
        if is_dataclass(value):
            _check_numbers(value, f"{path}{name}.")
        elif isinstance(value, int | float):
            for names, good, expected in (
                (ABOVE_ZERO, value > 0, "a number above 0"),
                (ZERO_OR_MORE, value >= 0, "0 or more"),
                (ONE_OR_MORE, value >= 1, "1 or more"),
            ):
                _expect(name not in names or good, path + name, expected, value, "Raise it.")


def _check_name(config: Config) -> None:
    good = config.run.name and config.run.name not in (".", "..") and not set(config.run.name) & set("/\\\0")
    _expect(bool(good), "run.name", "a directory name", repr(config.run.name), "Leave slashes out; see run.directory.")
    root = Path(config.run.directory).absolute()
    existing = next(path for path in (root, *root.parents) if path.exists())
    _expect(existing.is_dir(), "run.directory", "a directory", f"the file {existing}", "Choose another path.")


def _check_sources(config: Config) -> None:
    sources = config.data.sources
    _expect(
        bool(sources) or bool(config.data.corpus),
        "data.sources",
        "one or more sources",
        "none",
        "Use data=standard_library, or data=files 'data.sources=[{path: text.jsonl}]'.",
    )
    for number, source in enumerate(sources):
        setting = f"data.sources[{number}]"
        _expect(source.weight > 0, f"{setting}.weight", "a number above 0", source.weight, "Leave the source out.")
        if source.kind is SourceKind.standard_library:
            _expect(source.path is None, f"{setting}.path", "none with kind=standard_library", source.path, "Drop one.")
            continue
        _expect(bool(source.path), f"{setting}.path", "a path", "none", "Give the file or directory.")
        path = Path(str(source.path))
        prefix = path.with_name(path.name + ".idx").is_file() and path.with_name(path.name + ".bin").is_file()
        known = path.exists() or prefix or next(glob.iglob(str(path), recursive=True), None) is not None
        _expect(known, f"{setting}.path", "an existing path", path, "Check its spelling.")
    data = config.data
    parts = {
        "validation": data.validation_fraction,
        "test": data.test_fraction,
        "calibration": data.calibration_fraction,
    }
    for name, fraction in parts.items():
        _expect(0 <= fraction < 1, f"data.{name}_fraction", "a number from 0 to below 1", fraction, "Lower it.")
    total = sum(parts.values())
    _expect(
        total < 1,
        "data",
        "validation, test and calibration fractions to leave some for training",
        f"{total:g} in all",
        "Lower them.",
    )


def _check_paths(config: Config, stages: Collection[str]) -> None:
    """Directories that the configuration names. Without any stage that reads them they may be missing."""
    path = config.model.path
    works = [name for name in stages if name not in ("plan", "verify")]
    if path and works:
        _expect(Path(path).exists(), "model.path", "an existing directory", path, "Check its spelling.")
        nemo = (Path(path) / "weights").is_dir() or (Path(path) / "context").is_dir()
        _expect(
            artifacts.is_hugging_face(path) or nemo,
            "model.path",
            "a Hugging Face directory with a config.json, or a NeMo 2 checkpoint",
            path,
            "Point to the model itself.",
        )
    needs_teacher = bool({"teacher", "prune", "distil", "evaluate"} & set(stages))
    mode, made = config.teacher.mode, artifacts.is_complete(artifacts.stage_directory(config, "teacher"))
    _expect(
        bool(path) or mode is TeacherMode.pretrain or not needs_teacher or made,
        "model.path",
        f"the teacher's directory with teacher.mode={mode.value}",
        "none",
        "Set model.path=..., or teacher=pretrain for a small teacher from scratch.",
    )
    for setting, given, file in (
        ("student.path", config.student.path, "config.json"),
        ("data.corpus", config.data.corpus, "blend.json"),
        ("data.tokenizer", config.data.tokenizer, "tokenizer*"),
    ):
        if given and works:
            _expect(Path(given).exists(), setting, "an existing directory", given, "Check its spelling.")
            _expect(any(Path(given).glob(file)), setting, f"a directory with {file}", given, "Check the path.")


def _check_shape(shape: ModelShape, where: str) -> None:
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    _expect(
        heads % groups == 0,
        f"{where}.num_attention_heads",
        f"a multiple of num_key_value_heads={groups}",
        heads,
        "Change one of them.",
    )
    _expect(
        shape.head_dim % 2 == 0,
        f"{where}.head_dim",
        "an even number, for the rotary embedding",
        shape.head_dim,
        "Set head_dim.",
    )


def _check_target(config: Config, teacher: ModelShape, student: ModelShape) -> None:
    """The student's shape against the teacher's."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    for name in names:
        large, small = getattr(teacher, name), getattr(student, name)
        _expect(
            small <= large, f"student.{name}", f"at most the teacher's {large}", small, "Pruning only makes smaller."
        )
    layers = teacher.num_hidden_layers
    for number in config.student.drop_layers or []:
        _expect(
            1 <= number <= layers, "student.drop_layers", f"layers from 1 to {layers}", number, "Layers count from 1."
        )
    _expect(student.num_hidden_layers >= 1, "student.drop_layers", "at least one layer to stay", "none", "Drop fewer.")
    _expect(
        len(set(config.student.drop_layers or [])) == len(config.student.drop_layers or []),
        "student.drop_layers",
        "each layer once",
        config.student.drop_layers,
        "Remove the repetition.",
    )
    groups = teacher.num_key_value_heads
    _expect(
        student.num_attention_heads % groups == 0,
        "student.num_attention_heads",
        f"a multiple of the {groups} KV groups",
        student.num_attention_heads,
        "Each group loses the same number of heads.",
    )


def _check_layout(ranks: Layout, shape: ModelShape, who: str) -> None:
    sizes = {
        "attention heads": shape.num_attention_heads,
        "KV groups": shape.num_key_value_heads,
        "ffn neurons": shape.intermediate_size,
    }
    for what, size in sizes.items():
        _expect(
            size % ranks.tensor == 0,
            f"parallel.tensor={ranks.tensor}",
            f"a divisor of the {who}'s {size} {what}",
            ranks.tensor,
            "Lower parallel.tensor.",
        )
    _expect(
        shape.num_hidden_layers % ranks.pipeline == 0,
        f"parallel.pipeline={ranks.pipeline}",
        f"a divisor of the {who}'s {shape.num_hidden_layers} layers",
        ranks.pipeline,
        "Lower parallel.pipeline.",
    )
    engine = importlib.util.find_spec("transformer_engine") is not None
    _expect(
        ranks.context == 1 or engine,
        "parallel.context",
        "1 without Transformer Engine",
        ranks.context,
        "Use NVIDIA's container, or parallel.context=1.",
    )


def _lengths(config: Config, stages: Collection[str]) -> Iterator[tuple[str, int]]:
    for name in ("teacher", "prune", "distil", "evaluate", "verify"):
        if name in stages and not (name == "teacher" and config.teacher.mode is TeacherMode.take):
            yield name, getattr(config, name).sequence_length


def _check_length(name: str, length: int, ranks: Layout, teacher: ModelShape) -> None:
    setting, limit = f"{name}.sequence_length", teacher.max_position_embeddings
    if name != "verify":  # has a small model of its own
        _expect(length <= limit, setting, f"at most max_position_embeddings={limit}", length, "Shorten it.")
        window = teacher.sliding_window
        engine = importlib.util.find_spec("transformer_engine") is not None
        _expect(
            not window or window >= length or engine,
            setting,
            f"at most the sliding window {window} without Transformer Engine",
            length,
            "Shorten it.",
        )
    if ranks.sequence_parallel:
        _expect(
            length % ranks.tensor == 0,
            setting,
            f"a multiple of parallel.tensor={ranks.tensor} under sequence parallelism",
            length,
            "Change it, or parallel.sequence_parallel=false.",
        )
    if ranks.context > 1:
        _expect(
            length % (2 * ranks.context) == 0,
            setting,
            f"a multiple of 2 * parallel.context={2 * ranks.context}",
            length,
            "Change it.",
        )


def _trainings(config: Config, stages: Collection[str]) -> Iterator[tuple[str, TrainingConfig]]:
    if "teacher" in stages and config.teacher.mode is not TeacherMode.take:
        yield "teacher", config.teacher
    if "distil" in stages:
        yield "distil", config.distil


def _check_training(name: str, training: TrainingConfig, ranks: Layout) -> None:
    unit = training.micro_batch_size * ranks.data
    _expect(
        training.global_batch_size % unit == 0,
        f"{name}.global_batch_size",
        f"a multiple of {unit}, {name}.micro_batch_size * {ranks.data} data-parallel ranks",
        training.global_batch_size,
        f"Take {max(1, training.global_batch_size // unit) * unit}, or change the micro batch.",
    )
    _expect(
        training.warmup_steps < training.steps,
        f"{name}.warmup_steps",
        f"fewer than {name}.steps={training.steps}",
        training.warmup_steps,
        "Lower it.",
    )
    _expect(
        training.min_learning_rate <= training.learning_rate,
        f"{name}.min_learning_rate",
        f"at most {name}.learning_rate={training.learning_rate:g}",
        training.min_learning_rate,
        "Lower it.",
    )


def _check_tokenizer(config: Config, teacher: ModelShape) -> None:
    """Ids of the tokenizer against rows of the embedding, read from tokenizer.json alone."""
    trained = config.data.tokenizer_vocab_size
    _expect(
        trained is None or trained <= teacher.vocab_size,
        "data.tokenizer_vocab_size",
        f"at most the teacher's {teacher.vocab_size} rows of embedding",
        trained,
        "Lower it, or raise model.shape.vocab_size.",
    )
    if config.data.tokenizer and (size := tokenizer_size(Path(config.data.tokenizer))):
        _expect(
            size <= teacher.vocab_size,
            "data.tokenizer",
            f"at most the teacher's {teacher.vocab_size} rows of embedding",
            f"{size} ids in {config.data.tokenizer}",
            "Take the teacher's own tokenizer.",
        )


def tokenizer_size(directory: Path) -> int | None:
    """One more than the largest id in tokenizer.json; None where there is no such file."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: expected JSON, found an error at line {error.lineno}: {error.msg}. Fetch it again."
        ) from None
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return max(ids) + 1 if ids else None


def _warnings(config: Config, ranks: Layout, stages: Collection[str]) -> Iterator[str]:
    if "plan" in stages:
        for setting, path in (("model.path", config.model.path), ("student.path", config.student.path)):
            if path and not artifacts.is_hugging_face(path):
                yield f"{setting}={path} has no config.json: plan counts the shape of the configuration instead"
    if ranks.sequence_parallel and ranks.tensor == 1:
        yield "parallel.sequence_parallel=true has no effect with parallel.tensor=1"
    if config.distil.distributed_optimizer and ranks.data == 1 and "distil" in stages:
        yield "distil.distributed_optimizer=true has no effect with one data-parallel rank"
    if config.distil.kd_weight == 0 and config.distil.temperature != 1 and "distil" in stages:
        yield "distil.temperature has no effect with distil.kd_weight=0"
    if config.data.tokenizer and config.data.tokenizer_vocab_size:
        yield "data.tokenizer_vocab_size has no effect with data.tokenizer"
    if config.student.path and "prune" in stages:
        yield "student.path is given: the prune stage has nothing to do"
    if (
        "prune" in stages
        and not config.student.path
        and planning.student_shape(config) == planning.teacher_shape(config)
    ):
        yield "student: nothing is smaller than the teacher's; the student starts as a copy"
