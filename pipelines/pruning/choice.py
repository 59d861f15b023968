"""From scores and a target shape to what stays of the teacher."""

from collections.abc import Sequence

from pipelines import planning, protection
from pipelines.choices import DepthMethod
from pipelines.config import Config, UserError
from pipelines.core.importance import Scores
from pipelines.core.selection import Kept, check_heads, check_layers, check_target, select
from pipelines.families import ModelShape
from pipelines.prune_settings import ProtectConfig


def choose(
    scores: Scores | None,
    teacher: ModelShape,
    target: ModelShape,
    *,
    drop_layers: Sequence[int] | None = None,
    protect: ProtectConfig | None = None,
) -> Kept:
    """What stays for a student of the target's shape. scores may be None where nothing has to be ranked.

    drop_layers: the layers that go, from 1; None: those that score lowest.
    """
    return select(
        scores,
        hidden_size=teacher.hidden_size,
        ffn_size=teacher.intermediate_size,
        heads=teacher.num_attention_heads,
        groups=teacher.num_key_value_heads,
        layers=teacher.num_hidden_layers,
        keep_hidden=target.hidden_size,
        keep_ffn=target.intermediate_size,
        keep_heads=target.num_attention_heads,
        keep_groups=target.num_key_value_heads,
        keep_layers=target.num_hidden_layers,
        drop_layers=drop_layers,
        protected=protection.protected(protect) if protect else protection.NOTHING,
    )


def checked_target(config: Config, teacher: ModelShape) -> ModelShape:
    """The student's shape. Raises UserError where the settings do not fit the teacher or contradict themselves."""
    student, method, layers = config.student, config.prune.depth_method, teacher.num_hidden_layers
    check_layers(layers, keep=student.num_hidden_layers, drop=student.drop_layers)
    target = planning.target_shape(teacher, student)
    for name in ("hidden_size", "intermediate_size"):
        check_target(f"student.{name}", getattr(target, name), getattr(teacher, name))
    kept_groups = target.num_key_value_heads
    check_heads(target.num_attention_heads, teacher.num_attention_heads, teacher.num_key_value_heads, kept_groups)
    if method is DepthMethod.layers and not student.drop_layers and target.num_hidden_layers < layers:
        raise UserError(
            f"prune.depth_method=layers: expected student.drop_layers with {layers - target.num_hidden_layers} "
            f"layers, counted from 1, to reach student.num_hidden_layers={student.num_hidden_layers}, found none. "
            "Name the layers, or set prune.depth_method=block_influence."
        )
    protection.check(config.prune.protect, teacher, target, student.drop_layers or ())
    return target
