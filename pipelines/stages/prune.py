"""Pruning in width and depth: score the teacher on calibration data, select, slice its safetensors.

Writes hf/ (the student), kept.json, and scores.safetensors (float64 arrays hidden, ffn.<layer>, heads.<layer> and
block_influence; layers count from 1). Where nothing has to be ranked nothing is scored and there are no arrays.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from pipelines import artifacts, console, files
from pipelines.config import Config, Layout, layout, without_context
from pipelines.core.importance import Scores
from pipelines.core.selection import Kept
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.scoring import score
from pipelines.model.slicing import slice_checkpoint, sliced_shape
from pipelines.model.weights import load_hugging_face
from pipelines.pruning.calibration import calibration_batches, calibration_windows
from pipelines.pruning.choice import checked_target, choose, needs_scores
from pipelines.pruning.scores_file import named_arrays, provenance, read_scores, update

QUICKLY_WRITTEN = 100_000_000  # parameters: below, writing takes a second or two and shows no bar


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, ranks = context.config, without_context(layout(context.config.parallel))
    directory = artifacts.teacher_directory(config)
    teacher = read_shape(directory)
    target = checked_target(config, teacher)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    started = time.monotonic()
    scores, seconds = None, 0.0
    if needs_scores(config.student, teacher, target):
        scores = read_scores(context, teacher)
        if scores is None:
            scores = _score(config, ranks, directory, teacher)
            seconds = time.monotonic() - started
    else:
        console.say("prune  nothing has to be ranked: no scoring, the prune.* calibration settings have no effect")
    kept = choose(scores, teacher, target, drop_layers=config.student.drop_layers, protect=config.prune.protect)
    student = sliced_shape(teacher, kept)
    parallel.on_first_rank(lambda: _write(context, directory, teacher, kept, scores))
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
        "calibration_samples": scores.samples if scores else 0,
        "calibration_tokens": scores.tokens if scores else 0,
        "scoring_seconds": round(seconds, 2),
        "scoring_tokens_per_second": round(scores.tokens / seconds, 1) if scores and seconds else None,
    }


# Scoring


def _score(config: Config, ranks: Layout, directory: Path, teacher: ModelShape) -> Scores:
    settings = config.prune
    length, samples = settings.sequence_length, settings.calibration_samples
    windows = calibration_windows(config, directory, teacher)
    model = build_model(
        teacher,
        sequence_parallel=ranks.sequence_parallel,
        precision=settings.precision.value,
        sequence_length=length,
    )
    load_hugging_face(model, directory, teacher)
    batches = calibration_batches(
        windows,
        samples,
        settings.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    started = time.monotonic()
    with console.progress("prune  scoring", samples, "samples") as bar:

        def advance(done: int) -> None:
            tokens = (bar.done + done) * length
            bar.advance(done, detail=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")

        return score(model, batches, micro_batch_size=settings.micro_batch_size, advance=advance)


# The artifact


def _write(
    context: artifacts.StageContext, directory: Path, teacher: ModelShape, kept: Kept, scores: Scores | None
) -> None:
    arrays = named_arrays(scores) if scores else {}
    update(context.directory / "scores.safetensors", arrays, {"provenance": provenance(context, scores)})
    student = sliced_shape(teacher, kept)
    content = {**asdict(kept), "teacher": teacher.to_hugging_face(), "student": student.to_hugging_face()}
    files.write_atomic(context.directory / "kept.json", json.dumps(content) + "\n")
    if student.parameters() < QUICKLY_WRITTEN:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept)
        return
    with console.progress("prune  writing", student.parameters(), "parameters") as bar:
        slice_checkpoint(directory, context.directory / "hf", teacher, kept, advance=bar.advance)
