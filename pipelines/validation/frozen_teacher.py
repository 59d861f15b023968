"""How the teacher of a distillation is held in memory, against its shape and the device."""

from collections.abc import Collection

from pipelines import elsewhere
from pipelines.config import Config, Layout, Precision, TeacherPrecision, expect, teacher_precision
from pipelines.families import ModelShape

FP8_WIDTH, FP8_TOKENS = 16, 8  # what the sides of Transformer Engine's matrices in FP8 are multiples of


def check(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape) -> None:
    """For `plan` all but what the device must be able to: it counts for another machine."""
    if not {"plan", "distil"} & set(stages):
        return
    setting, precision = "distil.teacher_precision", teacher_precision(config.distil)
    mixed = precision is TeacherPrecision.bf16 and config.distil.precision is Precision.fp32
    odd = mixed and ranks.pipeline > 1 and teacher.hidden_size % 2 == 1
    expected = f"fp32 beside a student in fp32 with parallel.pipeline={ranks.pipeline} and an odd hidden size"
    expect(not odd, setting, expected, precision.value, "Set it to fp32, or parallel.pipeline=1.")
    if precision is not TeacherPrecision.fp8:
        return
    if "distil" in stages:
        _check_device(setting, ranks)
    # Its tensors in FP8 are made of several parts, whose memory cannot be exchanged under them as that of others can.
    expected, offload = "false with distil.teacher_precision=fp8", "distil.teacher_offload"
    expect(not config.distil.teacher_offload, offload, expected, "true", "Set it to false, or the teacher to bf16.")
    _check_sizes(config, ranks, teacher)


def _check_device(setting: str, ranks: Layout) -> None:
    remedy = "Set it to bf16."
    expect(ranks.device == "cuda", setting, "fp32 or bf16 on the CPU", "fp8", remedy)
    engine = elsewhere.installed("transformer_engine")
    expect(engine, setting, "fp32 or bf16 without Transformer Engine", "fp8", f"Use NVIDIA's container. {remedy}")


def _check_sizes(config: Config, ranks: Layout, teacher: ModelShape) -> None:
    setting, inner = "distil.teacher_precision", teacher.num_attention_heads * teacher.head_dim
    for what, size in (
        ("hidden channels", teacher.hidden_size),
        ("neurons", teacher.intermediate_size // ranks.tensor),
        ("channels of queries", inner // ranks.tensor),
        ("channels of keys and values", teacher.num_key_value_heads * teacher.head_dim // ranks.tensor),
    ):
        found = f"fp8 with {size} {what} on each rank"
        expect(size % FP8_WIDTH == 0, setting, f"multiples of {FP8_WIDTH} in fp8", found, "Set it to bf16.")
    cut = ranks.context * (ranks.tensor if ranks.sequence_parallel else 1)
    tokens = config.distil.micro_batch_size * config.distil.sequence_length // cut
    found, remedy = f"fp8 with {tokens} tokens on each rank", "Set it to bf16, or change distil.micro_batch_size."
    expect(tokens % FP8_TOKENS == 0, setting, f"a multiple of {FP8_TOKENS} tokens in fp8", found, remedy)
