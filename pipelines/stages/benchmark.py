"""Ours beside the others, in one run and on the same tensors: the loss with both heads, then the whole training step;
and scoring for pruning beside forward passes alone.

Writes into <run.directory>/benchmark/: results.json, a list of rows, one per contender, tokens, vocabulary and layout
(memory, seconds and error of loss and heads); steps.json and scoring.json, the same for whole steps and for scoring;
and table and plots. Rows of other layouts and sizes stay, so that runs at TP 1 and TP 2 end in one table.
"""

import datetime
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table

from pipelines import artifacts, console, files, lineage, planning
from pipelines.config import BenchmarkConfig, Config, Contender, Layout, Precision, layout
from pipelines.model import head_benchmark, measure, parallel, scoring_benchmark, step_benchmark
from pipelines.model.build import build_model
from pipelines.model.measure import Unavailable
from pipelines.model.random_model import write_random_model
from pipelines.model.weights import load_hugging_face
from pipelines.report import benchmark as table
from pipelines.trainer import nemo_distillation, peers

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
STEPS: dict[Contender, Callable[[step_benchmark.Models], step_benchmark.Step]] = {
    Contender.stillhouse: step_benchmark.stillhouse,
    Contender.nemo: nemo_distillation.nemo,
}
Row = dict[str, Any]


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, settings, ranks = context.config, context.config.benchmark, layout(context.config.parallel)
    parallel.initialize(ranks.tensor, device=ranks.device, seed=config.run.seed)
    device = parallel.torch_device(ranks.device)
    ceiling = measure.matrix_ceiling(DTYPES[settings.precision], device)
    here = {
        "tensor_parallel": ranks.tensor,
        "dtype": settings.precision.value,
        "device": measure.device_name(device),
        "threads": torch.get_num_threads(),
        "matrix_ceiling": ceiling,
        "commit": lineage.git_commit(),
        "date": datetime.date.today().isoformat(),
    }
    console.say(f"benchmark  TP {ranks.tensor}, {here['device']}, {here['threads']} threads per process")
    console.say(
        f"benchmark  ceiling: {ceiling / 1e12:.3g} TFLOP/s per process in large {settings.precision.value} products"
    )
    for case, rows in heads(settings, ranks, device, config.run.seed):
        rows = with_share_of(ceiling, rows, case.flops // ranks.tensor)
        keep(context.directory, [row | here for row in rows], table.HEADS)
        show(f"{case.tokens:,} tokens, {case.vocabulary:,} ids", rows, table.HEADS)
    per_token = step_flops(config)
    for size, rows in steps(config, ranks, device, context.directory / "models"):
        rows = with_share_of(ceiling, rows, per_token * rows[0]["tokens"] // ranks.processes)
        keep(context.directory, [row | here for row in rows], table.STEPS)
        show(f"whole step, micro batch {size} x {settings.sequence_length} tokens", rows, table.STEPS)
    for size, rows in scoring(config, ranks, device, context.directory / "models"):
        keep(context.directory, [row | here for row in rows], table.SCORING)
        show(f"scoring, micro batch {size} x {settings.sequence_length} tokens", rows, table.SCORING)
    if dist.get_rank() == 0:
        for directory in {context.directory, Path(settings.docs or context.directory)}:
            page = table.write(context.directory, directory)
            console.say(f"benchmark  table and plots: {page}")
    dist.barrier()
    return {}


# Heads and loss


def heads(
    settings: BenchmarkConfig, ranks: Layout, device: torch.device, seed: int
) -> Iterable[tuple[head_benchmark.Case, list[Row]]]:
    """Each case with a row for every contender that is asked for."""
    contenders, unavailable = head_contenders(settings.contenders, ranks, device)
    for vocabulary in settings.vocabularies:
        for tokens in settings.tokens:
            case = head_benchmark.Case(
                tokens, vocabulary, settings.student_hidden, settings.teacher_hidden, DTYPES[settings.precision]
            )
            tensors, reference = head_benchmark.make(case, device, seed)
            found = head_benchmark.run(contenders, tensors, reference, rounds=settings.rounds, warmup=settings.warmup)
            sizes = {
                "tokens": tokens,
                "vocabulary": vocabulary,
                "student_hidden": settings.student_hidden,
                "teacher_hidden": settings.teacher_hidden,
            }
            everyone = {contender.value: (found | unavailable)[contender.value] for contender in settings.contenders}
            yield case, [_row(name, what, sizes, head_benchmark.Measurement) for name, what in everyone.items()]


def head_contenders(
    asked: Iterable[Contender], ranks: Layout, device: torch.device
) -> tuple[dict[str, head_benchmark.Contender], dict[str, Unavailable]]:
    """Those that can take part, and why the others cannot."""
    factories: dict[Contender, Callable[[], head_benchmark.Contender]] = {
        Contender.stillhouse: lambda: head_benchmark.stillhouse,
        Contender.nemo: lambda: peers.nemo(ranks.tensor),
        Contender.modelopt: lambda: peers.modelopt(ranks.tensor),
        Contender.torch: lambda: head_benchmark.plain_torch,
        Contender.torch_compile: lambda: head_benchmark.compiled_torch(device),
        Contender.liger: lambda: peers.liger(ranks.tensor, device),
    }
    return _made({contender.value: factories[contender] for contender in asked})


# Whole steps


def steps(config: Config, ranks: Layout, device: torch.device, directory: Path) -> Iterable[tuple[int, list[Row]]]:
    """Each micro batch size with a row for every contender that is asked for and has a whole step.

    On a CPU both contenders are there at once and take turns; on a GPU, which nobody else uses and whose memory they
    need, one comes after the other.
    """
    settings = config.benchmark
    asked = [contender for contender in settings.contenders if contender in STEPS]
    if not settings.micro_batch_sizes or not asked:
        return
    models = _write_models(config, ranks, directory)
    rows: dict[int, list[Row]] = {size: [] for size in settings.micro_batch_sizes}
    for together in [asked] if device.type == "cpu" else [[contender] for contender in asked]:
        made, unavailable = _made({contender.value: partial(STEPS[contender], models) for contender in together})
        for size in settings.micro_batch_sizes:
            for row in _steps_of_size(made, unavailable, size, models, settings, ranks, device):
                rows[size].append(row)
        made.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory)
    yield from rows.items()


def _steps_of_size(
    made: Mapping[str, step_benchmark.Step],
    unavailable: Mapping[str, Unavailable],
    size: int,
    models: step_benchmark.Models,
    settings: BenchmarkConfig,
    ranks: Layout,
    device: torch.device,
) -> Iterable[Row]:
    def batches(rows: int) -> list[step_benchmark.Batch]:
        return step_benchmark.random_batches(
            rows, settings.micro_batches, settings.sequence_length, models.student.vocab_size, seed=1
        )

    tokens = size * settings.sequence_length * settings.micro_batches * ranks.data
    sizes = {
        "tokens": tokens,
        "vocabulary": models.student.vocab_size,
        "micro_batch_size": size,
        "sequence_length": settings.sequence_length,
        "student_parameters": models.student.parameters(),
        "teacher_parameters": models.teacher.parameters(),
    }
    found = step_benchmark.run(made, batches(size), device, rounds=settings.rounds, warmup=settings.warmup)
    for name, what in (found | unavailable).items():
        row = _row(name, what, sizes, step_benchmark.StepMeasurement)
        row["tokens_per_second"] = tokens / row["seconds"] if row["seconds"] else None
        row["largest_micro_batch"] = None
        if device.type == "cuda" and name in made:
            row["largest_micro_batch"] = step_benchmark.largest_micro_batch(made[name], batches, device)
        yield row


def _write_models(config: Config, ranks: Layout, directory: Path) -> step_benchmark.Models:
    """Seeded random weights of model= and student= as Hugging Face directories, which every contender reads."""
    settings = config.benchmark
    teacher = planning.teacher_shape(config)
    student = planning.target_shape(teacher, config.student)
    dtype = "bfloat16" if settings.precision is Precision.bf16 else "float32"
    places = {"teacher": (teacher, directory / "teacher"), "student": (student, directory / "student")}
    if dist.get_rank() == 0:
        for number, (shape, place) in enumerate(places.values()):
            write_random_model(place, shape, config.run.seed + number, dtype)
    dist.barrier()
    return step_benchmark.Models(
        student,
        teacher,
        places["student"][1],
        places["teacher"][1],
        settings.sequence_length,
        settings.precision.value,
        ranks.sequence_parallel,
        config.distil.distributed_optimizer,
    )


# Scoring


def scoring(config: Config, ranks: Layout, device: torch.device, directory: Path) -> Iterable[tuple[int, list[Row]]]:
    """Each micro batch size with rows for scoring model= and for its forward passes without and with the head."""
    settings, shape = config.benchmark, planning.teacher_shape(config)
    if not settings.scoring_micro_batch_sizes:
        return
    dtype = "bfloat16" if settings.precision is Precision.bf16 else "float32"
    parallel.on_first_rank(lambda: write_random_model(directory, shape, config.run.seed, dtype))
    length, precision = settings.sequence_length, settings.precision.value
    model = build_model(shape, sequence_parallel=ranks.sequence_parallel, precision=precision, sequence_length=length)
    load_hugging_face(model, directory, shape)
    dist.barrier()  # no rank reads any more
    parallel.on_first_rank(lambda: shutil.rmtree(directory))
    for size in settings.scoring_micro_batch_sizes:
        batches = step_benchmark.random_batches(size, settings.scoring_batches, length, shape.vocab_size, seed=1)
        tokens = size * settings.scoring_batches * length * ranks.data
        sizes = {
            "tokens": tokens,
            "parameters": shape.parameters(),
            "sequence_length": length,
            "micro_batch_size": size,
        }
        found = scoring_benchmark.run(model, batches, device, rounds=settings.rounds, warmup=settings.warmup)
        rows = [_row(name, what, sizes, scoring_benchmark.ScoringMeasurement) for name, what in found.items()]
        yield size, [row | {"tokens_per_second": tokens / row["seconds"]} for row in rows]


# Rows


def _made(factories: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, Unavailable]]:
    made, unavailable = {}, {}
    for name, factory in factories.items():
        try:
            made[name] = factory()
        except Unavailable as reason:
            unavailable[name] = reason
    return made, unavailable


def _row(name: str, what: Any, sizes: Row, kind: type) -> Row:
    """The figures of a measurement; of one that could not be made the same keys, empty, and the reason."""
    if isinstance(what, Unavailable):
        return {"name": name, **sizes, **dict.fromkeys(kind.__dataclass_fields__), "reason": str(what)}
    return {"name": name, **sizes, **asdict(what)}


def with_share_of(ceiling: float, rows: list[Row], flops: int) -> list[Row]:
    """flops: of the work itself, on one rank; what a contender computes more than once does not count."""
    return [row | {"share_of_ceiling": flops / (row["seconds"] * ceiling) if row["seconds"] else None} for row in rows]


def step_flops(config: Config) -> int:
    """Per token of the whole steps, causal attention included."""
    teacher = planning.teacher_shape(config)
    student = planning.target_shape(teacher, config.student)
    return planning.distillation_flops(teacher, student, config.benchmark.sequence_length).total


def keep(directory: Path, rows: list[Row], kind: table.Kind) -> None:
    """Add rows to those in the directory, in the place of earlier ones of the same. On rank 0."""
    if dist.get_rank() == 0:
        files.write_json(directory / kind.file, table.merged(table.read(directory, kind), rows, kind))


def show(title: str, rows: list[Row], kind: table.Kind) -> None:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(kind.headings):
        shown.add_column(heading, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*table.cells(row, rows, kind))
    console.terminal().print(shown)
    for reason in table.reasons(rows):
        console.say(f"not run: {reason}")
