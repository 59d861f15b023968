"""Arithmetic of shapes: parameters, tokens, FLOPs and bytes of an experiment, before anything is started. No torch.

FLOPs count matrix products, two per multiply-add. Per token: a forward pass costs 2 per weight of a matrix that the
token passes (the embedding is a lookup and costs none), backward twice the forward. Causal attention costs in each
layer 2 * sequence * heads * head_dim forward: two products over sequence keys, half of them masked. Rows count whole:
where documents stand apart attention costs as much less as they are shorter, which only the corpus can tell.

Products of losses on attention and relations are in fp32, at a fraction of the speed of those in bf16.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.artifacts import is_hugging_face
from pipelines.config import (
    Config,
    Device,
    DistilConfig,
    Layout,
    Precision,
    ShapeConfig,
    StudentConfig,
    TeacherMode,
    UserError,
    expect,
    layout,
)
from pipelines.device_memory import bytes_per_device
from pipelines.families import EMBEDDING, FAMILIES, HEAD, ModelShape, check_rope_scaling, read_shape
from pipelines.gpus import peak_flops
from pipelines.nemo_context import is_nemo_checkpoint, read_nemo_shape
from pipelines.prune_settings import PRUNED_SIZES
from pipelines.signals import FeatureLoss, feature_losses, projection_sizes

FORWARD, FORWARD_AND_BACKWARD = 1, 3  # in units of a forward pass
SHARE_OF_PEAK = 0.4  # plan.share_of_peak where no settings are at hand: what a well-tuned run reaches in bf16


def speed_figures(
    tokens_per_second: float, flops_per_token: int, peak: float | None, share_of_peak: float = SHARE_OF_PEAK
) -> dict[str, float]:
    """tokens_per_second and flops_per_second of all devices together; with their peak, FLOP/s of them all, also
    percent_of_peak (model FLOPs utilisation: what is computed more than once is not counted) and percent_of_plan, of
    what `prediction` expects."""
    achieved = tokens_per_second * flops_per_token
    found = {"tokens_per_second": tokens_per_second, "flops_per_second": achieved}
    if peak is not None:
        share = achieved / peak
        found |= {"percent_of_peak": 100 * share, "percent_of_plan": 100 * share / share_of_peak}
    return found


def shape_from_config(shape: ShapeConfig) -> ModelShape:
    """Raises UserError for a shape that no model can have."""
    values = asdict(shape)
    known = ", ".join(FAMILIES)
    expect(shape.architecture in FAMILIES, "model.shape.architecture", f"one of {known}", shape.architecture, "Set it.")
    if values["head_dim"] is None:
        heads = shape.num_attention_heads
        expect(heads >= 1, "model.shape.num_attention_heads", "1 or more", heads, "Raise it.")
        values["head_dim"] = shape.hidden_size // heads
    if shape.rope_scaling is not None:
        family = FAMILIES[shape.architecture]
        values["rope_scaling"] = check_rope_scaling(shape.rope_scaling, family, "model.shape.rope_scaling")
    made = ModelShape(**values)
    made.check("model.shape.")
    return made


def teacher_shape(config: Config) -> ModelShape:
    """The shape of model.path where it is a Hugging Face directory or a NeMo 2 checkpoint, else model.shape.

    A teacher that is pretrained has model.shape. Raises UserError where the directory does not say its shape.
    """
    path = config.model.path
    if path and config.teacher.mode is not TeacherMode.pretrain:
        if is_hugging_face(path):
            return read_shape(path)
        if is_nemo_checkpoint(Path(path)):
            return read_nemo_shape(Path(path))
    return shape_from_config(config.model.shape)


def student_shape(config: Config) -> ModelShape:
    """The shape of student.path's config.json where it is a Hugging Face directory, else the target of pruning."""
    if config.student.path and is_hugging_face(config.student.path):
        return read_shape(config.student.path)
    return target_shape(teacher_shape(config), config.student)


def target_shape(teacher: ModelShape, student: StudentConfig) -> ModelShape:
    """The teacher's shape with what `student` makes smaller; head_dim stays the teacher's.

    KV groups without a number of heads: each keeps the teacher's.
    """
    changes = {name: value for name in PRUNED_SIZES if (value := getattr(student, name)) is not None}
    if student.num_key_value_heads is not None:
        per_group = teacher.num_attention_heads // teacher.num_key_value_heads
        changes.setdefault("num_attention_heads", student.num_key_value_heads * per_group)
    if student.drop_layers:
        left = teacher.num_hidden_layers - len(set(student.drop_layers))
        if changes.setdefault("num_hidden_layers", left) != left:
            raise UserError(
                f"student.num_hidden_layers: expected {left}, what student.drop_layers leaves of "
                f"{teacher.num_hidden_layers}, found {student.num_hidden_layers}. Give one of the two."
            )
    return teacher.replace(**changes)


def matrix_parameters(shape: ModelShape) -> int:
    """Weights that every token is multiplied with: all matrices and the head, which a tied model shares."""
    sizes = shape.tensor_shapes()
    inner = sum(size[0] * size[1] for name, size in sizes.items() if len(size) == 2 and name not in (EMBEDDING, HEAD))
    return inner + shape.vocab_size * shape.hidden_size


def attention_flops(shape: ModelShape, sequence_length: int) -> int:
    """Per token, forward, causal."""
    return 2 * sequence_length * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers


def training_flops(shape: ModelShape, sequence_length: int) -> int:
    """Per token of plain training, forward and backward."""
    return FORWARD_AND_BACKWARD * (2 * matrix_parameters(shape) + attention_flops(shape, sequence_length))


def signal_flops(
    teacher: ModelShape, student: ModelShape, sequence_length: int, losses: Sequence[FeatureLoss]
) -> tuple[int, int]:
    """Per token, forward and backward: of the losses on hidden states, and of those on attention.

    A projection: 6 per weight. Relations: every token with every other, the student's products once more for the
    gradient. Attention: one causal product of each model's queries and keys, the student's twice more for the gradient.
    """
    hidden = attention = 0
    for loss in losses:
        if loss.heads is not None:
            own, other = (s.num_attention_heads * s.head_dim for s in (student, teacher))
            attention += sequence_length * (3 * own + other)
        elif loss.kind == "relational":
            hidden += 2 * sequence_length * (2 * student.hidden_size + teacher.hidden_size)
        else:
            sizes = projection_sizes(loss, student.hidden_size, teacher.hidden_size)
            hidden += 6 * sum(out * into for out, into in sizes)
    return hidden, attention


@dataclass(frozen=True)
class Flops:
    """Per token of the distillation step, over all devices."""

    teacher: int  # forward
    student: int  # forward and backward
    attention: int  # both
    signals: int = 0  # losses on hidden states and attention, with their projections
    recompute: int = 0  # the student's layers forward once more
    replicated: int = 0  # what every tensor-parallel device does alike: losses on hidden states of whole sequences

    @property
    def without_attention(self) -> int:
        return self.teacher + self.student

    @property
    def total(self) -> int:
        """What the step needs; the utilisation that others publish counts this."""
        return self.without_attention + self.attention + self.signals

    @property
    def executed(self) -> int:
        """With what is computed more than once."""
        return self.total + self.recompute + self.replicated


def feature_losses_of(training: DistilConfig, teacher: ModelShape, student: ModelShape) -> list[FeatureLoss]:
    """The losses on hidden states and attention, one entry for each pair of layers."""
    depths = {"student_layers": student.num_hidden_layers, "teacher_layers": teacher.num_hidden_layers}
    return feature_losses(training.hidden, training.attention, **depths)


def needs_logits(distil: DistilConfig) -> bool:
    """Whether the loss of training ever has a weight on the divergence from the teacher."""
    return bool(distil.kd_weight or distil.schedules.kd.end)


def runs_teacher(training: DistilConfig) -> bool:
    """Whether a step makes the teacher's forward pass: plain training makes none."""
    return needs_logits(training) or bool(training.hidden or training.attention)


def distillation_flops(
    teacher: ModelShape,
    student: ModelShape,
    sequence_length: int,
    losses: Sequence[FeatureLoss] = (),
    *,
    ranks: Layout | None = None,
    recompute: bool = False,
    follows_logits: bool = True,
) -> Flops:
    """losses: on hidden states and attention. follows_logits: without it the teacher's head is left out, and without
    losses the whole teacher."""
    head = teacher.vocab_size * teacher.hidden_size
    forward = matrix_parameters(teacher) - (0 if follows_logits else head)
    runs = follows_logits or bool(losses)
    inner = matrix_parameters(student) - student.vocab_size * student.hidden_size
    own_attention = attention_flops(student, sequence_length)
    hidden, attention = signal_flops(teacher, student, sequence_length, losses)
    copies = 1 if ranks is None or ranks.sequence_parallel else ranks.tensor
    return Flops(
        teacher=FORWARD * 2 * forward * runs,
        student=FORWARD_AND_BACKWARD * 2 * matrix_parameters(student),
        attention=FORWARD * attention_flops(teacher, sequence_length) * runs + FORWARD_AND_BACKWARD * own_attention,
        signals=hidden + attention,
        recompute=(FORWARD * 2 * inner + own_attention) * recompute,
        replicated=hidden * (copies - 1),
    )


def step_flops(training: DistilConfig, teacher: ModelShape, student: ModelShape, ranks: Layout | None = None) -> Flops:
    """`distillation_flops` as the settings of a training have it. ranks: without them nothing counts as replicated."""
    return distillation_flops(
        teacher,
        student,
        training.sequence_length,
        feature_losses_of(training, teacher, student),
        ranks=ranks,
        recompute=training.recompute,
        follows_logits=needs_logits(training),
    )


def step_bytes(training: DistilConfig, teacher: ModelShape, student: ModelShape, ranks: Layout) -> dict[str, int]:
    """`device_memory.bytes_per_device` as the settings of a training have it."""
    losses = feature_losses_of(training, teacher, student)
    return bytes_per_device(teacher, student, ranks, training, losses, needs_logits(training))


def counts(shape: ModelShape) -> dict[str, int]:
    return {
        "parameters": shape.parameters(),
        "non_embedding_parameters": shape.non_embedding_parameters(),
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
    }


def planned_layout(config: Config) -> Layout:
    """The layout on the machines that it is for: what trains in bf16 is planned for GPUs, wherever it is planned."""
    ranks = layout(config.parallel)
    on_gpus = config.distil.precision is Precision.bf16 and config.parallel.device is not Device.cpu
    return replace(ranks, device="cuda") if on_gpus else ranks


def plan(config: Config, student: ModelShape | None = None) -> dict[str, Any]:
    """Everything that can be said of the distillation of an experiment without starting it. student: its shape where
    the settings do not give it."""
    teacher, student, ranks, training = (
        teacher_shape(config),
        student or student_shape(config),
        planned_layout(config),
        config.distil,
    )
    flops = step_flops(training, teacher, student, ranks)
    own = training_flops(student, training.sequence_length)
    tokens = training.steps * training.global_batch_size * training.sequence_length
    return {
        "experiment": config.run.name,
        "teacher": counts(teacher),
        "student": counts(student),
        "student_share": round(student.parameters() / teacher.parameters(), 4),
        "sequence_length": training.sequence_length,
        "global_batch_size": training.global_batch_size,
        "steps": training.steps,
        "tokens": tokens,
        "flops_per_token": flops.total,
        "flops_per_token_without_attention": flops.without_attention,
        "flops_per_token_executed": flops.executed,
        "flops_per_token_parts": asdict(flops),
        "teacher_adds": {  # to the student's own training
            "without_attention": round(flops.teacher / flops.student, 4),
            "with_attention": round((flops.total - flops.signals - own) / own, 4),
        },
        "documents_apart": training.document_mask,
        "flops": flops.total * tokens,
        "prediction": prediction(config.plan.gpu, flops, tokens, ranks.processes, config.plan.share_of_peak),
        "layout": asdict(ranks),
        "bytes_per_device": step_bytes(training, teacher, student, ranks),
    }


def prediction(
    gpu: str, flops: Flops, tokens: int, devices: int, share_of_peak: float = SHARE_OF_PEAK
) -> dict[str, Any]:
    """Speed and time at share_of_peak of the named GPU's bf16 peak: of what the step needs, and, in `executed`, with
    what is computed more than once. Speeds in tokens/s and device."""
    peak = peak_flops(gpu)
    assert peak is not None, gpu

    def at(per_token: int) -> dict[str, float]:
        speed = share_of_peak * peak / per_token
        device_hours = tokens / speed / 3600
        return {
            "tokens_per_second_per_device": round(speed, 1),
            "device_hours": round(device_hours, 2),
            "hours": round(device_hours / devices, 2),
        }

    known = {"gpu": gpu, "bf16_peak_flops": peak, "share_of_peak": share_of_peak}
    return {**known, **at(flops.total), "executed": at(flops.executed)}
