"""Distillation: a student trained on the logits of its frozen teacher, both sharded over the same ranks."""

from typing import Any

from pipelines import artifacts
from pipelines.config import layout
from pipelines.families import read_shape
from pipelines.model import parallel
from pipelines.model.export import save_hugging_face


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, settings, ranks = context.config, context.config.distil, layout(context.config.parallel)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    from pipelines.trainer.distillation import distil, identity

    teacher, start = artifacts.teacher_directory(config), artifacts.student_start_directory(config)
    pair, validation, costs = distil(context, teacher=teacher, start=start)
    shape, tokenizer = read_shape(start), artifacts.corpus_directory(config) / "tokenizer"
    save_hugging_face(pair.student, context.directory / "hf", shape, tokenizer=tokenizer)
    return {
        "model": str(context.directory / "hf"),
        "loss": identity(settings),
        "parameters": shape.parameters(),
        "teacher_parameters": read_shape(teacher).parameters(),
        "steps": settings.steps,
        "tokens": settings.steps * settings.global_batch_size * settings.sequence_length,
        "validation": validation,
        "training": costs,
    }
