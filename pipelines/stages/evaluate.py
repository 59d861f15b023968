"""Teacher, pruned and distilled student side by side on held-out text, as shards in the same process groups.

Writes results.json: {"split", "tokens", "bytes", "documents", ..., "models": {"teacher" | "pruned" | "student":
{"path", "parameters", "loss" (nats/token), "perplexity", "bits_per_byte", "kl" (KL(teacher || model), nats/token),
"agreement" (share), "overlap" (share), "calibration_error", "kl_by_entropy" (nats/token by bands of the teacher's
entropy, see core/telemetry.py), "by_token_class": {class: {"share", "loss", "kl", "agreement"}} (classes of
text/token_classes.py, those that the split has), "by_position": [{"from", "to", "loss", "kl"}] (places in the sequence
from 0, `to` left out), "reliability": [{"confidence", "accuracy", "share"}] (15 bins of the same width; null in one
without tokens), "intervals": {figure: [low, high]} (95 %, documents drawn anew), "tokens_per_second"}},
"differences": [{"figure", "model", "other", "difference", "low", "high", "larger_than_noise"}], "tasks", with
evaluate.tasks: {"harness", "models": {model: {task: {"metric", "value", "stderr", "shots", "samples", "all": {metric:
value}}}}, "published": {model: {task: value}} where they are given, "differences": [{"task", "model", "other",
"difference", "low", "high", "larger_than_noise"}]}, "efficiency", with evaluate.efficiency: {"device", "threads",
"dtype", "form", "rounds", "rows": [{"model", "batch", "prompt_tokens", "new_tokens", "time_to_first_token_ms",
"prefill_tokens_per_second", "decode_tokens_per_second", "latency_ms": {"p50", "p90", "p99"} (between tokens), "ratio":
{the same, to the teacher's}}], "models": {model: {"bytes_on_disk" (of the weights), "peak_bytes" (weights and what the
largest request holds), "parameters"}}}, "missing": {model or part: reason}}. Each part lies in parts/ as soon as it is
measured (evaluation/parts.py). The models of "quality" are resident together: as inference weights they take less than
distilling the student took.
"""

import time
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines import artifacts, console, files
from pipelines.config import Config, Layout, UserError, document_mask, layout, without_context
from pipelines.evaluation import efficiency, tasks
from pipelines.evaluation.comparison import compared, figures
from pipelines.evaluation.parts import Parts
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel, quality
from pipelines.model.build import build_model
from pipelines.model.tally import Breakdown
from pipelines.model.weights import load_hugging_face
from pipelines.model.windows import (
    Windows,
    batches,
    chosen_windows,
    end_of_document,
    mean_token_bytes,
    split_prefixes,
)
from pipelines.text.token_classes import read_token_classes
from pipelines.vocabulary import check_vocabulary

SPEED_SECONDS = 1.5  # of timed forward passes per model


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config = context.config
    ranks = without_context(layout(config.parallel))
    directories, missing = find_models(config)
    shapes = {name: read_shape(directory) for name, directory in directories.items()}
    corpus = artifacts.corpus_directory(config)
    _check(corpus, directories, shapes)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    for name, reason in missing.items():
        console.say(f"evaluate  no {name}: {reason}")
    parts = Parts(context)
    settings = {key: value for key, value in context.settings().items() if key.count(".") == 1}  # those of no part
    results = parts.measure("quality", settings, lambda: _quality(config, ranks, directories, shapes), needed=True)
    assert results is not None
    if config.evaluate.efficiency.batch_sizes:
        found = parts.measure(
            "efficiency",
            _settings_of(context, "efficiency") | {"precision": _precision(config), "device": ranks.device},
            lambda: parallel.on_first_rank(
                lambda: efficiency.of_models(config, directories, _precision(config), ranks.device)
            ),
        )
        results |= {"efficiency": found} if found else {}
    models = tasks.Models(directories, corpus, _tasks_precision(config), ranks.device)
    if config.evaluate.tasks.names:
        found = parts.measure(
            "tasks",
            _settings_of(context, "tasks") | tasks.settings_of(config) | {"precision": models.precision},
            lambda: tasks.measure(config, models, parts.pieces("tasks"), context.directory),
        )
        results |= {"tasks": found} if found else {}
    results |= {"missing": missing | parts.missing}
    if torch.distributed.get_rank() == 0:
        files.write_json(context.directory / "results.json", results)
    for name, model in results["models"].items():
        console.say(
            f"evaluate  {name:<8}{model['parameters']:>15,} parameters  loss {model['loss']:.4f} nats/token  "
            f"{model['bits_per_byte']:.4f} bits/byte  KL {model['kl']:.4f}  agreement {model['agreement']:.1%}"
        )
    return {name: {key: model[key] for key in ("loss", "kl")} for name, model in results["models"].items()}


def _quality(
    config: Config, ranks: Layout, directories: dict[str, Path], shapes: dict[str, ModelShape]
) -> dict[str, Any]:
    """The models side by side on the split: what results.json has but for "missing" and the other parts."""
    settings, corpus = config.evaluate, artifacts.corpus_directory(config)
    end = end_of_document(corpus, settings.split) if document_mask(config, "evaluate") else None
    windows = Windows(split_prefixes(corpus, settings.split), settings.sequence_length, end)
    models = {name: _load(config, ranks, shapes[name], directory) for name, directory in directories.items()}
    vocab_size = shapes["teacher"].vocab_size
    classes = read_token_classes(corpus / "tokenizer")
    chosen = chosen_windows(windows, settings.micro_batch_size, ranks.data, settings.batches)
    by = Breakdown(
        windows.documents_of(chosen),
        classes,
        mean_token_bytes(corpus, settings.split, vocab_size),
        settings.sequence_length,
    )
    found = _measure(config, models, windows, vocab_size, by)
    intervals, differences, documents = compared(found)
    speeds = _speeds(config, models, windows)
    return {
        "split": settings.split,
        "tokens": found["teacher"].tokens,
        "bytes": round(found["teacher"].text_bytes or 0),
        "documents": documents,
        "windows": len(chosen),
        "sequence_length": settings.sequence_length,
        "precision": _precision(config),
        "document_mask": end is not None,
        "models": {
            name: {"path": str(directories[name]), "parameters": shapes[name].parameters()}
            | {"non_embedding_parameters": shapes[name].non_embedding_parameters()}
            | figures(quality_)
            | {"intervals": intervals[name], "tokens_per_second": round(speeds[name], 1)}
            for name, quality_ in found.items()
        },
        "differences": differences,
    }


def find_models(config: Config) -> tuple[dict[str, Path], dict[str, str]]:
    """(directories of the models that are there, reasons for those that are not), by name. There must be a teacher."""
    places = {
        "teacher": (artifacts.teacher_directory(config), "teacher"),
        "pruned": (artifacts.student_start_directory(config), "prune"),
        "student": (artifacts.student_directory(config), "distil"),
    }
    directories, missing = {}, {}
    for name, (directory, stage) in places.items():
        if artifacts.is_hugging_face(directory):
            directories[name] = directory
        else:
            missing[name] = f"no model in {directory}; stage={stage} has not finished."
    if "teacher" in missing:
        raise UserError(f"evaluate: expected a teacher, found {missing['teacher']} Run stage=teacher first.")
    return directories, missing


def _check(corpus: Path, directories: dict[str, Path], shapes: dict[str, ModelShape]) -> None:
    """Raises UserError for what cannot be evaluated, before anything is built."""
    sizes = {name: shape.vocab_size for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"evaluate: expected models of one vocabulary, found sizes {sizes}. Prune from this teacher.")
    for name, directory in directories.items():
        check_vocabulary(corpus, directory, sizes[name])


def _precision(config: Config) -> str:
    return str((config.evaluate.precision or config.distil.precision).value)


def _settings_of(context: artifacts.StageContext, part: str) -> dict[str, Any]:
    return {name: value for name, value in context.settings().items() if name.startswith(f"evaluate.{part}.")}


def _tasks_precision(config: Config) -> str:
    return str(config.evaluate.tasks.precision.value) if config.evaluate.tasks.precision else _precision(config)


def _load(config: Config, ranks: Layout, shape: ModelShape, directory: Path) -> GPTModel:
    model = build_model(
        shape,
        sequence_parallel=ranks.sequence_parallel,
        precision=_precision(config),
        sequence_length=config.evaluate.sequence_length,
    )
    load_hugging_face(model, directory, shape)
    return model


def _measure(
    config: Config, models: dict[str, GPTModel], windows: Windows, vocab_size: int, by: Breakdown
) -> dict[str, quality.Quality]:
    settings, ranks = config.evaluate, parallel_state.get_data_parallel_world_size()
    chosen = chosen_windows(windows, settings.micro_batch_size, ranks, settings.batches)
    rank = parallel_state.get_data_parallel_rank()
    mine = batches(windows, settings.micro_batch_size, rank, ranks, settings.batches, documents=True)
    started, done = time.monotonic(), 0
    with console.progress("evaluate", -(-len(chosen) // (settings.micro_batch_size * ranks)), "batches") as bar:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens * ranks
            bar.advance(1, detail=f"{done / (time.monotonic() - started):,.0f} tokens/s")

        return quality.evaluate(models, mine, vocab_size=vocab_size, by=by, advance=advance)


def _speeds(config: Config, models: dict[str, GPTModel], windows: Windows) -> dict[str, float]:
    """tokens/s of each model's forward pass on the same micro batch per data-parallel rank."""
    batch = next(batches(windows, config.evaluate.micro_batch_size))
    return quality.tokens_per_second(models, batch, seconds=SPEED_SECONDS)
