"""The plan of an experiment as a table to read. Imports no torch."""

from typing import Any

from pipelines import capacity, dry_run, layout_table


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
            rows["  " + name.replace("_", " ")] = f"{_gib(size)}{_more(figures, name)}"
    rows |= _communication(figures) | _disk(figures["disk"])
    if "teacher_training" in figures:
        found = figures["teacher_training"]
        rows["teacher before it"] = (
            f"{found['mode']} on {found['tokens']:,} tokens: {found['flops']:.3g} FLOPs, {found['device_hours']:,} "
            f"device hours, {found['hours']:,} h at this layout; {_gib(found['bytes_per_device']['total'])} per device"
        )
    rows |= _pruning(figures["pruning"]) if "pruning" in figures else {}
    if "capacity" in figures:
        rows["capacity"] = capacity.in_words(figures["capacity"])
    text = "\n".join(lines + [f"{name:<34}{value}" for name, value in rows.items()])
    if "layouts" in figures:
        text = "\n".join([text, "", *layout_table.as_text(figures["layouts"])])
    if "dry_run" in figures:
        text = "\n".join([text, "", *dry_run.as_text(figures["dry_run"])])
    for task in figures.get("tasks", []):
        kind = f"{task['kind']} of {task['tasks']}" if task["kind"] == "group" else task["kind"]
        shots = "its own" if task["shots"] is None else task["shots"]
        text += f"\n  task {task['task']:<21}{kind}, examples {shots}, data {', '.join(task['data'])}"
    return "\n".join([text, "", *_found(figures["search"])]) if "search" in figures else text


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


def _more(figures: dict[str, Any], name: str) -> str:
    """What stands behind the bytes of a kind."""
    found = figures["activations"]
    if name == "activations":
        return f"  (without recompute {_gib(found['without_recompute'])}, with it {_gib(found['with_recompute'])})"
    if name == "loss":
        chunk = found["heads_chunk"]
        return f"  ({_gib(chunk['bytes'])} of it logits, of {chunk['tokens']:,} tokens at a time)"
    return ""


def _communication(figures: dict[str, Any]) -> dict[str, str]:
    found = figures["communication"]
    total = sum(found["bytes_per_device"].values())
    rows = {"communication per step": f"{total / 1e9:,.4g} GB that a device sends" if total else "none"}
    sums: dict[str, dict[str, int]] = {}
    for part in found["transfers"]:
        kinds = sums.setdefault(f"  {part['group']}, {part['ranks']} ranks", {})
        kinds[part["kind"]] = kinds.get(part["kind"], 0) + part["bytes"]
    for name, kinds in sums.items():
        rows[name] = ", ".join(f"{kind} {size / 1e9:,.4g} GB" for kind, size in kinds.items())
    return rows


def _disk(found: dict[str, Any]) -> dict[str, str]:
    tokens = f"{found['corpus_tokens']:,} tokens" + ("" if found["corpus_is_counted"] else ", each read once")
    models = ", ".join(f"{name} {size / 1e9:,.3g}" for name, size in found["models"].items() if size)
    host = f"{found['host_peak'] / 1e9:,.4g} GB per process at a save"
    if found["host_held"]:
        host += f", {found['host_held'] / 1e9:,.4g} GB while its files are written (save_asynchronous)"
    return {
        "disk for the run": f"{found['total'] / 1e9:,.4g} GB at the most at a time",
        "  a checkpoint": f"{found['checkpoint'] / 1e9:,.4g} GB; {found['checkpoints'] / 1e9:,.4g} GB of those that "
        "are kept, with the one being written",
        "  host memory": host,
        "  models": f"{models} GB",
        "  corpus": f"{found['corpus'] / 1e9:,.4g} GB ({tokens}), beside its text",
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f} GiB"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.4g} GFLOP"
