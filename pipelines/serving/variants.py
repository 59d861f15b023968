"""Quantized variants of a model beside it: size, and quality on the same held-out windows as the stage evaluate's.

quantized.json: {"split", "sequence_length", "document_mask", "tokens", "bytes", "documents", "before": {"student" |
"teacher": figures}, "variants": [figures and {"name", "of", "method", "bits", "group", "library", "directory",
"relative_difference", "kl_to_student", "differences", "obstacles" (tools.py)} or {"name", "of", "method", "refused":
reason}]}; figures: "bytes" (of the weights' files), "parameters", "loss" (nats/token), "bits_per_byte", "kl"
(KL(teacher || model), nats/token), "agreement" (share), the last two null without a teacher, and "intervals"; these and
"differences", from the model before, as results.json has them.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines import artifacts, console
from pipelines.choices import Quantization
from pipelines.config import Config, UserError, document_mask, layout, without_context
from pipelines.evaluation.comparison import compared, entries
from pipelines.evaluation.sharded import precision
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel, quality
from pipelines.model.build import build_model
from pipelines.model.safetensors_stream import Tensors
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
from pipelines.safetensors_header import weight_bytes
from pipelines.serving import quantize, reloaded, tools
from pipelines.text.token_classes import read_token_classes

TEACHER, STUDENT = quality.TEACHER, "student"


def measure(config: Config, student: Path, place: Path) -> dict[str, Any]:
    """Quantize as `export` says into directories of `place`, open each in transformers, and score it.

    student: the exported directory. Returns the content of quantized.json. A variant that cannot be made is one with
    the reason, and the others go on. Collective over all ranks.
    """
    reloaded.initialize(config)
    directories = {STUDENT: student}
    if artifacts.is_hugging_face(teacher := artifacts.teacher_directory(config)):
        directories[TEACHER] = teacher
    scores = _Scores(config, directories)
    wanted = [STUDENT, TEACHER] if config.export.quantize_teacher else [STUDENT]
    rows = []
    for of, method in ((of, method) for of in wanted for method in config.export.quantize):
        name = method.value if of == STUDENT else f"{of}-{method.value}"
        row: dict[str, Any] = {"name": name, "of": of, "method": method.value}
        rows.append(row)
        try:
            if of not in directories:
                raise UserError(f"{name}: expected a teacher in {teacher}, found none. Give it back, or leave it out.")
            row |= _variant(config, directories[of], place / name, method, of, scores)
        except UserError as error:
            row |= {"refused": str(error)}
            parallel.on_first_rank(partial(shutil.rmtree, place / name, ignore_errors=True))
            console.say(f"export  no {name}: {error}")
        else:
            _say(row, scores.before[of])
    return {
        "split": config.evaluate.split,
        "sequence_length": config.evaluate.sequence_length,
        "document_mask": document_mask(config, "evaluate"),
        "tokens": scores.tokens,
        "bytes": round(scores.text_bytes),
        "documents": scores.documents,
        "before": scores.before,
        "variants": rows,
    }


def _variant(
    config: Config, source: Path, target: Path, method: Quantization, of: str, scores: "_Scores"
) -> dict[str, Any]:
    """One directory, written, opened, compared and scored."""
    shape, how = read_shape(source), quantize.scheme(method, read_shape(source))
    quantize.library()
    shard_bytes = config.export.shard_bytes or 5e9
    console.say(f"export  quantizing {source} to {method.value}")

    def write() -> None:
        quantize.write_quantized(source, target, method, shape, max_shard_bytes=shard_bytes)

    parallel.on_first_rank(write)
    tensors = quantize.Dequantized(target, shape, how)
    tokens, reference = reloaded.reference_logits(config, tensors, shape)
    opened = parallel.on_first_rank(
        lambda: reloaded.compare(target, reloaded.reload(target), tokens, reference, tolerance=config.export.tolerance)
    )
    return (
        {"library": f"{quantize.LIBRARY} {metadata.version(quantize.LIBRARY)}", "directory": str(target)}
        | {"bits": how.bits, "group": how.group, "relative_difference": opened["relative_difference"]}
        | {"bytes": weight_bytes(target), "parameters": shape.parameters()}
        | {"obstacles": parallel.on_first_rank(lambda: tools.obstacles(target))}
        | scores.of(tensors, shape, of, target.name)
    )


class _Scores:
    """The models that are not quantized, as shards, and others scored beside them on the windows that the stage
    evaluate scores."""

    def __init__(self, config: Config, directories: Mapping[str, Path]) -> None:
        settings, corpus = config.evaluate, artifacts.corpus_directory(config)
        self._config, self._ranks = config, without_context(layout(config.parallel))
        end = end_of_document(corpus, settings.split) if document_mask(config, "evaluate") else None
        self._windows = Windows(split_prefixes(corpus, settings.split), settings.sequence_length, end)
        chosen = chosen_windows(self._windows, settings.micro_batch_size, self._ranks.data, settings.batches)
        shapes = {name: read_shape(directory) for name, directory in directories.items()}
        self._vocabulary = shapes[STUDENT].vocab_size
        self._by = Breakdown(
            self._windows.documents_of(chosen),
            read_token_classes(corpus / "tokenizer"),
            mean_token_bytes(corpus, settings.split, self._vocabulary),
            settings.sequence_length,
        )
        self._models = {name: self._load(directory, shapes[name]) for name, directory in directories.items()}
        self._found = self._measure(self._models)
        self.tokens, self.text_bytes = self._found[STUDENT].tokens, self._found[STUDENT].text_bytes or 0.0
        intervals, _, self.documents = compared(self._found)
        told = entries(self._found, intervals)
        self.before = {
            name: {"bytes": weight_bytes(directory), "parameters": shapes[name].parameters()} | told[name]
            for name, directory in directories.items()
        }

    def of(self, tensors: Tensors, shape: ModelShape, of: str, name: str) -> dict[str, Any]:
        """Figures of a variant of the model `of`, called `name`. kl_to_student is from the student before, and None for
        a variant of the teacher."""
        model = self._load(tensors, shape)
        teacher = {TEACHER: self._models[TEACHER]} if TEACHER in self._models else {}
        found = self._measure(teacher | {name: model})[name]
        intervals, differences, _ = compared(self._found | {name: found}, [(name, of)])
        to_student = None
        if of == STUDENT:
            to_student = self._measure({TEACHER: self._models[STUDENT], name: model})[name].kl
        told = entries({name: found}, intervals)[name]
        return told | {"kl_to_student": to_student, "differences": differences}

    def _measure(self, models: Mapping[str, GPTModel]) -> dict[str, quality.Quality]:
        settings, ranks = self._config.evaluate, parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        mine = batches(self._windows, settings.micro_batch_size, rank, ranks, settings.batches, documents=True)
        return quality.evaluate(models, mine, vocab_size=self._vocabulary, by=self._by)

    def _load(self, source: Path | Tensors, shape: ModelShape) -> GPTModel:
        config = self._config
        model = build_model(
            shape,
            sequence_parallel=self._ranks.sequence_parallel,
            precision=precision(config),
            sequence_length=config.evaluate.sequence_length,
        )
        load_hugging_face(model, source, shape)
        return model


def _say(row: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    kl = "" if row["kl"] is None else f"  KL to the teacher {row['kl']:.4f} after {before['kl']:.4f}"
    console.say(
        f"export  {row['directory']}: {row['bytes']:,} bytes, {row['bytes'] / before['bytes']:.0%} of before; "
        f"loss {row['loss']:.4f} nats/token after {before['loss']:.4f}{kl}"
    )
