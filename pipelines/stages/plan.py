"""The plan of an experiment: parameters, tokens, FLOPs, bytes per device, as a table or as JSON. Imports no torch.

Where the student's shape is searched for, the plan is that of the largest candidate: the most that it can cost. Of a
run in steps each is planned by itself, with the sums behind them.
"""

import json
from typing import Any

from pipelines import artifacts, capacity, gpus, grid, iteration, planning
from pipelines.config import Config, Format, Layout, layout, searches
from pipelines.families import ModelShape
from pipelines.prune_costs import forward_flops, prune_cost
from pipelines.speeds import pass_tokens, speeds

SHOWN = 8  # candidates


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config = context.config
    figures = steps_plan(config) if config.iterate.students else plan(config)
    print(json.dumps(figures, indent=2) if config.format is Format.json else as_text(figures))
    return figures


def steps_plan(config: Config) -> dict[str, Any]:
    """{"experiment", "teaches": who, "steps": `plan` of each, "sum": tokens, FLOPs, hours, minutes of pruning}."""
    models, steps = iteration.shapes(config), []
    for number in range(1, len(models)):
        pruning = plan(iteration.pruning_view(config, number, models[number - 1]))
        distillation = plan(iteration.distillation_view(config, number, models))
        steps.append(pruning | distillation | {"pruning": pruning["pruning"]})
    total = {name: sum(step[name] for step in steps) for name in ("tokens", "flops")}
    total |= {name: round(sum(step["prediction"][name] for step in steps), 2) for name in ("device_hours", "hours")}
    total["pruning_minutes"] = round(sum(step["pruning"]["minutes"] for step in steps), 2)
    return {"experiment": config.run.name, "teaches": config.iterate.teacher.value, "steps": steps, "sum": total}


def plan(config: Config) -> dict[str, Any]:
    """planning.plan's figures, and `pruning` (prune_costs.py) unless the student is given; with `search` where
    prune.target is set, `capacity` where the student is far below."""
    teacher, ranks = planning.teacher_shape(config), layout(config.parallel)
    student, found = _search(config, ranks, teacher) if searches(config) else (planning.student_shape(config), {})
    if far := capacity.advice(config, ranks, teacher, student):
        found["capacity"] = far
    if not config.student.path:
        found["pruning"] = prune_cost(config, teacher, student, ranks)
    return planning.plan(config, student) | found


def _search(config: Config, ranks: Layout, teacher: ModelShape) -> tuple[ModelShape, dict[str, Any]]:
    """(the largest candidate, limits and candidates)."""
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


def as_text(figures: dict[str, Any]) -> str:
    if "steps" in figures and "sum" in figures:
        total, plans = figures["sum"], [as_text(step) for step in figures["steps"]]
        return "\n\n".join(plans) + (
            f"\n\n{figures['experiment']}: {len(plans)} steps, the {figures['teaches']} model teaches: "
            f"{total['tokens']:,} tokens, {total['flops']:.3g} FLOPs, {total['device_hours']:,} device hours, "
            f"{total['hours']:,} h at this layout, and {total['pruning_minutes']:,} min of pruning"
        )
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
    rows |= _pruning(figures["pruning"]) if "pruning" in figures else {}
    if "capacity" in figures:
        rows["capacity"] = capacity.in_words(figures["capacity"])
    text = "\n".join(lines + [f"{name:<34}{value}" for name, value in rows.items()])
    return "\n".join([text, "", *_found(figures["search"])]) if "search" in figures else text


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
    seconds = flops / (planning.SHARE_OF_PEAK * peak * ranks.processes)
    return {"passes": passes, "flops": flops, "minutes": round(seconds / 60, 2)}


def _found(search: dict[str, Any]) -> list[str]:
    bounds = {
        "parameters": "at most {:,.0f} parameters",
        "bytes_per_gpu": "at most {:,.0f} bytes of bf16 weights per GPU",
        "seconds": "at most {:.3g} s for a forward pass",
        "tokens_per_second": "at least {:,.0f} tokens/s",
    }
    limits = ", ".join(bounds[name].format(value) for name, value in search["limits"].items())
    follow = f"distilled on {search['distil_tokens']:,.0f} tokens" if search["distil_tokens"] else "compared again"
    lines = [
        f"the student is searched for: {limits}",
        f"{search['candidates']:,} candidates; {search['measured']} are measured, {search['followed']} {follow}. "
        "The figures above are the largest one's",
        *(f"  {axis.replace('_', ' '):<22}{', '.join(map(str, values))}" for axis, values in search["values"].items()),
        f"the search takes about {search['minutes']:,} min: {search['passes']} passes over the calibration sequences"
        + (f" and {search['followed']} distillations" if search["distil_tokens"] else "")
        + f", {search['flops']:.3g} FLOPs",
        f"the largest; speeds {search['speeds']}:",
    ]
    for entry in search["largest"]:
        speed = f"{entry['tokens_per_second']:>14,.0f} tokens/s" if entry["tokens_per_second"] else ""
        lines.append(
            f"  {entry['name']:<28}{entry['parameters']:>16,} parameters  {entry['share']:>6.1%}  "
            f"{entry['bytes_per_gpu'] / 2**30:>9.3f} GiB{speed}"
        )
    return lines


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


def _pruning(found: dict[str, Any]) -> dict[str, str]:
    parts, files = found["seconds"], ("reading", "cutting", "hashing")
    passes = [
        f"{entry['what']} {parts[entry['what']]:,.1f} s ({entry['passes']} of {entry['tokens']:,} tokens)"
        for entry in found["passes"]
    ]
    missing = f", without {' and '.join(found['not_counted'])}" if found["not_counted"] else ""
    return {
        "pruning": f"{found['minutes']:,} min at this layout{missing}",
        "  passes over calibration data": f"{', '.join(passes) or 'none'}  ({found['flops']:.3g} FLOPs)",
        "  files": ", ".join(f"{name} {parts[name]:,.1f} s" for name in files)
        + f"  (read at {found['read_bytes_per_second'] / 1e9:g} GB/s, an assumption; cut at "
        f"{found['cut_bytes_per_second'] / 1e9:g} GB/s, one core)",
    }


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.4g} GFLOP"
