"""The plan of an experiment: parameters, tokens, FLOPs, bytes per device, as a table or as JSON. Imports no torch.

Where the student's shape is searched for, the plan is that of the largest candidate: the most that it can cost. Of a
run in steps each is planned by itself, with the sums behind them.
"""

import json
from dataclasses import replace
from typing import Any

from pipelines import (
    artifacts,
    capacity,
    dry_run,
    gpus,
    grid,
    iteration,
    layout_table,
    plan_text,
    planning,
    validation,
)
from pipelines.activations import activation_bytes, chunk_of_logits
from pipelines.config import Config, Format, Layout, Precision, TeacherMode, UserError, layout, searches
from pipelines.device_memory import training_bytes
from pipelines.evaluation_settings import GENERATED, is_task_file
from pipelines.families import ModelShape
from pipelines.prune_costs import forward_flops, prune_cost
from pipelines.speeds import pass_tokens, speeds
from pipelines.storage import run_bytes
from pipelines.traffic import communication

SHOWN = 8  # candidates


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config = context.config
    figures = steps_plan(config) if config.iterate.students else plan(config)
    print(json.dumps(figures, indent=2) if config.format is Format.json else plan_text.as_text(figures))
    for part in figures["steps"] if "sum" in figures else [figures]:
        if "dry_run" in part:
            dry_run.refuse_mismatches(part["dry_run"])
    return figures


def steps_plan(config: Config) -> dict[str, Any]:
    """{"experiment", "teaches": who, "steps": `plan` of each, "sum": tokens, FLOPs, hours, minutes of pruning}."""
    models, steps = iteration.shapes(config), []
    for number in range(1, len(models)):
        pruning = plan(iteration.pruning_view(config, number, models[number - 1]), dry=False)
        distillation = plan(iteration.distillation_view(config, number, models))
        steps.append(pruning | distillation | {"pruning": pruning["pruning"]})
    total = {name: sum(step[name] for step in steps) for name in ("tokens", "flops")}
    total |= {name: round(sum(step["prediction"][name] for step in steps), 2) for name in ("device_hours", "hours")}
    total["pruning_minutes"] = round(sum(step["pruning"]["minutes"] for step in steps), 2)
    return {"experiment": config.run.name, "teaches": config.iterate.teacher.value, "steps": steps, "sum": total}


def plan(config: Config, *, dry: bool = True) -> dict[str, Any]:
    """planning.plan's figures, and `pruning` (prune_costs.py) unless the student is given; with `search` where
    prune.target is set, `capacity` where the student is far below, `dry_run` where it is asked for and `dry`. With
    plan.layouts, of the table's first layout where the experiment's own does not divide."""
    if dry and (refusal := validation.layout_refusal(config)):
        figures = plan(_on_the_best_layout(config, refusal))
        figures["layouts"]["refused"] = str(refusal)
        for entry in figures["layouts"]["layouts"]:
            entry["own"] = False
        return figures
    teacher, ranks = planning.teacher_shape(config), planning.planned_layout(config)
    student, found = _search(config, teacher) if searches(config) else (planning.student_shape(config), {})
    if far := capacity.advice(config, ranks, teacher, student):
        found["capacity"] = far
    if not config.student.path:
        found["pruning"] = prune_cost(config, teacher, student, ranks)
    if config.plan.dry_run and dry:
        found["dry_run"] = dry_run.run(config, teacher, student, ranks)
        if names := config.evaluate.tasks.names:
            found["tasks"] = _tasks(config, names)
    if config.plan.layouts and dry:
        found["layouts"] = layout_table.layouts(config, teacher, student, ranks)
    return planning.plan(config, student) | _beside(config, teacher, student, ranks) | found


def _on_the_best_layout(config: Config, refusal: UserError) -> Config:
    """The settings on the fastest layout of as many devices. Raises UserError where none fits."""
    try:
        processes = layout(config.parallel).processes
    except UserError:
        processes = layout(replace(config.parallel, tensor=1, pipeline=1, context=1)).processes
    whole = replace(config.parallel, processes=processes, tensor=1, pipeline=1, context=1)
    ranks = planning.planned_layout(replace(config, parallel=whole))
    found = layout_table.best(config, planning.teacher_shape(config), planning.student_shape(config), ranks)
    if found is None:
        raise UserError(f"{refusal} No other layout of {processes} x {config.plan.gpu} fits either: use more devices.")
    fitting, training = found
    values = {name: getattr(fitting, name) for name in ("tensor", "pipeline", "context", "sequence_parallel")}
    return replace(config, parallel=replace(whole, **values), distil=training)


def _tasks(config: Config, names: list[str]) -> list[dict[str, Any]]:
    """The evaluation's tasks as the harness knows them, without their data."""
    from pipelines.evaluation import harness

    settings = config.evaluate.tasks
    harness.version()
    own = [name for name in names if not is_task_file(name) and name not in GENERATED]
    return harness.described([harness.Task(n, n, settings.shots.get(n), settings.metrics.get(n)) for n in own])


def _beside(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> dict[str, Any]:
    """`communication` and `disk`; `teacher_training` where it is trained; `activations`, estimates with and without
    recompute, and the heads' chunk."""
    training = config.distil
    losses = planning.feature_losses_of(training, teacher, student)
    follows = planning.needs_logits(training)

    def held(recompute: bool) -> int:
        settings = replace(training, recompute=recompute)
        return activation_bytes(teacher, student, ranks, settings, losses, follows)["activations"]

    tokens = training.micro_batch_size * training.sequence_length // ranks.context
    size = 2 if training.precision is Precision.bf16 else 4
    corrects = {} if config.teacher.mode is TeacherMode.take else {"teacher_training": _teacher(config, teacher, ranks)}
    return corrects | {
        "communication": communication(teacher, student, ranks, training),
        "disk": run_bytes(config, teacher, student),
        "activations": {
            "with_recompute": held(True),
            "without_recompute": held(False),
            "heads_chunk": chunk_of_logits(student, ranks, tokens, size, follows),
        },
    }


def _teacher(config: Config, shape: ModelShape, ranks: Layout) -> dict[str, Any]:
    """Of its pretraining or correction: tokens, FLOPs, speed and hours, bytes per device."""
    settings = config.teacher
    tokens = settings.steps * settings.global_batch_size * settings.sequence_length
    flops = planning.Flops(teacher=0, student=planning.training_flops(shape, settings.sequence_length), attention=0)
    predicted = planning.prediction(config.plan.gpu, flops, tokens, ranks.processes, config.plan.share_of_peak)
    return {
        "mode": settings.mode.value,
        "steps": settings.steps,
        "tokens": tokens,
        "flops": flops.total * tokens,
        **{name: predicted[name] for name in ("tokens_per_second_per_device", "device_hours", "hours")},
        "bytes_per_device": training_bytes(shape, ranks, settings),
    }


def _search(config: Config, teacher: ModelShape) -> tuple[ModelShape, dict[str, Any]]:
    """(the largest candidate, limits and candidates)."""
    ranks = layout(config.parallel)
    candidates, values = grid.candidates(config, ranks, teacher)
    known, tokens, settings = speeds(config, ranks, teacher), pass_tokens(config), config.prune.search
    largest = [
        {
            "name": candidate.name,
            "parameters": candidate.parameters,
            "share": round(candidate.parameters / teacher.parameters(), 4),
            "bytes_per_gpu": candidate.bytes_per_gpu,
            "tokens_per_second": candidate.tokens_per_second(tokens),
        }
        for candidate in candidates[:SHOWN]
    ]
    found = {
        "limits": grid.described(config, teacher),
        "speeds": known.source if known else f"yet to be measured, {settings.speed}",
        "values": {axis: list(sizes) for axis, sizes in values.items()},
        "candidates": len(candidates),
        "largest": largest,
        "measured": min(settings.measured, len(candidates)),
        "followed": min(settings.candidates, len(candidates)),
        "distil_tokens": settings.distil_tokens,
    }
    found |= _cost_of_search(config, ranks, teacher, candidates[0].shape, values, found)
    return candidates[0].shape, {"search": found}


def _cost_of_search(
    config: Config,
    ranks: Layout,
    teacher: ModelShape,
    largest: ModelShape,
    values: grid.Values,
    found: dict[str, Any],
) -> dict[str, Any]:
    """An upper bound: every size by itself and every measured candidate is a pass of the teacher over the calibration
    sequences; the followed are counted as the largest candidate."""
    settings = config.prune
    sizes = sum(size != getattr(teacher, axis) for axis, given in values.items() for size in given)
    passes = 1 + sizes + found["measured"] + (0 if found["distil_tokens"] else found["followed"])
    forward = forward_flops(config, teacher, teacher.num_hidden_layers)
    measuring = passes * settings.calibration_samples * settings.sequence_length * forward
    training = planning.distillation_flops(teacher, largest, config.distil.sequence_length).total
    flops = measuring + found["followed"] * found["distil_tokens"] * training
    peak = gpus.peak_flops(config.plan.gpu)
    assert peak is not None, config.plan.gpu
    seconds = flops / (config.plan.share_of_peak * peak * ranks.processes)
    return {"passes": passes, "flops": flops, "minutes": round(seconds / 60, 2)}
