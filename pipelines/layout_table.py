"""Which layouts of a number of devices hold an experiment's distillation, the fastest first. Imports no torch.

A layout is laid out as Megatron does it: tensor, context, data, pipeline from the nearest ranks to the farthest, the
tensor-parallel ranks inside one machine. The time of a step is

    slowest stage's FLOPs / (plan.share_of_peak * peak)  * (micro batches + pipeline - 1) / micro batches
    + bytes of each group (traffic.py) / speed of its link

with the last stage's heads counted to the slowest stage, no communication behind computation, links by gpus.LINKS
inside a machine and plan.network_bytes_per_second between machines. This model is for the ratio of one layout to
another. The experiment's own layout takes the time that planning.prediction tells of it, all of it at
plan.share_of_peak, and the others as much more or less as the model says: one basis for the plan and its table.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from pipelines import gpus, planning
from pipelines.config import Config, DistilConfig, Layout, Precision, TeacherPrecision, teacher_precision
from pipelines.families import ModelShape
from pipelines.signals import FeatureLoss, across_tokens, pipeline_stage
from pipelines.traffic import communication

USABLE = 0.9  # of a device's memory: communication buffers, CUDA's context and the allocator's waste take the rest
SHOWN = 16  # layouts in the table, beside the experiment's own
CONTEXTS = (1, 2, 4, 8)


def layouts(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> dict[str, Any]:
    """{"devices", "gpu", "memory_bytes", "usable_bytes", "divide": how many layouts the models and the batch can be
    divided by, "fit": how many of them fit, "layouts": the best, each with what decides, and the experiment's own}.

    ranks: the experiment's own, which divides.
    """
    name = gpus.named_gpu(config.plan.gpu)
    assert name is not None, config.plan.gpu
    usable = USABLE * gpus.MEMORY[name]
    mine = row(config, teacher, student, ranks, config.distil)
    rows = [row(config, teacher, student, *each) for each in candidates(config, teacher, student, ranks)]
    rows = [r for r in rows if not _alike(r, mine)] + [mine]
    anchor = _planned_seconds(config, teacher, student, ranks) / mine["seconds_per_step"]
    for each in rows:
        each |= _timed(config, each, anchor) | {"own": each is mine, "fits": each["bytes_per_device"] <= usable}
    fitting = sorted((r for r in rows if r["fits"]), key=lambda r: r["seconds_per_step"])
    for place, each in enumerate(fitting, 1):
        each["place"] = place
    shown = fitting[:SHOWN]
    return {
        "devices": ranks.processes,
        "gpu": name,
        "memory_bytes": gpus.MEMORY[name],
        "usable_bytes": usable,
        "network_bytes_per_second": config.plan.network_bytes_per_second,
        "link_bytes_per_second": gpus.LINKS[name],
        "share_of_peak": config.plan.share_of_peak,
        "divide": len(rows),
        "fit": len(fitting),
        "least_bytes": min((r["bytes_per_device"] for r in rows), default=0),
        "layouts": shown if mine in shown else [*shown, mine],
    }


def best(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> tuple[Layout, DistilConfig] | None:
    """The fastest layout of as many devices that fits; None where none does. ranks: of which the number counts."""
    name = gpus.named_gpu(config.plan.gpu)
    assert name is not None, config.plan.gpu
    usable, fitting = USABLE * gpus.MEMORY[name], []
    for each in candidates(config, teacher, student, ranks):
        found = row(config, teacher, student, *each)
        if found["bytes_per_device"] <= usable:
            fitting.append((found["seconds_per_step"], len(fitting), each))
    return min(fitting)[-1] if fitting else None


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("layout", "recompute"))


def _planned_seconds(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> float:
    """Of a step on the experiment's own layout, as `planning.prediction` reckons its hours."""
    flops, training = planning.step_flops(config.distil, teacher, student, ranks), config.distil
    tokens, settings = training.global_batch_size * training.sequence_length, config.plan
    peak = gpus.peak_flops(settings.gpu)
    assert peak is not None, settings.gpu
    return tokens * flops.total / (settings.share_of_peak * peak * ranks.processes)


def _timed(config: Config, entry: dict[str, Any], anchor: float) -> dict[str, Any]:
    """The times of a row in those of the plan. anchor: planned seconds to a second of the model."""
    training, seconds = config.distil, anchor * entry["seconds_per_step"]
    tokens, devices = training.global_batch_size * training.sequence_length, entry["layout"]["processes"]
    waits = {group: round(anchor * value, 4) for group, value in entry["communication_seconds"].items()}
    return {
        "seconds_per_step": round(seconds, 4),
        "communication_seconds": waits,
        "tokens_per_second_per_device": round(tokens / seconds / devices, 1),
        "hours": round(training.steps * seconds / 3600, 2),
    }


def candidates(
    config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout
) -> Iterator[tuple[Layout, DistilConfig]]:
    """Every layout of as many devices that divides heads, KV groups, neurons, layers, sequences and the batch, with
    and without recompute. Without sequence parallelism only where the sequence does not divide."""
    training, shapes, devices = config.distil, (teacher, student), ranks.processes
    contexts = CONTEXTS if _may_cut(training, teacher, student) else (1,)
    losses = planning.feature_losses_of(training, teacher, student)
    for tensor in _divisors(devices, config.plan.gpus_per_node):
        sizes = [(s.num_attention_heads, s.num_key_value_heads, s.intermediate_size) for s in shapes]
        if any(size % tensor for three in sizes for size in three):
            continue
        for pipeline in _divisors(devices // tensor, min(s.num_hidden_layers for s in shapes)):
            if any(shape.num_hidden_layers % pipeline for shape in shapes):
                continue
            if any(_parted(loss, teacher, student, pipeline) for loss in losses):
                continue
            for context in contexts:
                data, rest = divmod(devices // (tensor * pipeline), context)
                cuts = 2 * context if context > 1 else 1
                if rest or not data or training.sequence_length % cuts:
                    continue
                if training.global_batch_size % (training.micro_batch_size * data):
                    continue
                split = tensor > 1 and training.sequence_length % (tensor * context) == 0
                found = Layout(devices, tensor, pipeline, context, data, ranks.device, split)
                for recompute in (False, True) if not training.attention else (False,):
                    yield found, replace(training, recompute=recompute)


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _may_cut(training: DistilConfig, teacher: ModelShape, student: ModelShape) -> bool:
    """Whether sequences may be cut over ranks, by what validation/layouts.py and validation/signals.py ask."""
    halves = training.precision is Precision.bf16 and teacher_precision(training) is not TeacherPrecision.fp32
    windows = [shape.sliding_window for shape in (teacher, student) if shape.sliding_window is not None]
    whole = all(window >= training.sequence_length for window in windows)
    return halves and whole and not training.document_mask and not across_tokens(training.hidden, training.attention)


def _parted(loss: FeatureLoss, teacher: ModelShape, student: ModelShape, pipeline: int) -> bool:
    """Whether its two layers lie on different pipeline stages."""
    own = pipeline_stage(loss.student_layer, student.num_hidden_layers, pipeline)
    return own != pipeline_stage(loss.teacher_layer, teacher.num_hidden_layers, pipeline)


def row(
    config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout, training: DistilConfig
) -> dict[str, Any]:
    """What a layout takes, and the seconds of a step by the model above."""
    held = planning.step_bytes(training, teacher, student, ranks)["total"]
    sent = communication(teacher, student, ranks, training)["bytes_per_device"]
    compute = compute_seconds(config, teacher, student, ranks, training)
    waits = {group: size / link(config, group, ranks) for group, size in sent.items()}
    return {
        "layout": asdict(ranks),
        "recompute": training.recompute,
        "bytes_per_device": held,
        "seconds_per_step": compute + sum(waits.values()),
        "communication_seconds": {group: value for group, value in waits.items() if value},
    }


def compute_seconds(
    config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout, training: DistilConfig
) -> float:
    """Of a step, with what is computed more than once and the pipeline's bubble."""
    flops = planning.step_flops(training, teacher, student, ranks)
    heads = planning.FORWARD_AND_BACKWARD * 2 * student.vocab_size * student.hidden_size
    heads += 2 * teacher.vocab_size * teacher.hidden_size * planning.needs_logits(training)
    slowest = (flops.executed - heads) / ranks.pipeline + heads
    batches = training.global_batch_size // (training.micro_batch_size * ranks.data)
    passes = batches + ranks.pipeline - 1
    tokens = training.micro_batch_size * training.sequence_length
    peak = gpus.peak_flops(config.plan.gpu)
    assert peak is not None, config.plan.gpu
    return passes * tokens * slowest / (ranks.tensor * ranks.context) / (config.plan.share_of_peak * peak)


def link(config: Config, group: str, ranks: Layout) -> float:
    """Bytes/s of the slowest way between two neighbours of a group: inside a machine, or between machines."""
    reach = {  # ranks from the first to the last of a group, or to the next one
        "tensor": ranks.tensor,
        "context": ranks.tensor * ranks.context,
        "data": ranks.tensor * ranks.context * ranks.data,
        "pipeline": ranks.processes,
    }
    name = gpus.named_gpu(config.plan.gpu)
    assert name is not None, config.plan.gpu
    return gpus.LINKS[name] if reach[group] <= config.plan.gpus_per_node else config.plan.network_bytes_per_second


def as_text(found: dict[str, Any]) -> list[str]:
    memory = f"{found['memory_bytes'] / 1e9:g} GB, of which {USABLE:.0%} counted"
    refused = found.get("refused")
    lines = [f"the experiment's own layout does not hold: {refused}", ""] if refused else []
    devices = f"{found['devices']} x {found['gpu']}"
    lines.append(f"{found['fit']} of {found['divide']} layouts of {devices} fit ({memory}), best first:")
    if not found["fit"]:
        least = f"the smallest takes {found['least_bytes'] / 1e9:,.1f} GB per device"
        lines.append(f"  none: {least}. Use more devices, shorter sequences, or a smaller micro batch.")
    lines.append(
        f"  {'':<7} {'tensor':>6} {'pipeline':>8} {'context':>7} {'data':>5}  {'recompute':<9} {'GiB':>8}"
        f" {'tokens/s':>9} {'hours':>10}  communication in a step"
    )
    lines += [_line(entry) for entry in found["layouts"]]
    which = "1: the first layout" if refused else "own: the experiment's own layout"
    return [
        *lines,
        f"  {which} is taken to reach {found['share_of_peak']:.0%} of the peak, as in the plan above; the others "
        "are faster or slower by their products, what they compute twice, the pipeline's bubble, and all communication "
        f"on top, at {found['link_bytes_per_second'] / 1e9:g} GB/s inside a machine and "
        f"{found['network_bytes_per_second'] / 1e9:g} GB/s per device between machines",
    ]


def _line(entry: dict[str, Any]) -> str:
    ranks, waits = entry["layout"], entry["communication_seconds"]
    told = ", ".join(f"{group} {value:.2f} s" for group, value in waits.items()) or "none"
    place = f"{entry['place']}" if entry["fits"] else "-"
    return (
        f"  {place + (' own' if entry['own'] else ''):<7} {ranks['tensor']:>6} {ranks['pipeline']:>8} "
        f"{ranks['context']:>7} {ranks['data']:>5}  {'yes' if entry['recompute'] else 'no':<9} "
        f"{entry['bytes_per_device'] / 2**30:>8,.1f} {entry['tokens_per_second_per_device']:>9,.0f} "
        f"{entry['hours']:>10,.2f}  {told} of {entry['seconds_per_step']:,.2f} s"
        + ("" if entry["fits"] else "; does not fit")
    )
