"""Shapes and sequence lengths against the layout of ranks."""

import importlib.util
import os
from collections.abc import Collection, Iterator

from pipelines import planning
from pipelines.config import Config, Layout, TeacherMode, expect
from pipelines.families import ModelShape

WITHOUT_CONTEXT = ("prune", "evaluate", "export", "verify")  # their windows are not cut over context-parallel ranks


def check_division(ranks: Layout, shape: ModelShape, who: str) -> None:
    sizes = {
        "attention heads": shape.num_attention_heads,
        "KV groups": shape.num_key_value_heads,
        "ffn neurons": shape.intermediate_size,
    }
    tensor, pipeline = ranks.tensor, ranks.pipeline
    for what, size in sizes.items():
        setting, divisor = f"parallel.tensor={tensor}", f"a divisor of the {who}'s {size} {what}"
        expect(size % tensor == 0, setting, divisor, tensor, "Lower parallel.tensor.")
    layers, setting = shape.num_hidden_layers, f"parallel.pipeline={pipeline}"
    expected = f"a divisor of the {who}'s {layers} layers"
    expect(layers % pipeline == 0, setting, expected, pipeline, "Lower parallel.pipeline.")


def check_gpu(config: Config, stages: Collection[str]) -> None:
    gpu, known = config.plan.gpu, ", ".join(planning.BF16_PEAKS)
    good = "plan" not in stages or planning.peak_flops(gpu) is not None
    expect(good, "plan.gpu", f"one of {known}", gpu, "Name the nearest one.")


def check_processes(ranks: Layout) -> None:
    """No more processes than one machine's processors can bear; another launcher knows its own machines."""
    most = max(16, 4 * (os.cpu_count() or 1))
    too_many = ranks.device == "cpu" and "WORLD_SIZE" not in os.environ and ranks.processes > most
    remedy = "Lower parallel.processes, tensor, pipeline or context."
    expect(not too_many, "parallel", f"at most {most} processes on this machine's processors", ranks.processes, remedy)


def check_context(ranks: Layout, stages: Collection[str]) -> None:
    if ranks.context == 1 or set(stages) == {"plan"}:
        return
    found, engine = ranks.context, importlib.util.find_spec("transformer_engine") is not None
    remedy = "Use NVIDIA's container, or parallel.context=1."
    expect(engine, "parallel.context", "1 without Transformer Engine", found, remedy)
    for name in WITHOUT_CONTEXT:
        remedy = f"Run stage={name} with parallel.context=1, apart from teacher and distil."
        expect(name not in stages, "parallel.context", f"1 in stage {name}", found, remedy)


def lengths(config: Config, stages: Collection[str]) -> Iterator[tuple[str, int]]:
    """(stage, sequence length) of the stages that are asked for."""
    for name in ("teacher", "prune", "distil", "evaluate", "verify", "benchmark"):
        if name in stages and not (name == "teacher" and config.teacher.mode is TeacherMode.take):
            yield name, getattr(config, name).sequence_length


def check_length(name: str, length: int, ranks: Layout, teacher: ModelShape) -> None:
    setting, limit = f"{name}.sequence_length", teacher.max_position_embeddings
    if name != "verify":  # has a small model of its own
        expect(length <= limit, setting, f"at most max_position_embeddings={limit}", length, "Shorten it.")
        window = teacher.sliding_window
        engine = importlib.util.find_spec("transformer_engine") is not None
        expected = f"at most the sliding window {window} without Transformer Engine"
        expect(not window or window >= length or engine, setting, expected, length, "Shorten it.")
    if ranks.sequence_parallel:
        expected = f"a multiple of parallel.tensor={ranks.tensor} under sequence parallelism"
        remedy = "Change it, or parallel.sequence_parallel=false."
        expect(length % ranks.tensor == 0, setting, expected, length, remedy)
    if ranks.context > 1:
        unit = 2 * ranks.context
        expect(length % unit == 0, setting, f"a multiple of 2 * parallel.context={unit}", length, "Change it.")
