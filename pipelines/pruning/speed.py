"""Seconds of a forward pass by width, measured on this machine at this layout: a table for pipelines/speeds.py.

Of each width a model of one layer on every pipeline stage and one of two, with random weights, are timed in turns. With
t1 and t2 of them, outer = 2 t1 - t2 and, per layer, (t2 - outer) / 2 over the stages. The clock's noise may give an
outer part below 0 or above t1, which it cannot be: it is held within.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from pipelines import console, files, speeds
from pipelines.config import Config, Layout
from pipelines.families import ModelShape
from pipelines.model import parallel, quality
from pipelines.model.build import build_model
from pipelines.model.measure import device_name
from pipelines.speeds import WIDTH, Width, width_of

SECONDS = 0.3  # of passes per model


def measure(config: Config, ranks: Layout, teacher: ModelShape, shapes: Iterable[ModelShape], path: Path) -> None:
    """Add the widths of these shapes to the table in `path`, those it lacks; a table of something else is replaced.

    Written whole after each width. Every rank calls it, at the layout without context parallelism. Collectives: those
    of the passes, a barrier and an all-reduce per pass, and a barrier per width.
    """
    head = speeds.table_head(config, ranks, teacher) | {"machine": device_name(parallel.torch_device(ranks.device))}

    def held() -> list[dict[str, Any]]:
        content = files.read_object(path, "Remove it.") if path.is_file() else {}
        same = {name: content.get(name) for name in head} == head
        return content.get("rows", []) if same else []

    rows: list[dict[str, Any]] = parallel.on_first_rank(held)
    known = {tuple(row[name] for name in WIDTH) for row in rows}
    wanted: dict[Width, ModelShape] = {width_of(shape): shape for shape in shapes}
    missing = [shape for width, shape in wanted.items() if width not in known]
    if not missing:
        return
    with console.progress("search  speed", len(missing), "widths") as bar:
        for shape in missing:
            outer, layer = _parts(config, ranks, shape)
            rows.append(
                dict(zip(WIDTH, width_of(shape), strict=True)) | {"outer_seconds": outer, "layer_seconds": layer}
            )
            parallel.on_first_rank(lambda: files.write_json(path, head | {"rows": rows}))
            bar.advance(1, detail=f"{layer:.3g} s per layer, {outer:.3g} s beside them")


def _parts(config: Config, ranks: Layout, shape: ModelShape) -> tuple[float, float]:
    """(outer, layer) seconds, the same on every rank."""
    length, rows = config.prune.sequence_length, config.prune.search.sequences
    models = {str(count): _random(config, ranks, shape, count * ranks.pipeline) for count in (1, 2)}
    tokens = torch.arange(rows * length).view(rows, length) % shape.vocab_size
    batch = {"tokens": tokens, "position_ids": torch.arange(length).expand_as(tokens)}
    found = quality.pass_seconds(models, [batch], seconds=SECONDS)
    one, two = found["1"], found["2"]
    outer = min(max(0.0, 2 * one - two), one, two)
    return outer, (two - outer) / 2 / ranks.pipeline


def _random(config: Config, ranks: Layout, shape: ModelShape, layers: int) -> GPTModel:
    model = build_model(
        shape.replace(num_hidden_layers=layers),
        sequence_parallel=ranks.sequence_parallel,
        precision=config.prune.precision.value,
        sequence_length=config.prune.sequence_length,
    )
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    return model
