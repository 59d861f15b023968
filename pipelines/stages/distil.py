"""Distillation: a student trained on the logits of its frozen teacher, both sharded over the same ranks."""

from typing import Any

from pipelines import artifacts, console, plan_check
from pipelines.config import layout
from pipelines.families import read_shape
from pipelines.model import measure, parallel
from pipelines.model.export import save_hugging_face


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, settings, ranks = context.config, context.config.distil, layout(context.config.parallel)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    from pipelines.trainer.distillation import distil, identity
    from pipelines.trainer.run import prepare

    prepare(ranks.device)
    before, device = measure.resident_bytes(), parallel.torch_device(ranks.device)
    teacher, start = artifacts.teacher_directory(config), artifacts.student_start_directory(config)
    pair, validation, costs = distil(context, teacher=teacher, start=start)
    held = measure.process_peak_bytes(device, since=before)
    shape, tokenizer = read_shape(start), artifacts.corpus_directory(config) / "tokenizer"
    name, teaches = measure.device_name(device), read_shape(teacher)
    plan = plan_check.compare(config, ranks, teaches, shape, context.directory, held_bytes=held, device_name=name)
    save_hugging_face(pair.student, context.directory / "hf", shape, tokenizer=tokenizer, origin=start)
    console.say(plan_check.as_text(plan, "distil"))
    return {
        "model": str(context.directory / "hf"),
        "loss": identity(settings),
        "parameters": shape.parameters(),
        "teacher_parameters": teaches.parameters(),
        "steps": settings.steps,
        "tokens": settings.steps * settings.global_batch_size * settings.sequence_length,
        "validation": validation,
        "training": costs,
        "plan": plan,
    }
