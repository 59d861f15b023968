"""Pruning in width and depth: score the teacher on calibration data, select, slice its safetensors.

Writes hf/ (the student), kept.json, and scores.safetensors (pruning/scores_file.py). Where nothing has to be ranked
nothing is scored and there are no arrays.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import artifacts, console, files
from pipelines.config import layout, searches, without_context
from pipelines.core.selection import Kept
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.slicing import slice_checkpoint, sliced_shape
from pipelines.pruning.choice import checked_target, choose
from pipelines.pruning.depth import LayerChoice
from pipelines.pruning.loaded_teacher import LoadedTeacher
from pipelines.pruning.scores import obtain
from pipelines.pruning.search import Search
from pipelines.text.tokenizer_files import has_tokenizer

QUICKLY_WRITTEN = 100_000_000  # parameters: below, writing takes a second or two and shows no bar


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, ranks = context.config, without_context(layout(context.config.parallel))
    directory = artifacts.teacher_directory(config)
    teacher = read_shape(directory)
    target = checked_target(config, teacher)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    loaded = LoadedTeacher(config, ranks, directory, teacher)
    found, layers = obtain(context, loaded), LayerChoice(context, loaded)

    def keep(shape: ModelShape) -> Kept:
        dropped = layers.dropped(shape.num_hidden_layers)
        return choose(found.scores, teacher, shape, drop_layers=dropped, protect=config.prune.protect)

    search = Search(context, loaded, keep) if searches(config) else None
    kept = keep(search.run() if search else target)
    loaded.release()
    student = sliced_shape(teacher, kept)
    sliced = search is not None and search.has_sliced(student)
    parallel.on_first_rank(lambda: _write(context, directory, teacher, kept, sliced))
    before = teacher.parameters()
    console.say(
        f"prune  {before:,} -> {student.parameters():,} parameters ({student.parameters() / before:.1%}); hidden "
        f"{student.hidden_size}, ffn {student.intermediate_size}, heads {student.num_attention_heads} in "
        f"{student.num_key_value_heads} KV groups, layers {student.num_hidden_layers}"
    )
    return {
        "model": str(context.directory / "hf"),
        "parameters_before": before,
        "parameters_after": student.parameters(),
        "non_embedding_parameters_before": teacher.non_embedding_parameters(),
        "non_embedding_parameters_after": student.non_embedding_parameters(),
        "ratio": student.parameters() / before,
        "dropped_layers": sorted(set(range(1, teacher.num_hidden_layers + 1)) - set(kept.layers)),
        **found.figures(),
        **layers.figures(student.num_hidden_layers),
        **({"search": search.figures()} if search else {}),
    }


# The artifact


def _write(context: artifacts.StageContext, directory: Path, teacher: ModelShape, kept: Kept, sliced: bool) -> None:
    """kept.json, and hf/ unless the search has sliced it. With prune.random_weights hf/ has the shape alone."""
    student = sliced_shape(teacher, kept)
    content = {**asdict(kept), "teacher": teacher.to_hugging_face(), "student": student.to_hugging_face()}
    files.write_atomic(context.directory / "kept.json", json.dumps(content) + "\n")
    if sliced:
        return
    if context.config.prune.random_weights:
        seed = context.config.prune.random_seed
        dtype = str(Tensors(directory).dtype(next(iter(teacher.tensors())))).removeprefix("torch.")
        tokenizer = directory if has_tokenizer(directory) else None
        write_random_model(context.directory / "hf", student, seed, dtype, tokenizer=tokenizer)
        return
    if student.parameters() < QUICKLY_WRITTEN:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept)
        return
    with console.progress("prune  writing", student.parameters(), "parameters") as bar:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept, advance=bar.advance)
