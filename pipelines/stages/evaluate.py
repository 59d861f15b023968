"""Teacher, pruned and distilled student side by side on held-out text, as shards in the same process groups.

Writes results.json: {"split", "corpus" (hash of its text), "tokens", "bytes", "documents", ..., "models": {"teacher" |
"pruned" | "student": {"path", "parameters", "loss" (nats/token), "perplexity", "bits_per_byte", "kl" (KL(teacher ||
model), nats/token), "agreement" (share), "overlap" (share), "calibration_error", "kl_by_entropy" (nats/token by bands
of the teacher's entropy, see core/telemetry.py), "by_token_class": {class: {"share", "loss", "kl", "agreement"}}
(classes of text/token_classes.py, those that the split has), "by_position": [{"from", "to", "loss", "kl"}] (places in
the sequence from 0, `to` left out), "reliability": [{"confidence", "accuracy", "share"}] (15 bins of the same width;
null in one without tokens), "intervals": {figure: [low, high]} (95 %, documents drawn anew), "tokens_per_second"}},
"differences": [{"figure", "model", "other", "difference", "low", "high", "larger_than_noise"}], "tasks", with
evaluate.tasks: {"harness", "models": {model: {task: {"metric", "value", "stderr", "shots", "samples", "all": {metric:
value}}}}, "published": {model: {task: value}} where they are given, "differences": [{"task", "model", "other",
"difference", "low", "high", "larger_than_noise"}]}, "efficiency", with evaluate.efficiency: {"device", "threads",
"dtype", "form", "rounds", "rows": [{"engine", "model", "batch", "prompt_tokens", "new_tokens",
"time_to_first_token_ms", "prefill_tokens_per_second", "decode_tokens_per_second", "latency_ms": {"p50", "p90", "p99"}
(between tokens; of transformers alone), "ratio": {the same, to the teacher's}}], "models": {model: {"bytes_on_disk" (of
the weights), "peak_bytes" (weights and what the largest request holds), "parameters"}}}, "domains", with
evaluate.domains: {name: {"path", "kind": "own" | "other",
"tokens", "bytes", "documents", "models": {model: {"loss", "bits_per_byte", "kl", "agreement", "intervals"}},
"differences"}}, "long_context", with evaluate.long_context: {length: {"sequence_length", "tokens", "documents",
"models": {model: {"loss", "kl", "agreement", "by_position", "intervals"}}, "differences"}}, "generation", with
evaluate.generation.count: {"settings", "models": {model: {"samples": [{"prompt", "text"}], "diversity": {"distinct_1",
"distinct_2", "distinct_3", "repetition", "template_rate", "mean_new_tokens", "ended"}}}}, "behaviour", with
evaluate.behaviour.prompts: {"file", "models": {model: {category: {"prompts", "refusal_rate", "toxic_rate",
"refusal_interval", "toxic_interval"}}}, "examples": [{"model", "category", "prompt", "text", "refused", "toxic"}],
"differences": [{"category", "figure", ... as above}]}, "drift", with evaluate.baseline: [{"figure", "before", "now",
"difference", "low", "high", "larger_than_noise"}], "document_groups" (evaluation/comparison.py; of a domain too),
"missing": {model or part: reason}}. Each part lies in parts/ as soon as it is measured (evaluation/parts.py). The
models of "quality" are resident together: as inference weights they take less than distilling the student took.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines import artifacts, console, files
from pipelines.config import Config, Layout, UserError, document_mask, layout, without_context
from pipelines.evaluation import behaviour, domains, drift, efficiency, generation, long_context, sharing, tasks
from pipelines.evaluation.comparison import compared, document_groups, figures
from pipelines.evaluation.fitting import Fitting, fitting
from pipelines.evaluation.parts import Parts
from pipelines.evaluation.sharded import Sharded, precision
from pipelines.evaluation_settings import few_in_words
from pipelines.model import parallel, quality
from pipelines.model.windows import (
    Windows,
    batches,
    chosen_windows,
    end_of_document,
    mean_token_bytes,
    split_prefixes,
)

OF_OTHER_PARTS = ("evaluate.domains", "evaluate.long_context", "evaluate.baseline")
FORM = 2  # of what the parts hold: raised where they tell more, so that an older version's are not taken
SPEED_SECONDS = 1.5  # of timed forward passes per model


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config = context.config
    ranks = without_context(layout(config.parallel))
    corpus = artifacts.corpus_directory(config)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    directories, models, missing = _models(config, ranks, corpus)
    for name, reason in missing.items():
        console.say(f"evaluate  no {name}: {reason}")
    parts = Parts(context)
    settings = {key: value for key, value in context.settings().items() if key.count(".") == 1}  # those of no part
    for name in OF_OTHER_PARTS:
        settings.pop(name, None)
    settings["form"] = FORM
    sharded = Sharded(config, ranks, directories, models.shapes, corpus)
    results = parts.measure("quality", settings, lambda: _quality(config, ranks, sharded), needed=True)
    assert results is not None
    results |= _other_texts(context, parts, sharded, settings)
    sharded.release()
    if config.evaluate.efficiency.batch_sizes:
        found = parts.measure(
            "efficiency",
            _settings_of(context, "efficiency") | {"precision": precision(config), "device": ranks.device},
            lambda: parallel.on_first_rank(
                lambda: efficiency.of_models(config, models.whole, precision(config), ranks.device)
            ),
        )
        results |= {"efficiency": found} if found else {}
    results |= _on_whole_models(context, ranks, models.whole, parts)
    if config.evaluate.baseline:
        results |= _drift(config.evaluate.baseline, parts, results)
    results |= {"missing": missing | parts.missing}
    if torch.distributed.get_rank() == 0:
        files.write_json(context.directory / "results.json", results)
    if few := few_in_words(results["documents"]):
        console.say(f"evaluate  {few}")
    for name, model in results["models"].items():
        console.say(
            f"evaluate  {name:<8}{model['parameters']:>15,} parameters  loss {model['loss']:.4f} nats/token  "
            f"{model['bits_per_byte']:.4f} bits/byte  KL {model['kl']:.4f}  agreement {model['agreement']:.1%}"
        )
    return {name: {key: model[key] for key in ("loss", "kl")} for name, model in results["models"].items()}


def _quality(config: Config, ranks: Layout, sharded: Sharded) -> dict[str, Any]:
    """The models side by side on the split: what results.json has but for "missing" and the other parts."""
    settings, corpus, shapes = config.evaluate, sharded.corpus, sharded.shapes
    end = end_of_document(corpus, settings.split) if document_mask(config, "evaluate") else None
    windows = Windows(split_prefixes(corpus, settings.split), settings.sequence_length, end)
    table = mean_token_bytes(corpus, settings.split, sharded.vocab_size)
    found = sharded.measure(windows, table, "evaluate", settings.micro_batch_size, settings.batches)
    intervals, differences, documents = compared(found)
    batch = next(batches(windows, settings.micro_batch_size))  # the same one for all ranks
    speeds = quality.tokens_per_second(sharded.models(), batch, seconds=SPEED_SECONDS)
    return {
        "split": settings.split,
        "corpus": parallel.on_first_rank(lambda: _text_hash(config)),
        "tokens": found["teacher"].tokens,
        "bytes": round(found["teacher"].text_bytes or 0),
        "documents": documents,
        "windows": len(chosen_windows(windows, settings.micro_batch_size, ranks.data, settings.batches)),
        "sequence_length": settings.sequence_length,
        "precision": precision(config),
        "document_mask": end is not None,
        "models": {
            name: {"path": str(sharded.directories[name]), "parameters": shapes[name].parameters()}
            | {"non_embedding_parameters": shapes[name].non_embedding_parameters()}
            | figures(quality_)
            | {"intervals": intervals[name], "tokens_per_second": round(speeds[name], 1)}
            for name, quality_ in found.items()
        },
        "differences": differences,
        "document_groups": document_groups(found),
    }


def _other_texts(
    context: artifacts.StageContext, parts: Parts, sharded: Sharded, settings: dict[str, Any]
) -> dict[str, Any]:
    """ "domains" and "long_context", each entry a part of its own."""
    config, found = context.config, {}
    for domain in config.evaluate.domains:
        found[f"domains.{domain.name}"] = parts.measure(
            f"domains.{domain.name}",
            domains.settings_of(config, domain) | {"form": FORM},
            lambda domain=domain: domains.measure(config, domain, sharded, context.directory),
        )
    for length in config.evaluate.long_context:
        found[f"long_context.{length}"] = parts.measure(
            f"long_context.{length}", settings, lambda length=length: long_context.measure(config, length, sharded)
        )
    groups: dict[str, Any] = {}
    for name, entry in found.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {}).update({key: entry} if entry else {})
    return groups


def _drift(baseline: str, parts: Parts, results: dict[str, Any]) -> dict[str, Any]:
    """{"drift": ...}, or a gap with its reason."""
    try:
        found = drift.drift(results, files.read_object(Path(baseline)), baseline)
    except UserError as error:
        parts.missing["drift"] = str(error)
        console.say(f"evaluate  no drift: {error}")
        return {}
    for row in found:
        noise = "larger than noise" if row["larger_than_noise"] else "within noise"
        console.say(f"evaluate  drift of {row['figure']}: {row['before']:.4f} to {row['now']:.4f}, {noise}")
    return {"drift": found}


def _text_hash(config: Config) -> str:
    """Of the split's token ids and the tokenizer: the same for the same text on every machine."""
    corpus, sidecars = artifacts.corpus_directory(config), artifacts.sidecar_directory(config)
    digest = hashlib.sha256(artifacts.file_hash(corpus / "tokenizer" / "tokenizer.json", sidecars).encode())
    for prefix in split_prefixes(corpus, config.evaluate.split):
        for _, content in sorted(artifacts.fingerprint(prefix, sidecars).items()):
            digest.update(content.encode())
    return digest.hexdigest()


def find_models(config: Config) -> tuple[dict[str, Path], dict[str, str]]:
    """(directories of the models that are there, reasons for those that are not), by name. There must be a teacher."""
    places = {
        "teacher": (artifacts.teacher_directory(config), "teacher"),
        "pruned": (artifacts.student_start_directory(config), "prune"),
        "student": (Path(config.evaluate.student or artifacts.student_directory(config)), "distil"),
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


def _models(config: Config, ranks: Layout, corpus: Path) -> tuple[dict[str, Path], Fitting, dict[str, str]]:
    """(directories, the models that fit, reasons for those missing), by name. Rank 0 looks, and every rank builds the
    models that it found: ranks that see a disk in two states would wait for each other for ever."""

    def look() -> dict[str, Any]:
        directories, missing = find_models(config)
        models = fitting(corpus, directories, ranks)
        return {
            "directories": {name: str(path) for name, path in directories.items()},
            "models": models.as_json(),
            "missing": missing | models.reasons,
        }

    found = parallel.on_first_rank(look)
    directories = {name: Path(path) for name, path in found["directories"].items()}
    return directories, Fitting.from_json(found["models"]), found["missing"]


def _on_whole_models(
    context: artifacts.StageContext, ranks: Layout, directories: dict[str, Path], parts: Parts
) -> dict[str, Any]:
    """The parts for which each rank has a whole model: those that are asked for, and can be measured."""
    config, settings = context.config, context.config.evaluate
    models = sharing.Models(
        directories,
        artifacts.corpus_directory(config),
        str(settings.tasks.precision.value) if settings.tasks.precision else precision(config),
        ranks.device,
        settings.tasks.parallelize,
    )
    asked: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {}
    if settings.tasks.names:
        asked["tasks"] = (
            tasks.settings_of(config),
            lambda: tasks.measure(config, models, parts.pieces("tasks"), context.directory),
        )
    if settings.generation.count:
        asked["generation"] = (
            generation.settings_of(config),
            lambda: generation.measure(config, models, parts.pieces("generation")),
        )
    if settings.behaviour.prompts:
        asked["behaviour"] = (
            behaviour.settings_of(config),
            lambda: behaviour.measure(config, models, parts.pieces("behaviour")),
        )
    found = {
        name: parts.measure(name, _settings_of(context, name) | more | {"precision": models.precision}, work)
        for name, (more, work) in asked.items()
    }
    return {name: result for name, result in found.items() if result}


def _settings_of(context: artifacts.StageContext, part: str) -> dict[str, Any]:
    return {name: value for name, value in context.settings().items() if name.startswith(f"evaluate.{part}.")}
