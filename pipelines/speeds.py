"""How long a forward pass of a shape takes: modelled from a GPU's data sheet, or looked up in a table that was measured
(pruning/speed.py). Imports no torch.

A pass is that of prune.search.sequences sequences of prune.sequence_length tokens through one replica of the model at
the layout, embedding and head included, as one micro batch: tensor parallelism shortens it, pipeline parallelism does
not. Both ways give seconds = outer + layers * layer, with the same two numbers for every model of a width (all sizes
but layers).

Modelled: of the products of a layer, and of the head, the greater of FLOPs / (SHARE_OF_PEAK * bf16 peak) and bytes of
bf16 weights / bandwidth. No communication, no launch of kernels: a lower bound for small models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import Config, Layout, UserError, expect
from pipelines.families import ModelShape
from pipelines.files import read_object
from pipelines.gpus import BANDWIDTHS, named_gpu, peak_flops
from pipelines.planning import SHARE_OF_PEAK, attention_flops, matrix_parameters

MODELLED, MEASURED = "modelled", "measured"

Width = tuple[int, int, int, int]  # hidden size, ffn neurons, heads, KV groups
WIDTH = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def width_of(shape: ModelShape) -> Width:
    return shape.hidden_size, shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads


@dataclass(frozen=True)
class Speeds:
    """source: where the numbers come from, in words. parts: {width: (outer, layer)}, seconds, of a table; or
    `modelled`, which tells them of any width."""

    source: str
    parts: Mapping[Width, tuple[float, float]]
    modelled: "Device | None" = None

    def seconds(self, shape: ModelShape) -> float:
        """Raises UserError for a width that the table does not have."""
        if self.modelled is not None:
            outer, layer = self.modelled.parts(shape)
        else:
            width = width_of(shape)
            sizes = ", ".join(f"{name}={size}" for name, size in zip(WIDTH, width, strict=True))
            remedy = "Measure it too (prune.search.speed=measured), or narrow the grid to the table's sizes."
            expect(width in self.parts, self.source, f"a row of {sizes}", "none", remedy)
            outer, layer = self.parts[width]
        return outer + shape.num_hidden_layers * layer


@dataclass(frozen=True)
class Device:
    """A kind of GPU at a layout, with the tokens of a pass."""

    peak: float  # FLOP/s, bf16
    bandwidth: float  # bytes/s
    tensor: int
    tokens: int
    sequence_length: int

    def parts(self, shape: ModelShape) -> tuple[float, float]:
        one = shape.replace(num_hidden_layers=1)
        head = shape.vocab_size * shape.hidden_size
        layer = matrix_parameters(one) - head
        return self._seconds(2 * head, head), self._seconds(
            2 * layer + attention_flops(one, self.sequence_length), layer
        )

    def _seconds(self, flops_per_token: int, weights: int) -> float:
        """Of one piece of the model, its weights read once."""
        compute = self.tokens * flops_per_token / (SHARE_OF_PEAK * self.peak)
        return max(compute, 2 * weights / self.bandwidth) / self.tensor


def pass_tokens(config: Config) -> int:
    return config.prune.search.sequences * config.prune.sequence_length


def speeds(config: Config, ranks: Layout, teacher: ModelShape, measured: Path | None = None) -> Speeds | None:
    """By prune.search.speed; None for speeds that are yet to be measured, and where plan.gpu is no GPU that is known.

    measured: the table's file of speed=measured, once it is written. Raises UserError for a table of something else.
    """
    wanted = config.prune.search.speed
    if wanted == MODELLED:
        name = named_gpu(config.plan.gpu)
        if name is None:
            return None
        peak = peak_flops(name)
        assert peak is not None
        tokens, length = pass_tokens(config), config.prune.sequence_length
        device = Device(peak, BANDWIDTHS[name], ranks.tensor, tokens, length)
        return Speeds(f"modelled for {name} in bf16", {}, device)
    path = measured if wanted == MEASURED else Path(wanted)
    return None if path is None else read_table(path, table_head(config, ranks, teacher))


def table_head(config: Config, ranks: Layout, teacher: ModelShape) -> dict[str, Any]:
    """What a table must have been measured with; it also names its machine."""
    return {
        "layout": {"tensor": ranks.tensor, "pipeline": ranks.pipeline, "device": ranks.device},
        "sequences": config.prune.search.sequences,
        "sequence_length": config.prune.sequence_length,
        "precision": config.prune.precision.value,
        "vocab_size": teacher.vocab_size,
        "head_dim": teacher.head_dim,
    }


def read_table(path: Path, head: Mapping[str, Any]) -> Speeds:
    """Raises UserError where there is none, where it is of something else than `head`, or where rows are no numbers."""
    setting = "prune.search.speed"
    expected = f"{MODELLED}, {MEASURED} or a table's file"
    expect(path.is_file(), setting, expected, f"no file {path}", "Check the path.")
    content = read_object(path, "Measure it again.")
    for name, wanted in head.items():
        remedy = "Measure it at this setting: prune.search.speed=measured."
        expect(content.get(name) == wanted, str(path), f"{name} {wanted}", content.get(name), remedy)
    rows: dict[Width, tuple[float, float]] = {}
    held = content.get("rows") or []
    expect(isinstance(held, list), str(path), "a list of rows", held, "Measure it again.")
    for number, row in enumerate(held, start=1):
        try:
            outer, layer = float(row["outer_seconds"]), float(row["layer_seconds"])
            width = (int(row[WIDTH[0]]), int(row[WIDTH[1]]), int(row[WIDTH[2]]), int(row[WIDTH[3]]))
        except (KeyError, TypeError, ValueError):
            names = ", ".join((*WIDTH, "outer_seconds", "layer_seconds"))
            raise UserError(f"{path}: expected rows of {names}, found another as row {number}. Correct it.") from None
        timed = math.isfinite(outer + layer) and min(outer, layer) >= 0 and outer + layer > 0
        seconds = "outer_seconds and layer_seconds of 0 or more, not both 0"
        expect(timed, f"{path}, row {number}", seconds, f"{outer:g} and {layer:g}", "Measure it again.")
        rows[width] = (outer, layer)
    return Speeds(f"measured on {content.get('machine', 'an unnamed machine')}, {path}", rows)
