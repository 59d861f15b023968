"""Shapes and sequence lengths against the layout of ranks."""

import os
from collections.abc import Collection, Iterator

from pipelines import config as configuration
from pipelines import elsewhere, gpus
from pipelines.config import Config, DistilConfig, Layout, TeacherMode, UserError, expect, teacher_precision
from pipelines.families import ModelShape
from pipelines.validation.training import trainings


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
    gpu, known = config.plan.gpu, ", ".join(gpus.BF16_PEAKS)
    good = "plan" not in stages or gpus.peak_flops(gpu) is not None
    expect(good, "plan.gpu", f"one of {known}", gpu, "Name the nearest one.")
    machine = config.plan.gpus_per_node
    expect(machine >= 1, "plan.gpus_per_node", "1 or more", machine, "Raise it.")


def check_processes(ranks: Layout) -> None:
    """No more processes than one machine's GPUs, or than its processors can bear; another launcher knows its own
    machines."""
    if ranks.device == "cuda" and not configuration.gpu_count():
        raise UserError(
            "parallel.device=cuda: expected an NVIDIA GPU, found none. Use parallel.device=auto, and no --gpus; "
            "stage=plan needs none."
        )
    if ranks.device == "cuda" and elsewhere.started_processes() is None:
        remedy = "Lower it, use parallel.device=cpu, or start the ranks on more machines (launchers/slurm.sh)."
        most, found = configuration.gpu_count(), ranks.processes
        expect(found <= most, "parallel", f"at most {most} processes, one for each GPU of this machine", found, remedy)
    most = max(16, 4 * (os.cpu_count() or 1))
    too_many = ranks.device == "cpu" and elsewhere.started_processes() is None and ranks.processes > most
    remedy = "Lower parallel.processes, tensor, pipeline or context."
    expect(not too_many, "parallel", f"at most {most} processes on this machine's processors", ranks.processes, remedy)


def check_context(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape) -> None:
    """Attention over cut sequences is Transformer Engine's: on GPUs, in half precision, without a window."""
    if ranks.context == 1:
        return
    found, setting, remedy = ranks.context, "parallel.context", "Verify the layout without it."
    expect("verify" not in stages, setting, "1 in stage verify, whose reference sees whole sequences", found, remedy)
    engine = elsewhere.installed("transformer_engine")
    for name, training in trainings(config, stages):
        remedy = "Use NVIDIA's container on GPUs, or parallel.context=1."
        on_gpu = ranks.device == "cuda" and engine
        expect(on_gpu, setting, f"1 in stage {name} without a GPU and Transformer Engine", found, remedy)
        window, expected = teacher.sliding_window, "1 with a sliding window"
        whole = not window or window >= training.sequence_length
        expect(whole, setting, expected, f"{found} with a window of {window}", "Set it to 1.")
        held = {f"{name}.precision": training.precision.value}
        if isinstance(training, DistilConfig):
            held["distil.teacher_precision"] = teacher_precision(training).value
        for where, precision in held.items():
            remedy = "Set it to bf16, or parallel.context=1."
            expect(precision != "fp32", where, f"bf16 with parallel.context={found}", precision, remedy)


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
        engine = elsewhere.installed("transformer_engine")
        expected = f"at most the sliding window {window} without Transformer Engine"
        expect(not window or window >= length or engine, setting, expected, length, "Shorten it.")
    parts = ranks.context if name in ("teacher", "distil") else 1
    if ranks.sequence_parallel:  # cuts what context parallelism leaves of a sequence
        unit = ranks.tensor * parts
        which = "parallel.tensor" + " * parallel.context" * (parts > 1)
        remedy = "Change it, or parallel.sequence_parallel=false."
        expect(length % unit == 0, setting, f"a multiple of {which}={unit} under sequence parallelism", length, remedy)
    if parts > 1:
        unit = 2 * parts
        expect(length % unit == 0, setting, f"a multiple of 2 * parallel.context={unit}", length, "Change it.")
