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
    lines += [f"{'share of the teacher':<32}{'':>18}{figures['student_share']:>18.1%}", ""]
    sequences, length = figures["global_batch_size"], figures["sequence_length"]
    rows = {
        "steps": f"{figures['steps']:,}",
        "tokens": f"{figures['tokens']:,}  (steps * {sequences} sequences * {length})",
        **_flops(figures),
        "FLOPs in all": f"{figures['flops']:.3g}",
        **_time(figures["prediction"]),
        "layout": f"{ranks['processes']} processes: tensor {ranks['tensor']}, "
        f"pipeline {ranks['pipeline']}, context {ranks['context']}, data {ranks['data']}",
    }
    sizes = figures["bytes_per_device"]
    rows["bytes per device"] = f"{sizes['total'] / 2**30:,.3f} GiB, from activations on an estimate"
    for name, size in sizes.items():
        if size and name != "total":
            rows["  " + name.replace("_", " ")] = f"{size / 2**30:,.3f} GiB"
    return "\n".join(lines + [f"{name:<34}{value}" for name, value in rows.items()])


def _flops(figures: dict[str, Any]) -> dict[str, str]:
    parts, adds = figures["flops_per_token_parts"], figures["teacher_adds"]
    bare = _giga(figures["flops_per_token_without_attention"])
    rule = (
        "at most, of whole rows" if figures["documents_apart"] else "2 * sequence * heads * head_dim per layer, forward"
    )
    rows = {
        "FLOPs per token": f"{_giga(figures['flops_per_token'])}, without attention {bare}",
        "  teacher forward": f"{_giga(parts['teacher'])}  (2 per matrix weight); adds "
        f"{adds['without_attention']:.0%}, with attention {adds['with_attention']:.0%}",
        "  student forward and backward": f"{_giga(parts['student'])}  (6 per matrix weight)",
        "  causal attention": f"{_giga(parts['attention'])}  ({rule})",
    }
    if parts["signals"]:
        rows["  hidden states and attention"] = f"{_giga(parts['signals'])}  (distil.hidden, distil.attention)"
    if repeated := parts["recompute"] + parts["replicated"]:
        rows["  computed more than once"] = f"{_giga(repeated)}  (on top; no published utilisation counts it)"
    return rows


def _time(found: dict[str, Any]) -> dict[str, str]:
    share, peak = f"{found['share_of_peak']:.0%}", f"{found['bf16_peak_flops'] / 1e12:,g} TFLOP/s"
    again, speed = found["executed"], "tokens_per_second_per_device"
    more = "" if again[speed] == found[speed] else f"; {again[speed]:,.0f} counting all that is computed"
    return {
        "tokens/s per device": f"{found[speed]:,.0f}  (at {share} of {peak}, {found['gpu']} in bf16{more})",
        "device hours": f"{found['device_hours']:,}, {found['hours']:,} h at this layout",
    }


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.4g} GFLOP"
