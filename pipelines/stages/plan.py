"""The plan of an experiment: parameters, tokens, FLOPs, bytes per device, as a table or as JSON. Imports no torch."""

import json
from typing import Any

from pipelines import artifacts, planning
from pipelines.config import Format


def run(context: artifacts.StageContext) -> dict[str, Any]:
    figures = planning.plan(context.config)
    print(json.dumps(figures, indent=2) if context.config.format is Format.json else as_text(figures))
    return figures


def as_text(figures: dict[str, Any]) -> str:
    teacher, student, ranks = figures["teacher"], figures["student"], figures["layout"]
    lines = [f"plan of {figures['experiment']}", "", f"{'':<32}{'teacher':>18}{'student':>18}"]
    lines += [f"{name.replace('_', ' '):<32}{teacher[name]:>18,}{student[name]:>18,}" for name in teacher]
    share, parts = figures["student_share"], figures["flops_per_token_parts"]
    lines += [f"{'share of the teacher':<32}{'':>18}{share:>18.1%}", ""]
    sequences, length = figures["global_batch_size"], figures["sequence_length"]
    bare = _giga(figures["flops_per_token_without_attention"])
    rows = {
        "steps": f"{figures['steps']:,}",
        "tokens": f"{figures['tokens']:,}  (steps * {sequences} sequences * {length})",
        "FLOPs per token": f"{_giga(figures['flops_per_token'])}, without attention {bare}",
        "  teacher forward": f"{_giga(parts['teacher'])}  (2 per matrix weight)",
        "  student forward and backward": f"{_giga(parts['student'])}  (6 per matrix weight)",
        "  causal attention": f"{_giga(parts['attention'])}  (2 * sequence * heads * head_dim per layer and forward)",
        "FLOPs in all": f"{figures['flops']:.3g}",
        "H100 hours": f"{figures['h100_hours_at_40_percent']:,}  (at 40 % of 989 TFLOP/s, bf16)",
        "layout": f"{ranks['processes']} processes: tensor {ranks['tensor']}, "
        f"pipeline {ranks['pipeline']}, context {ranks['context']}, data {ranks['data']}",
    }
    for name, size in figures["bytes_per_device"].items():
        label = "bytes per device, no activations" if name == "total" else "  " + name.replace("_", " ")
        rows[label] = f"{size / 2**30:,.3f} GiB"
    return "\n".join(lines + [f"{name:<34}{value}" for name, value in rows.items()])


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.4g} GFLOP"
