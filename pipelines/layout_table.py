"""Which layouts of a number of devices hold an experiment's distillation, the fastest first. Imports no torch.

A layout is laid out as Megatron does it: tensor, context, data, pipeline from the nearest ranks to the farthest, the
tensor-parallel ranks inside one machine. The time of a step is

    slowest stage's FLOPs / (plan.share_of_peak * peak)  * (micro batches + pipeline - 1) / micro batches
    + bytes of each group (traffic.py) / speed of its link

with the last stage's heads counted to the slowest stage, no communication behind computation, links by gpus.LINKS
inside a machine and plan.network_bytes_per_second between machines. So it is a model for the order of layouts: where
communication hides behind computation, as gradients' does, a run is faster, and none is promised.
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
SHOWN = 16  # layouts in the table
CONTEXTS = (1, 2, 4, 8)


def layouts(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> dict[str, Any]:
    """{"devices", "gpu", "memory_bytes", "usable_bytes", "divide": how many layouts the models and the batch can be
    divided by, "fit": how many of them fit, "layouts": the best, each with what decides}."""
    name = gpus.named_gpu(config.plan.gpu)
    assert name is not None, config.plan.gpu
    usable = USABLE * gpus.MEMORY[name]
    rows = [row(config, teacher, student, *each) for each in candidates(config, teacher, student, ranks)]
    fitting = sorted((r for r in rows if r["bytes_per_device"] <= usable), key=lambda r: r["seconds_per_step"])
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
        "layouts": fitting[:SHOWN],
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
    """What a layout takes and how fast it is by the model above."""
    held = planning.step_bytes(training, teacher, student, ranks)["total"]
    sent = communication(teacher, student, ranks, training)["bytes_per_device"]
    compute = compute_seconds(config, teacher, student, ranks, training)
    waits = {group: size / link(config, group, ranks) for group, size in sent.items()}
    seconds = compute + sum(waits.values())
    tokens = training.global_batch_size * training.sequence_length
    return {
        "layout": asdict(ranks),
        "recompute": training.recompute,
        "bytes_per_device": held,
        "seconds_per_step": round(seconds, 4),
        "communication_seconds": {group: round(value, 4) for group, value in waits.items() if value},
        "tokens_per_second_per_device": round(tokens / seconds / ranks.processes, 1),
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
    lines = [
        f"{found['fit']} of {found['divide']} layouts of {found['devices']} x {found['gpu']} fit ({memory}), best "
        "first by predicted speed:",
    ]
    if not found["layouts"]:
        least = f"the smallest takes {found['least_bytes'] / 1e9:,.1f} GB per device. " if found["divide"] else ""
        return [*lines, f"  none: {least}Use more devices, shorter sequences, or a smaller micro batch."]
    lines.append(
        f"  {'tensor':>6} {'pipeline':>8} {'context':>7} {'data':>5}  {'recompute':<9} {'GiB':>8}"
        f" {'tokens/s':>9}  communication in a step"
    )
    for entry in found["layouts"]:
        ranks, waits = entry["layout"], entry["communication_seconds"]
        shown = ", ".join(f"{group} {value:.2f} s" for group, value in waits.items()) or "none"
        lines.append(
            f"  {ranks['tensor']:>6} {ranks['pipeline']:>8} {ranks['context']:>7} {ranks['data']:>5}  "
            f"{'yes' if entry['recompute'] else 'no':<9} {entry['bytes_per_device'] / 2**30:>8,.1f} "
            f"{entry['tokens_per_second_per_device']:>9,.0f}  {shown} of {entry['seconds_per_step']:,.2f} s"
        )
    return [
        *lines,
        f"  tokens/s per device: products at {found['share_of_peak']:.0%} of the peak, the pipeline's bubble, and all "
        f"communication on top, at {found['link_bytes_per_second'] / 1e9:g} GB/s inside a machine and "
        f"{found['network_bytes_per_second'] / 1e9:g} GB/s per device between machines",
    ]
