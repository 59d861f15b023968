"""The student's shape against the teacher's, the multiples that are asked for, and what is protected."""

from collections.abc import Iterator
from math import lcm

from pipelines import protection
from pipelines.choices import DepthMethod
from pipelines.config import Config, Layout, expect
from pipelines.families import ModelShape
from pipelines.prune_settings import PRUNED_SIZES


def check_target(config: Config, ranks: Layout, teacher: ModelShape, student: ModelShape) -> None:
    """The target of pruning. Raises UserError where it does not fit the teacher or contradicts itself."""
    for name in PRUNED_SIZES:
        large, small = getattr(teacher, name), getattr(student, name)
        expect(
            small <= large,
            f"student.{name}",
            f"at most the teacher's {large}",
            small,
            "Lower it, or set student=custom for a target of your own.",
        )
    layers, dropped = teacher.num_hidden_layers, config.student.drop_layers or []
    for number in dropped:
        expect(1 <= number <= layers, "student.drop_layers", f"layers from 1 to {layers}", number, "Count from 1.")
    expect(student.num_hidden_layers >= 1, "student.drop_layers", "at least one layer to stay", "none", "Drop fewer.")
    once = len(set(dropped)) == len(dropped)
    expect(once, "student.drop_layers", "each layer once", dropped, "Remove the repetition.")
    _check_heads(teacher, student)
    names_layers = config.prune.depth_method is not DepthMethod.layers or bool(dropped)
    expect(
        names_layers or student.num_hidden_layers == layers,
        "student.drop_layers",
        f"the {layers - student.num_hidden_layers} layers to drop with prune.depth_method=layers",
        "none",
        "Name them, counted from 1, or set prune.depth_method=block_influence.",
    )
    for name, multiple, why in steps(config, ranks, teacher, student):
        size = getattr(student, name)
        expected = f"a multiple of {multiple} ({why})"
        allowed = nearest(size, multiple, getattr(teacher, name))
        expect(size % multiple == 0, f"student.{name}", expected, size, f"Take {allowed}.")
    protection.check(config.prune.protect, teacher, student, dropped)


def _check_heads(teacher: ModelShape, student: ModelShape) -> None:
    groups, heads = student.num_key_value_heads, student.num_attention_heads
    most = teacher.num_attention_heads // teacher.num_key_value_heads
    expect(
        heads % groups == 0 and heads <= most * groups,
        "student.num_attention_heads",
        f"a multiple of the {groups} KV groups, at most the teacher's {most} for each",
        heads,
        f"Take {nearest(heads, groups, most * groups)}: each group loses the same number of heads.",
    )


def steps(config: Config, ranks: Layout, teacher: ModelShape, student: ModelShape) -> Iterator[tuple[str, int, str]]:
    """(size of the student, what it must be a multiple of, why): prune.multiples, its KV groups, and the layout where
    the teacher's size divides by it (layouts.py has the word where not)."""
    for name, asked in vars(config.prune.multiples).items():
        parts = {f"prune.multiples.{name}={asked}": asked}
        if name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
            parts[f"parallel.tensor={ranks.tensor}"] = ranks.tensor
        if name == "num_hidden_layers":
            parts[f"parallel.pipeline={ranks.pipeline}"] = ranks.pipeline
        parts = {
            why: part for why, part in parts.items() if "parallel" not in why or getattr(teacher, name) % part == 0
        }
        if name == "num_attention_heads":
            parts[f"{student.num_key_value_heads} KV groups"] = student.num_key_value_heads
        yield name, lcm(*parts.values()), " and ".join(why for why, part in parts.items() if part > 1)


def nearest(size: int, multiple: int, most: int) -> str:
    """The multiples next to a size, up to `most`, in words."""
    below, above = min(size // multiple, most // multiple) * multiple, -(-size // multiple) * multiple
    return " or ".join(str(value) for value in sorted({below, above}) if 0 < value <= most) or f"{multiple}"


def check_given_student(config: Config, teacher: ModelShape, student: ModelShape) -> None:
    """A model that somebody else pruned may have any shape, but must have the teacher's vocabulary."""
    expect(
        student.vocab_size == teacher.vocab_size,
        "student.path",
        f"a model with the teacher's vocabulary of {teacher.vocab_size}",
        f"{student.vocab_size} in {config.student.path}",
        "Distillation compares the same ids: take a student pruned from this teacher.",
    )
