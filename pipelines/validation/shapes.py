"""The student's shape against the teacher's."""

from pipelines.choices import DepthMethod
from pipelines.config import Config, expect
from pipelines.families import ModelShape


def check_target(config: Config, teacher: ModelShape, student: ModelShape) -> None:
    """The target of pruning. Raises UserError where it does not fit the teacher or contradicts itself."""
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
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
    groups = teacher.num_key_value_heads
    expect(
        student.num_attention_heads % groups == 0,
        "student.num_attention_heads",
        f"a multiple of the {groups} KV groups",
        student.num_attention_heads,
        "Each group loses the same number of heads.",
    )
    names_layers = config.prune.depth_method is not DepthMethod.layers or bool(dropped)
    expect(
        names_layers or student.num_hidden_layers == layers,
        "student.drop_layers",
        f"the {layers - student.num_hidden_layers} layers to drop with prune.depth_method=layers",
        "none",
        "Name them, counted from 1, or set prune.depth_method=block_influence.",
    )


def check_given_student(config: Config, teacher: ModelShape, student: ModelShape) -> None:
    """A model that somebody else pruned may have any shape, but must have the teacher's vocabulary."""
    expect(
        student.vocab_size == teacher.vocab_size,
        "student.path",
        f"a model with the teacher's vocabulary of {teacher.vocab_size}",
        f"{student.vocab_size} in {config.student.path}",
        "Distillation compares the same ids: take a student pruned from this teacher.",
    )
