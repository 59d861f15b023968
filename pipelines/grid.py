"""The student shapes that prune.target allows: a grid over five sizes, and the limits that its points must keep.

Every candidate can be cut out of the teacher and laid out on the ranks: heads are equally many in each KV group and
no more than the teacher's, sizes are multiples of prune.multiples, and the tensor and pipeline degrees divide what they
cut. Imports no torch.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pipelines.choices import DepthMethod
from pipelines.config import Config, Layout, UserError, expect
from pipelines.device_memory import parameters_per_device
from pipelines.families import ModelShape
from pipelines.protection import smallest
from pipelines.prune_settings import PRUNED_SIZES, ProtectConfig
from pipelines.speeds import MEASURED, Speeds, pass_tokens, speeds

STEPS = 16  # of the teacher's size, on an axis without values of its own
MOST = 2_000_000  # points of the grid, which takes some seconds
BF16 = 2  # bytes per weight

Values = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """A shape within the limits. bytes_per_gpu: of bf16 weights on the fullest device. seconds: of a forward pass
    (speeds.py); None where nothing tells it yet."""

    shape: ModelShape
    parameters: int
    bytes_per_gpu: int
    seconds: float | None

    @property
    def name(self) -> str:
        return shape_name(self.shape)

    def tokens_per_second(self, tokens: int) -> float | None:
        """tokens: of a pass."""
        return tokens / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Limits:
    """None: no limit. parameters: at most; bytes_per_gpu: at most; seconds: of a pass, at most."""

    parameters: float | None
    bytes_per_gpu: float | None
    seconds: float | None

    def hold(self, candidate: Candidate) -> bool:
        slow = self.seconds is not None and candidate.seconds is not None and candidate.seconds > self.seconds
        large = self.parameters is not None and candidate.parameters > self.parameters
        heavy = self.bytes_per_gpu is not None and candidate.bytes_per_gpu > self.bytes_per_gpu
        return not (slow or large or heavy)


def shape_name(shape: ModelShape) -> str:
    """h3072-f9216-a32-g8-l32: hidden, ffn, attention heads, KV groups, layers."""
    return (
        f"h{shape.hidden_size}-f{shape.intermediate_size}-a{shape.num_attention_heads}"
        f"-g{shape.num_key_value_heads}-l{shape.num_hidden_layers}"
    )


def limits(config: Config, teacher: ModelShape) -> Limits:
    target = config.prune.target
    sizes = [target.parameters, target.ratio and target.ratio * teacher.parameters()]
    times = [target.seconds, target.tokens_per_second and pass_tokens(config) / target.tokens_per_second]
    return Limits(
        min((size for size in sizes if size is not None), default=None),
        target.bytes_per_gpu,
        min((time for time in times if time is not None), default=None),
    )


# The axes


def unit(config: Config, ranks: Layout, axis: str) -> int:
    """What every value of an axis is a multiple of."""
    needs = {"hidden_size": 1, "num_hidden_layers": ranks.pipeline}
    return math.lcm(getattr(config.prune.multiples, axis), needs.get(axis, ranks.tensor))


def axis_values(config: Config, ranks: Layout, teacher: ModelShape) -> dict[str, tuple[int, ...]]:
    """{axis: its values, ascending}: one where student.* gives the size, else those of prune.search, else steps.

    Raises UserError for values that are not on the grid or not of the teacher, and where no axis has a choice.
    """
    values = {axis: _values(config, ranks, teacher, axis) for axis in PRUNED_SIZES}
    choice = any(len(found) > 1 for found in values.values())
    remedy = "Leave prune.target out, or give fewer sizes: student=custom gives none."
    expect(choice, "prune.target", "a size to search", "one value on every axis", remedy)
    points = math.prod(map(len, values.values()))
    remedy = "Give fewer values in prune.search, or coarser prune.multiples."
    expect(points <= MOST, "prune.search", f"a grid of at most {MOST:,} points", f"{points:,}", remedy)
    return values


def _values(config: Config, ranks: Layout, teacher: ModelShape, axis: str) -> tuple[int, ...]:
    size, step = getattr(teacher, axis), unit(config, ranks, axis)
    fixed, wanted = getattr(config.student, axis), getattr(config.prune.search, axis)
    # Of heads, in one KV group; `widths` counts them in all groups.
    least = max(1, smallest(config.prune.protect, teacher, 1)[axis])
    setting = f"prune.search.{axis}"
    if axis == "num_hidden_layers":
        if config.student.drop_layers:
            fixed = size - len(set(config.student.drop_layers))
        elif config.prune.depth_method is DepthMethod.layers:
            remedy = "Choose another depth_method, which finds the layers to drop."
            expect(not wanted, setting, "none with prune.depth_method=layers", wanted, remedy)
            fixed = fixed or size
    if fixed is not None:
        expect(not wanted, setting, f"none where the student's size is given, {fixed}", wanted, "Give one of the two.")
        wanted, setting = [fixed], f"student.{axis}"
    if not wanted:
        found = _steps(config.prune.search.smallest, size, step, axis)
        return tuple(value for value in found if value >= least) or found[-1:]
    for value in wanted:
        whose = f"sizes from {least}{', what prune.protect needs,' if least > 1 else ''} to the teacher's {size}"
        expect(least <= value <= size, setting, whose, value, "Remove it.")
        why = f"multiples of {step} (prune.multiples.{axis} and the layout)"
        expect(value % step == 0, setting, why, value, f"Take {max(step, value // step * step)}.")
    return tuple(sorted(set(wanted)))


def _steps(smallest: float, size: int, unit: int, axis: str) -> tuple[int, ...]:
    """From the greatest multiple of the unit down in steps of about a STEPS-th of the teacher's size."""
    step, top = max(1, round(size / STEPS / unit)) * unit, size // unit * unit
    found = tuple(sorted(value for value in range(top, 0, -step) if value >= smallest * size))
    remedy = f"Lower it, or prune.search.smallest, or give prune.search.{axis}."
    multiple = f"a multiple from {smallest * size:g} to the teacher's {size}"
    expect(bool(found), f"prune.multiples.{axis}", multiple, f"none of {unit}", remedy)
    return found


# The points


def widths(teacher: ModelShape, values: Values, protect: ProtectConfig) -> Iterator[ModelShape]:
    """The shapes of one layer that every number of layers is combined with."""
    per_group = teacher.num_attention_heads // teacher.num_key_value_heads
    heads = [
        (count, groups)
        for count, groups in product(values["num_attention_heads"], values["num_key_value_heads"])
        if count % groups == 0 and smallest(protect, teacher, 1)["num_attention_heads"] <= count // groups <= per_group
    ]
    for hidden, ffn, (count, groups) in product(values["hidden_size"], values["intermediate_size"], heads):
        sizes = {"num_attention_heads": count, "num_key_value_heads": groups}
        yield teacher.replace(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1, **sizes)


def points(
    config: Config,
    teacher: ModelShape,
    values: Values,
    ranks: Layout,
    known: Speeds | None,
    only: Limits | None = None,
) -> Iterator[Candidate]:
    """Every point of the grid; with `only`, those within its limits."""
    tensor, pipeline = ranks.tensor, ranks.pipeline
    for one in widths(teacher, values, config.prune.protect):
        two = one.replace(num_hidden_layers=2)
        layer = two.parameters() - one.parameters()
        outer = one.parameters() - layer
        stages = [one.replace(num_hidden_layers=count * pipeline) for count in (1, 2)]
        held, more = (parameters_per_device(shape, tensor, pipeline) for shape in stages)
        seconds = [known.seconds(shape) for shape in (one, two)] if known else None
        for layers in values["num_hidden_layers"]:
            found = Candidate(
                one.replace(num_hidden_layers=layers),
                outer + layers * layer,
                BF16 * (held + (layers // pipeline - 1) * (more - held)),
                seconds and seconds[0] + (layers - 1) * (seconds[1] - seconds[0]),
            )
            if only is None or only.hold(found):
                yield found


def candidates(
    config: Config, ranks: Layout, teacher: ModelShape, known: Speeds | None = None
) -> tuple[list[Candidate], Values]:
    """Every candidate within the limits, the largest first (of equal ones the faster), and the axes' values.

    known: speeds; None: as prune.search.speed gives them, and of those that are yet to be measured no limit.
    Raises UserError where the limits leave nothing out, or nothing in.
    """
    values, bounds = axis_values(config, ranks, teacher), limits(config, teacher)
    _check_above(config, teacher, bounds)
    known = known or speeds(config, ranks, teacher)
    if bounds.seconds is not None and known is None and config.prune.search.speed != MEASURED:
        expected = "a GPU whose peak is known, for prune.target.seconds and tokens_per_second"
        raise UserError(
            f"plan.gpu: expected {expected}, found {config.plan.gpu}. Name the nearest one, or measure: "
            "prune.search.speed=measured."
        )
    found = list(points(config, teacher, values, ranks, known, bounds))
    if not found:
        _refuse_empty(config, bounds, list(points(config, teacher, values, ranks, known)))
    return sorted(found, key=lambda c: (-c.parameters, c.seconds or 0.0, c.name)), values


def _check_above(config: Config, teacher: ModelShape, bounds: Limits) -> None:
    whole = teacher.parameters()
    setting = "prune.target." + ("parameters" if config.prune.target.parameters is not None else "ratio")
    below = bounds.parameters is None or bounds.parameters < whole
    found = f"{bounds.parameters:,.0f}" if bounds.parameters is not None else ""
    expect(below, setting, f"fewer parameters than the teacher's {whole:,}", found, "Lower it.")


def _refuse_empty(config: Config, bounds: Limits, every: list[Candidate]) -> None:
    """Name the limit that no point keeps, else that no point keeps them all."""
    where = "prune.target"
    expect(bool(every), "prune.search", "numbers of heads that the KV groups divide", "none", "Add such values.")
    target, remedy = config.prune.target, "Raise it, lower prune.search.smallest, or give smaller prune.search values."
    small = min(every, key=lambda c: c.parameters)
    if bounds.parameters is not None and small.parameters > bounds.parameters:
        name = "parameters" if target.parameters is not None else "ratio"
        expected = f"at least the {small.parameters:,} parameters of the smallest candidate, {small.name}"
        expect(False, f"{where}.{name}", expected, f"{bounds.parameters:,.0f}", remedy)
    light = min(every, key=lambda c: c.bytes_per_gpu)
    if bounds.bytes_per_gpu is not None and light.bytes_per_gpu > bounds.bytes_per_gpu:
        expected = f"at least the {light.bytes_per_gpu:,} bytes of the lightest candidate, {light.name}"
        expect(False, f"{where}.bytes_per_gpu", expected, f"{bounds.bytes_per_gpu:,.0f}", remedy)
    fast = min(every, key=lambda c: c.seconds or 0.0)
    if bounds.seconds is not None and fast.seconds is not None and fast.seconds > bounds.seconds:
        tokens = pass_tokens(config)
        expected = f"at least the {fast.seconds:.3g} s ({tokens / fast.seconds:,.0f} tokens/s) of the fastest candidate"
        name = "seconds" if target.seconds is not None else "tokens_per_second"
        found = f"{bounds.seconds:.3g} s ({tokens / bounds.seconds:,.0f} tokens/s)"
        expect(False, f"{where}.{name}", f"{expected}, {fast.name}", found, "Allow more time, or smaller candidates.")
    expect(False, where, "a candidate that keeps all of its limits", "none", "Relax one of them.")


def described(config: Config, teacher: ModelShape) -> dict[str, Any]:
    """The limits in numbers, for people and programs; those that are not set are left out."""
    bounds = limits(config, teacher)
    found = {name: getattr(bounds, name) for name in ("parameters", "bytes_per_gpu", "seconds")}
    if bounds.seconds is not None:
        found["tokens_per_second"] = pass_tokens(config) / bounds.seconds
    return {name: value for name, value in found.items() if value is not None}
