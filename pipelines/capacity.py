"""How far a student may lie below its teacher before a step between them pays. Imports no torch.

A student that is much smaller than its teacher learns worse from it than from a model between the two (teacher
assistants, arXiv 1902.03393). Beyond FAR the advice is ceil(log(ratio) / log(FAR)) distillations, the sizes between in
equal ratios.
"""

import math
from typing import Any

from pipelines.config import Config, Layout
from pipelines.families import ModelShape
from pipelines.grid import shape_name, unit
from pipelines.prune_settings import PRUNED_SIZES

FAR = 4.0  # teacher's parameters / student's


def advice(config: Config, ranks: Layout, teacher: ModelShape, student: ModelShape) -> dict[str, Any] | None:
    """None where the student is near enough. Else {"ratio", "distillations", "between": the largest first,
    [{"parameters": by equal ratios, "shape": one of about so many, None where the student is larger than the teacher on
    some axis, "shape_parameters"}]}."""
    whole, wanted = teacher.parameters(), student.parameters()
    ratio = whole / wanted
    if ratio <= FAR:
        return None
    steps = math.ceil(math.log(ratio, FAR) - 1e-9)
    between = []
    for step in range(1, steps):
        shape = _between(config, ranks, teacher, student, step / steps)
        between.append(
            {
                "parameters": round(whole / ratio ** (step / steps)),
                "shape": shape and shape_name(shape),
                "shape_parameters": shape and shape.parameters(),
            }
        )
    return {"ratio": round(ratio, 2), "distillations": steps, "between": between}


def _between(
    config: Config, ranks: Layout, teacher: ModelShape, student: ModelShape, share: float
) -> ModelShape | None:
    """The sizes at `share` of the way from teacher to student, in equal ratios, on the multiples that students keep."""
    if any(getattr(student, axis) > getattr(teacher, axis) for axis in PRUNED_SIZES):
        return None
    sizes: dict[str, int] = {}
    for axis in PRUNED_SIZES:
        large, small, step = getattr(teacher, axis), getattr(student, axis), unit(config, ranks, axis)
        wanted = large * (small / large) ** share
        sizes[axis] = min(large, max(small, round(wanted / step) * step))
    per_group = teacher.num_attention_heads // teacher.num_key_value_heads
    groups = sizes["num_key_value_heads"]
    sizes["num_attention_heads"] = groups * min(per_group, max(1, round(sizes["num_attention_heads"] / groups)))
    return teacher.replace(**sizes)


def in_words(found: dict[str, Any]) -> str:
    parts = [
        f"{entry['parameters'] / 1e6:,.4g}M" + (f" (about {entry['shape']})" if entry["shape"] else "")
        for entry in found["between"]
    ]
    return (
        f"the student is {found['ratio']:g} times smaller than the teacher; beyond {FAR:g} a model between them "
        f"teaches better: prune and distil in {found['distillations']} steps (iterate.students), through "
        f"{', '.join(parts)} parameters"
    )
