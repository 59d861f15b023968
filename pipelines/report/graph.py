"""The lineage as a graph: what was made from what, with hashes; drawn by lineage.html.jinja. No torch."""

from pathlib import Path
from typing import Any

from pipelines.report.record import RunRecord, digest, input_digests

ROW, LEFT = 46, 26  # units of the drawing: between rows; from an arc's dots to the widest arc, per row that it passes
MODELS_IN = ("teacher", "start", "student", "model", "teacher_run", "pruning", "distillation")  # else data


def draw(record: RunRecord) -> dict[str, Any] | None:
    """{"nodes": [{"name", "hash", "note", "given", "y"}], "arcs": [{"path", "model", "stale", "words"}], "width",
    "height", "dots" (x of the nodes' dots), "words" (the whole for who cannot see it)}; None where nothing ran.

    A node's hash is of what others read from it. An arc is stale where its reader has read another hash: what was made
    since then does not fit together.
    """
    ran = {stage: manifest for stage, manifest in record.every_manifest().items() if manifest}
    if not ran:
        return None
    places = {stage: str(record.directory / stage) for stage in ran}
    own = {stage: _own_hash(manifest) for stage, manifest in ran.items()}
    edges, outside, read = [], {}, {}
    for stage, manifest in ran.items():
        for name, entry in input_digests(manifest.get("inputs")).items():
            others = {other: place for other, place in places.items() if other != stage}
            # A run that was moved or copied is told by what its stages made.
            maker = _maker(entry["path"], others) or next((o for o in others if own[o] == entry["sha256"]), None)
            source = maker or _outside(name.partition("[")[0], Path(entry["path"]))
            if maker is None:
                outside[source] = entry["sha256"]
            read.setdefault(source, entry["sha256"])
            edges.append((source, stage, name, entry["sha256"]))
    order = [*outside, *ran]
    hashes = {node: own[node] if node in ran else outside[node] for node in order}
    hashes = {node: found or read.get(node, "") for node, found in hashes.items()}
    rows = {node: number for number, node in enumerate(order)}
    arcs, widest = _arcs(edges, rows, hashes)
    nodes = [
        {"name": node, "hash": hashes[node][:12], "note": _note(ran.get(node)), "given": node not in ran,
         "y": ROW * rows[node] + ROW / 2}
        for node in order
    ]  # fmt: skip
    words = "; ".join(f"{stage} from {', '.join(dict.fromkeys(e[0] for e in edges if e[1] == stage))}"
                      for stage in ran if any(e[1] == stage for e in edges))  # fmt: skip
    width = widest + 20
    for arc in arcs:
        arc["path"] = arc["path"](width)
    return {
        "nodes": nodes,
        "arcs": arcs,
        "dots": width,
        "width": width + 470,
        "height": ROW * len(order),
        "words": words,
    }


def _maker(path: str, places: dict[str, str]) -> str | None:
    """The stage that a path lies in: the longest that fits."""
    found = [stage for stage, place in places.items() if path == place or path.startswith(f"{place}/")]
    return max(found, key=len, default=None)


def _outside(name: str, path: Path) -> str:
    """What a stage read from elsewhere: "start prune/hf"."""
    place = "/".join(path.parts[-2:]) if path.name == "hf" else path.name
    return name if place == name else f"{name} {place}"


def _own_hash(manifest: dict[str, Any]) -> str:
    """Of the model among a stage's outputs, else of all of them: what the next stage finds when it reads it."""
    outputs = manifest.get("outputs") or {}
    model = {file.removeprefix("hf/"): value for file, value in outputs.items() if file.startswith("hf/")}
    return digest(model or outputs) if outputs else ""


def _arcs(
    edges: list[tuple[str, str, str, str]], rows: dict[str, int], hashes: dict[str, str]
) -> tuple[list[dict[str, Any]], float]:
    arcs, widest, seen = [], 0.0, set()
    for source, reader, name, sha in edges:
        if (source, reader) in seen:
            continue
        seen.add((source, reader))
        start, end = ROW * rows[source] + ROW / 2, ROW * rows[reader] + ROW / 2
        depth = 0.0 if rows[reader] - rows[source] == 1 else 10.0 + LEFT * (rows[reader] - rows[source] - 1) ** 0.75
        widest = max(widest, depth)
        arcs.append(
            {
                "path": lambda x, a=start, b=end, d=depth: _path(x, a, b, d),
                "model": name.partition("[")[0] in MODELS_IN,
                "stale": bool(hashes[source]) and hashes[source] != sha and source in rows and _comparable(name),
                "words": f"{reader} read {source}: {sha[:12]}",
            }
        )
    return arcs, widest


def _comparable(name: str) -> bool:
    """Whether an input is the whole of what its maker made for others: not one file of it, nor its whole directory."""
    return name in ("corpus", "teacher", "start", "student")


def _path(x: float, start: float, end: float, depth: float) -> str:
    if not depth:
        return f"M{x:.0f} {start + 6:.0f}V{end - 8:.0f}"
    # A cubic reaches three quarters of the way to its controls.
    out = x - 6 - depth * 4 / 3
    return f"M{x - 6:.0f} {start:.0f}C{out:.0f} {start:.0f} {out:.0f} {end:.0f} {x - 8:.0f} {end:.0f}"


def _note(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "given"
    words = [f"seed {manifest['seed']}"] if manifest.get("seed") is not None else []
    commit, _, dirty = (manifest.get("git") or "").partition("-")
    words += [f"code {commit[:12]}{'-' + dirty if dirty else ''}"] if commit else []
    return ", ".join(words)
