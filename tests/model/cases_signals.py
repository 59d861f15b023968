"""What runs in the ranks of test_signals.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipelines.config import UserError
from pipelines.core.reference_features import feature_step
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.export import gather_hugging_face
from pipelines.model.pair import DistillationPair
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.signals import FeatureLosses
from pipelines.model.step import evaluation_step, gather_gradients, training_step, wrap
from pipelines.model.weights import load_hugging_face
from pipelines.signals import (
    AttentionKind,
    AttentionLossConfig,
    FeatureLoss,
    Heads,
    HiddenKind,
    HiddenLossConfig,
    feature_losses,
)
from tests.model.cases_step import SEQUENCE, STUDENT, TEACHER, random_batches, reference, write_models

DEEP = TEACHER.replace(num_hidden_layers=4)
WEIGHTS = {"kd_weight": 0.7, "ce_weight": 0.3, "temperature": 2.0}

HIDDEN = [
    HiddenLossConfig(kind=HiddenKind.mse, weight=0.6),
    HiddenLossConfig(-1, -1, kind=HiddenKind.cosine, weight=1.5, rank=5),
    HiddenLossConfig(1, 2, kind=HiddenKind.relational, weight=2.5),
    HiddenLossConfig(0, 0, kind=HiddenKind.relational, weight=1.0),
]
ATTENTION = [
    AttentionLossConfig(kind=AttentionKind.kl, weight=0.8),
    AttentionLossConfig(2, 4, kind=AttentionKind.mse, weight=2.0),
    AttentionLossConfig(1, 2, kind=AttentionKind.scores, weight=0.3),
]


def build(
    directory: Path,
    student: ModelShape,
    losses: list[FeatureLoss],
    options: dict[str, Any],
    teacher_precision: str | None = None,
    **build_options: Any,
) -> DistillationPair:
    models = {}
    for name, shape in (("student", student), ("teacher", DEEP)):
        own = build_options if name == "student" else {"precision": teacher_precision} if teacher_precision else {}
        models[name] = build_model(shape, sequence_length=SEQUENCE, **options | own)
        load_hugging_face(models[name], directory / name, shape)
    features = FeatureLosses(losses, models["student"], models["teacher"], seed=3)
    return DistillationPair(
        models["student"], models["teacher"], vocab_size=student.vocab_size, features=features, **WEIGHTS
    )


def losses_of(student: ModelShape, hidden: bool, attention: bool, each: bool) -> list[FeatureLoss]:
    attentions = [] if not attention else ATTENTION
    if each:
        attentions = [AttentionLossConfig(e.student_layer, e.teacher_layer, e.kind, Heads.each) for e in attentions]
    return feature_losses(
        HIDDEN if hidden else [],
        attentions,
        student_layers=student.num_hidden_layers,
        teacher_layers=DEEP.num_hidden_layers,
    )


def gathered_projections(pair: DistillationPair, gradient: bool) -> dict[str, list[torch.Tensor]]:
    """Of every stage, on every rank."""
    assert pair.features is not None
    own = {
        name: [(p.main_grad if gradient else p).detach().clone() for p in projection.parameters()]
        for name, projection in pair.features.projections.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    whole: dict[str, list[torch.Tensor]] = {}
    for part in everyone:
        for name, tensors in part.items():
            for one, other in zip(tensors, whole.setdefault(name, tensors), strict=True):
                assert torch.equal(one, other), f"{name} differs between ranks"
    return whole


def step_errors(
    directory: Path,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    hidden: bool = True,
    attention: bool = True,
    each: bool = False,
    precision: str = "fp32",
    factor: float = 1.0,
    teacher_precision: str | None = None,
    **build_options: Any,
) -> dict[str, float]:
    """On rank 0, {} elsewhere: absolute errors of the means, in training and in evaluation ("evaluation ..."); relative
    errors of the gradients of the student by Hugging Face name and of projections ("projections ...")."""
    parallel.initialize(tensor, pipeline)
    student = STUDENT.replace(num_attention_heads=TEACHER.num_attention_heads) if each else STUDENT
    write_models(directory, student, DEEP)
    losses = losses_of(student, hidden, attention, each)
    options = {"sequence_parallel": sequence_parallel, "precision": precision}
    pair = build(directory, student, losses, options, teacher_precision, **build_options)
    assert pair.features is not None
    pair.features.factor = factor
    model = wrap(pair, distributed_optimizer=distributed_optimizer)
    batches = random_batches(2, parallel_state.get_data_parallel_world_size(), student.vocab_size)
    own = batches[parallel_state.get_data_parallel_rank()]
    before = evaluation_step(model, own)
    means = training_step(model, own)
    gather_gradients(model)
    found = gather_hugging_face(pair.student, student, value=lambda p: p.main_grad)
    gradients = {name: gradient for name, gradient in found if gradient is not None}
    projections, projection_gradients = gathered_projections(pair, False), gathered_projections(pair, True)
    if dist.get_rank() != 0:
        return {}
    expected = reference(directory, student, DEEP, batches, WEIGHTS)
    whole = {key: torch.cat([b[key] for replica in batches for b in replica]) for key in batches[0][0]}
    mask = whole["loss_mask"].masked_fill(whole["labels"] < 0, 0)
    files = {name: {n: found[n] for n in found.names} for name, found in opened(directory)}
    scaled = [FeatureLoss(**(vars(loss) | {"weight": factor * loss.weight})) for loss in losses]
    feature_means, of_student, of_projections = feature_step(
        scaled, files["student"], student, files["teacher"], DEEP, projections, whole["tokens"], mask
    )
    wanted = expected.means | feature_means
    wanted["loss"] += sum(loss.weight * feature_means[loss.name] for loss in scaled)
    assert set(means) == set(wanted) <= set(before)
    errors = {name: abs(value - wanted[name]) for name, value in means.items()}
    errors |= {f"evaluation {name}": abs(before[name] - wanted[name]) for name in wanted}
    for name, gradient in expected.gradients.items():
        total = gradient + of_student[name]
        errors[name] = ((gradients[name] - total).norm() / total.norm()).item()
    assert set(of_projections) == set(projection_gradients)
    for name, factors in of_projections.items():
        for index, gradient in enumerate(factors):
            error = (projection_gradients[name][index] - gradient).norm() / gradient.norm().clamp(min=1e-30)
            errors[f"projections {name} {index}"] = error.item()
    return errors


def opened(directory: Path) -> list[tuple[str, Tensors]]:
    return [(name, Tensors(directory / name)) for name in ("student", "teacher")]


def drawn_projections(directory: Path, tensor: int = 1, pipeline: int = 1) -> dict[str, list[torch.Tensor]]:
    parallel.initialize(tensor, pipeline)
    write_models(directory, STUDENT, DEEP)
    pair = build(directory, STUDENT, losses_of(STUDENT, True, False, False), {})
    return gathered_projections(pair, False)


def states_of_checkpoints(directory: Path) -> dict[str, Any]:
    """The names in a checkpoint, and whether projections come back from it."""
    parallel.initialize(2)
    write_models(directory, STUDENT, DEEP)
    pair = build(directory, STUDENT, losses_of(STUDENT, True, False, False), {})
    assert pair.features is not None
    state = {name: value.data for name, value in pair.sharded_state_dict().items() if "_extra_state" not in name}
    saved = {name: torch.randn_like(value) for name, value in state.items()}
    pair.load_state_dict(saved, strict=False)
    names = {f"projections.{name}" for name, _ in pair.features.projections.named_parameters()}
    return {
        "sharded": sorted(state),
        "projections": sorted(names),
        "loaded": all(
            torch.equal(saved[f"projections.{name}"], p) for name, p in pair.features.projections.named_parameters()
        ),
        "plain": sorted(name for name in pair.state_dict() if "projection" in name),
    }


def refusal(directory: Path, loss: dict[str, Any], tensor: int = 1, pipeline: int = 1, **build_options: Any) -> str:
    parallel.initialize(tensor, pipeline)
    write_models(directory, STUDENT, DEEP)
    try:
        build(directory, STUDENT, [FeatureLoss(**loss)], {}, **build_options)
    except UserError as error:
        return str(error)
    return ""
