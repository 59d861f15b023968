"""An experiment's models built at true size before anything is started: what every rank would hold and read against
what device_memory.py says of it. Imports no torch; model/hollow.py, which builds, runs in a process of its own.

Checked are, on every rank that holds something of its own: that both models and their pair can be built at the layout,
the number of values of each of Megatron's parameters, what is trained, the bytes of weights and gradients of the
fullest rank, and that the ranks together read every index of every tensor of the safetensors index once.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines import artifacts, device_memory, planning, processes
from pipelines.config import Config, DistilConfig, Layout, TeacherPrecision, UserError, teacher_precision
from pipelines.families import EMBEDDING, HEAD, LAYER, ModelShape
from pipelines.signals import FeatureLoss

NEEDED = ("torch", "megatron", "safetensors")  # by what builds, and by nothing else of a plan
SHOWN = 12  # mismatches in the message


def run(config: Config, teacher: ModelShape, student: ModelShape, ranks: Layout) -> dict[str, Any]:
    """{"processes", "seconds", "weights": where the headers come from, by model, "ranks": what each holds, "largest":
    bytes by kind, "mismatches": [one line each]}. Raises UserError where torch or Megatron-Core is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"plan.dry_run: expected {', '.join(NEEDED)} to build models with, found no {', '.join(missing)}. Install "
            "them, or leave plan.dry_run out: everything else of the plan needs none."
        )
    started, training, shapes = time.monotonic(), config.distil, {"teacher": teacher, "student": student}
    losses = planning.feature_losses_of(training, teacher, student)
    directories = {"teacher": weights_in(config.model.path), "student": weights_in(config.student.path)}
    request = {
        "shapes": {who: asdict(shape) for who, shape in shapes.items()},
        "directories": directories,
        "precisions": {
            # FP8 is Transformer Engine's; shapes and names are those of bf16.
            "teacher": "fp32" if teacher_precision(training) is TeacherPrecision.fp32 else "bf16",
            "student": training.precision.value,
        },
        "ranks": asdict(ranks),
        "recompute": training.recompute,
        "sequence_length": training.sequence_length,
        "losses": [asdict(loss) for loss in losses],
    }
    built = _build(request)
    largest = largest_bytes(built, training)
    return {
        "processes": ranks.processes,
        "seconds": round(time.monotonic() - started, 1),
        "weights": {who: f"headers in {path}" if path else "generated index" for who, path in directories.items()},
        "ranks": [_described(rank, ranks) for rank in built],
        "largest": largest,
        "mismatches": list(mismatches(built, shapes, ranks, training, losses)),
    }


def weights_in(path: str | None) -> str | None:
    """The directory, where it holds weights whose headers can be read."""
    if path and artifacts.is_hugging_face(path) and next(Path(path).glob("*.safetensors"), None):
        return path
    return None


def _build(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What model/hollow.py finds, in a child that ends with this process."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.model.hollow"],
        input=json.dumps(request),
        env=processes.environment_outside_ranks(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=processes.end_with_parent,
    )
    if done.returncode:
        raise RuntimeError(f"the dry run's process ended with {done.returncode}:\n{done.stderr.strip()[-4000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _described(found: dict[str, Any], ranks: Layout) -> dict[str, Any]:
    stage = found["pipeline"]
    place = "only" if ranks.pipeline == 1 else "first" if stage == 0 else "last" if stage == ranks.pipeline - 1 else ""
    described = {name: found[name] for name in ("rank", "tensor", "pipeline")} | {"stage": place or "middle"}
    for who, model in found["models"].items():
        sizes = model.get("parameters", {}).values()
        described |= {f"{who}_parameters": sum(n for n, _ in sizes), f"{who}_bytes": sum(n * b for n, b in sizes)}
    return described | {"trained": sum(found["trained"].values())}


# What a rank must hold, from the family's table


def shard_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> dict[str, int]:
    """{Megatron parameter: values} of one tensor-parallel rank on a pipeline stage, layers numbered from 0 over the
    whole model; rows of padding count."""
    padded = shape.replace(vocab_size=-(-shape.vocab_size // tensor) * tensor)
    per_stage = shape.num_hidden_layers // pipeline
    first, last = stage == 0, stage == pipeline - 1
    found: Counter[str] = Counter()
    for entry in padded.family.tensors:
        size = 1
        for axis in entry.axes:
            size *= padded.axis_size(axis)
        size = size // tensor if entry.parallel_dim is not None else size
        if entry.per_layer:
            for layer in range(stage * per_stage, (stage + 1) * per_stage):
                found[entry.megatron.replace(LAYER, str(layer))] += size
        elif entry.name == HEAD:  # a tied one is the embedding where both are on one stage, else a copy
            if last and not (shape.tie_word_embeddings and first):
                found[entry.megatron] += size
        elif first if entry.name == EMBEDDING else last:
            found[entry.megatron] += size
    return dict(found)


def mismatches(
    built: list[dict[str, Any]],
    shapes: dict[str, ModelShape],
    ranks: Layout,
    training: DistilConfig,
    losses: list[FeatureLoss],
) -> Iterator[str]:
    """One line each, with rank, model and tensor."""
    whole = True
    for found in built:
        for who, shape in shapes.items():
            model = found["models"][who]
            if "error" in model:
                whole = False
                at = f", at tensor {model['tensor']}" if model["tensor"] else ""
                yield f"{_rank(found)}, {who}: expected a model that is built and read, found {model['error']}{at}"
                continue
            expected = shard_parameters(shape, ranks.tensor, ranks.pipeline, found["pipeline"])
            for name in sorted(expected.keys() | model["parameters"].keys()):
                wanted, there = expected.get(name, 0), model["parameters"].get(name, [0, 0])[0]
                if wanted != there:
                    yield f"{_rank(found)}, {who}, {name}: expected {wanted:,} values, found {there:,}"
        if whole:
            yield from _trained(found, shapes, ranks, losses)
    if not whole:
        return
    for who, shape in shapes.items():
        yield from _coverage(built, who, shape, ranks)
    yield from _bytes(built, shapes, ranks, training, losses)


def _rank(found: dict[str, Any]) -> str:
    return f"rank {found['rank']} (tensor {found['tensor']}, pipeline {found['pipeline']})"


def _trained(
    found: dict[str, Any], shapes: dict[str, ModelShape], ranks: Layout, losses: list[FeatureLoss]
) -> Iterator[str]:
    """The pair trains the student and the projections of its own stage, and nothing of the teacher's."""
    student, there = sum(n for n, _ in found["models"]["student"]["parameters"].values()), found["trained"]
    beside = device_memory.projections_by_stage(shapes["teacher"], shapes["student"], ranks.pipeline, losses)
    wanted = student + beside[found["pipeline"]]
    if sum(there.values()) != wanted:
        yield (
            f"{_rank(found)}, pair: expected {wanted:,} trained values, the student's {student:,} with its "
            f"projections, found {sum(there.values()):,}"
        )
    for name in (name for name in there if name.startswith("teacher")):
        yield f"{_rank(found)}, pair, {name}: expected a frozen teacher, found gradients"


def _coverage(built: list[dict[str, Any]], who: str, shape: ModelShape, ranks: Layout) -> Iterator[str]:
    """The ranks of one pipeline stage, and of no second one but for a tied embedding, read each tensor whole."""
    parts: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    tensors, sizes = shape.tensors(), shape.tensor_shapes()
    for found in built:
        for name, cut in found["models"][who]["read"].items():
            parts[name][found["pipeline"]].append(tuple(cut[1:]) if cut else (0, sizes[name][0]))
    for name, entry in tensors.items():
        stages = 2 if name == EMBEDDING and shape.tie_word_embeddings and ranks.pipeline > 1 else 1
        if len(parts[name]) != stages:
            yield f"{who}, {name}: expected {stages} pipeline stage to read it, found {sorted(parts[name])}"
        for stage, pieces in parts[name].items():
            size = sizes[name][entry.parallel_dim or 0]
            if entry.parallel_dim is None:
                good = pieces == [(0, size)] * ranks.tensor
            else:
                ordered = [piece for piece in sorted(pieces) if piece[0] < piece[1]]
                ends = [0, *(stop for _, stop in ordered)]
                good = ends[-1] == size and [start for start, _ in ordered] == ends[:-1]
            if not good:
                yield (
                    f"pipeline stage {stage}, {who}, {name}: expected its {ranks.tensor} ranks to read 0 to {size} "
                    f"{'all alike' if entry.parallel_dim is None else 'without gap or overlap'}, found {pieces}"
                )


def largest_bytes(built: list[dict[str, Any]], training: DistilConfig) -> dict[str, int]:
    """Of the rank that holds most of each kind."""
    fp8 = teacher_precision(training) is TeacherPrecision.fp8
    gradient = 4
    kinds: dict[str, list[int]] = {"teacher_weights": [0], "student_weights": [0], "trained_gradients": [0]}
    for found in built:
        for who in ("teacher", "student"):
            sizes = found["models"][who].get("parameters", {})
            matrices = {
                name for name in sizes if name.startswith("decoder.layers.") and not name.endswith("norm_weight")
            }
            kinds[f"{who}_weights"].append(
                sum(n * (1 if fp8 and who == "teacher" and name in matrices else b) for name, (n, b) in sizes.items())
            )
        kinds["trained_gradients"].append(gradient * sum(found["trained"].values()))
    return {name: max(sizes) for name, sizes in kinds.items()}


def _bytes(
    built: list[dict[str, Any]],
    shapes: dict[str, ModelShape],
    ranks: Layout,
    training: DistilConfig,
    losses: list[FeatureLoss],
) -> Iterator[str]:
    """The fullest rank's against the plan's. An offloaded teacher is on the device whole while it is loaded."""
    resident = replace(training, teacher_offload=False)
    planned = device_memory.bytes_per_device(shapes["teacher"], shapes["student"], ranks, resident, losses)
    trained = device_memory.parameters_per_device(shapes["student"], ranks.tensor, ranks.pipeline)
    beside = device_memory.projections_by_stage(shapes["teacher"], shapes["student"], ranks.pipeline, losses)
    found = largest_bytes(built, training)
    for kind in ("teacher_weights", "student_weights"):
        if planned[kind] != found[kind]:
            yield f"fullest rank, {kind}: planned {planned[kind]:,} bytes, found {found[kind]:,}"
    low, high = 4 * trained, 4 * (trained + max(beside))
    if not low <= found["trained_gradients"] <= high:
        yield f"fullest rank, gradients: planned {low:,} to {high:,} bytes, found {found['trained_gradients']:,}"


def as_text(found: dict[str, Any]) -> list[str]:
    """Lines for the plan's table."""
    largest, held = found["largest"], found["ranks"]
    places = [f"{entry['stage']} stage" for entry in held if entry["tensor"] == 0]
    lines = [
        f"dry run: teacher, student and their pair built on the meta device as each of {len(held)} distinct ranks of "
        f"{found['processes']:,} ({', '.join(dict.fromkeys(places))}), in {found['seconds']} s",
        *(f"  {who:<8} {source}" for who, source in found["weights"].items()),
        *(
            f"  {name.replace('_', ' '):<30}{size / 2**30:,.3f} GiB on the fullest rank"
            for name, size in largest.items()
        ),
    ]
    if found["mismatches"]:
        return [*lines, f"  {len(found['mismatches'])} mismatches"]
    return [
        *lines,
        "  divisibility, parameters, what is trained, bytes of weights and gradients, and what each rank reads of the "
        "index agree with the plan",
    ]


def refuse_mismatches(found: dict[str, Any]) -> None:
    """Raises UserError with each of them."""
    wrong = found["mismatches"]
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise UserError(
            f"plan.dry_run: expected what is built to be what is planned, found {len(wrong)} mismatches:\n  "
            + "\n  ".join([*wrong[:SHOWN], *more])
            + "\nThe settings cannot run as they are: change the layout or the shapes that are named."
        )
