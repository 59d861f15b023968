"""Proof, on this machine and at this layout, that the sharded distillation step computes what it should.

Random teachers and students of odd little shapes are written as Hugging Face tensors and loaded into the real sharded
pair; one real step (teacher, student, loss, backward, gradient reduction) runs in fp32 on random tokens with uneven
masks over several micro batches and data-parallel replicas. Every parameter, every gradient and every term of the loss
is then gathered and compared with the unsharded float64 reference, which shares no code with it.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.table import Table

from pipelines import artifacts, console
from pipelines.config import DistilConfig, Layout, UserError, VerifyConfig, layout
from pipelines.core.reference import ReferenceStep, distillation_step
from pipelines.core.reference_features import Projections, by_factor, feature_step, with_features
from pipelines.families import ModelShape, Tensor
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.documents import separated
from pipelines.model.export import gather_hugging_face
from pipelines.model.pair import DistillationPair
from pipelines.model.projections import gather_projections
from pipelines.model.safetensors_stream import Tensors, Writer
from pipelines.model.signals import FeatureLosses
from pipelines.model.step import Batch, gather_gradients, training_step, wrap
from pipelines.model.weights import load_hugging_face
from pipelines.signals import FeatureLoss, across_tokens, everywhere

END_OF_DOCUMENT = 3  # of the random tokens
GROUPS = ("embedding", "qkv", "proj", "fc1", "fc2", "norms", "head")


@dataclass(frozen=True)
class Case:
    """Two shapes to verify, in multiples of the layout's degrees, with a vocabulary that they do not divide."""

    name: str
    teacher: ModelShape
    student: ModelShape


@dataclass
class Errors:
    """Of one case, on rank 0: relative errors norm(a - b) / norm(b) by Hugging Face name, and of each term by name."""

    values: dict[str, float]
    gradients: dict[str, float]
    terms: dict[str, float]

    def largest(self) -> float:
        found = [*self.values.values(), *self.gradients.values(), *self.terms.values()]
        return math.inf if any(math.isnan(error) for error in found) else max(found)


def run(context: artifacts.StageContext) -> dict[str, Any]:
    """Raises UserError on every rank when an error is above verify.tolerance."""
    config, settings, ranks = context.config, context.config.verify, layout(context.config.parallel)
    _check(settings, ranks, config.distil)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    rows = "documents apart" if settings.document_mask else "whole rows"
    console.say(f"verify  {_describe(ranks)}, {rows}, fp32 against float64, tolerance {settings.tolerance:.0e}")
    figures: dict[str, Any] = {}
    failures: list[str] = []
    tensors = 0
    for seed, case in enumerate(cases(ranks.tensor, ranks.pipeline), start=config.run.seed):
        errors = verify_case(case, context.directory / case.name, settings, ranks, config.distil, seed)
        if errors is not None:
            figures[case.name] = _show(case, errors, settings.tolerance)
            tensors += len(errors.gradients)
            failures += _failures(case, errors, settings.tolerance)
    verdict = [failures]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        shown = "\n  ".join(verdict[0][:20])
        raise UserError(
            f"verify: expected every relative error to be at most {settings.tolerance:.0e} at {_describe(ranks)}, "
            f"found {len(verdict[0])} above:\n  {shown}\n"
            "Training at this layout would minimize something else. Do not train."
        )
    console.say(
        f"verify  {tensors} tensors compared, values and gradients, and the terms of the loss: all within tolerance"
    )
    return figures


def cases(tensor: int, pipeline: int) -> list[Case]:
    width_teacher = ModelShape(
        vocab_size=64 * tensor + 1,
        hidden_size=40,
        intermediate_size=26 * tensor,
        num_hidden_layers=2 * pipeline,
        num_attention_heads=6 * tensor,
        num_key_value_heads=2 * tensor,
        head_dim=12,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    depth_teacher = width_teacher.replace(
        vocab_size=48 * tensor + 1,
        num_key_value_heads=tensor,
        head_dim=6,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        tie_word_embeddings=True,
    )
    return [
        Case(
            "width",
            width_teacher,
            width_teacher.replace(hidden_size=28, intermediate_size=18 * tensor, num_attention_heads=4 * tensor),
        ),
        Case("depth_tied", depth_teacher, depth_teacher.replace(num_hidden_layers=pipeline)),
    ]


def verify_case(
    case: Case, directory: Path, settings: VerifyConfig, ranks: Layout, distil: DistilConfig, seed: int
) -> Errors | None:
    """Collective over all ranks. The errors on rank 0, None elsewhere.

    Of distil, its losses on hidden states and attention and its distributed_optimizer are verified.
    """
    shapes = {"student": case.student, "teacher": case.teacher}
    if dist.get_rank() == 0:
        for number, (name, shape) in enumerate(shapes.items()):
            _write_weights(directory / name, shape, 2 * seed + number)
    dist.barrier()
    models = {}
    for name, shape in shapes.items():
        models[name] = build_model(
            shape, sequence_parallel=ranks.sequence_parallel, sequence_length=settings.sequence_length
        )
        load_hugging_face(models[name], directory / name, shape)
    loss = {
        "kd_weight": settings.kd_weight,
        "ce_weight": settings.ce_weight,
        "temperature": settings.temperature,
        "divergence": settings.divergence.value,
        "divergence_parameter": settings.divergence_parameter,
        "top_k": settings.top_k,
    }
    losses = features_to_verify(distil, case)
    features = FeatureLosses(losses, models["student"], models["teacher"], seed=seed) if losses else None
    pair = DistillationPair(
        models["student"], models["teacher"], vocab_size=case.student.vocab_size, features=features, **loss
    )
    model = wrap(pair, distributed_optimizer=distil.distributed_optimizer)
    batches = random_batches(settings, ranks.data, case.student.vocab_size, seed)
    own = batches[parallel_state.get_data_parallel_rank()]
    end = END_OF_DOCUMENT if settings.document_mask else None
    means = training_step(model, own if end is None else [separated(batch, end) for batch in own])
    gather_gradients(model)
    values = _gathered(gather_hugging_face(pair.student, case.student))
    gradients = _gathered(gather_hugging_face(pair.student, case.student, value=lambda p: p.main_grad))
    projections, projection_gradients = _of_projections(features)
    if dist.get_rank() != 0:
        return None
    files = {name: {n: found[n].double() for n in found.names} for name, found in _opened(directory, shapes)}
    models_in_double = (files["student"], case.student, files["teacher"], case.teacher)
    tokens, labels, mask = (
        torch.cat([b[key] for replica in batches for b in replica]) for key in ("tokens", "labels", "loss_mask")
    )
    reference = distillation_step(*models_in_double, tokens, labels, mask, **loss, end_of_document=end)
    if losses:
        found = feature_step(losses, *models_in_double, projections, tokens, mask, end_of_document=end)
        reference = with_features(reference, losses, *found)
        gradients |= by_factor(projection_gradients)
    shutil.rmtree(directory)
    return _errors(case.student, files["student"], reference, values, gradients, means)


def features_to_verify(distil: DistilConfig, case: Case) -> list[FeatureLoss]:
    """The kinds of losses that distil asks for, on every layer of the small models instead of the layers it names."""
    student, teacher = case.student, case.teacher
    return everywhere(
        distil.hidden,
        distil.attention,
        student_layers=student.num_hidden_layers,
        teacher_layers=teacher.num_hidden_layers,
        largest_rank=min(student.hidden_size, teacher.hidden_size),
        equal_heads=student.num_attention_heads == teacher.num_attention_heads,
    )


def _of_projections(features: FeatureLosses | None) -> tuple[Projections, Projections]:
    """Values and gradients; empty where there are none. Two all-gathers over all ranks with features."""
    if features is None:
        return {}, {}
    return (
        gather_projections(features.projections, lambda p: p),
        gather_projections(features.projections, lambda p: p.main_grad),  # type: ignore[attr-defined]
    )


def random_batches(settings: VerifyConfig, replicas: int, vocab_size: int, seed: int) -> list[list[Batch]]:
    """[replica][micro batch], the same on every rank; how much of each micro batch counts varies.

    With settings.document_mask every fourth token or so ends a document, so that some have a token alone.
    """
    generator = torch.Generator().manual_seed(seed)
    size, length = settings.micro_batch_size, settings.sequence_length
    positions = torch.arange(length).expand(size, length).contiguous()
    shares = torch.linspace(0.15, 0.95, replicas * settings.micro_batches).tolist()
    batches: list[list[Batch]] = [[] for _ in range(replicas)]
    for number, share in enumerate(shares):
        ids = torch.randint(0, vocab_size, (size, length + 1), generator=generator)
        mask = (torch.rand(size, length, generator=generator) < share).float()
        if settings.document_mask:
            ids[torch.rand(ids.shape, generator=generator) < 0.25] = END_OF_DOCUMENT
            ids[0, 0] += ids[0, 0] == END_OF_DOCUMENT  # the token that counts for certain
        mask[0, 0] = 1.0
        batches[number % replicas].append(
            {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "position_ids": positions,
                "loss_mask": mask,
            }
        )
    return batches


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """norm(a - b) / norm(b) in float64; infinite where b is all zero and a is not."""
    difference = (found.double().cpu() - expected).norm().item()
    norm = expected.norm().item()
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def group_of(tensor: Tensor) -> str:
    """The parameter group under which a Hugging Face tensor is reported."""
    if len(tensor.axes) == 1:
        return "norms"
    name = tensor.megatron.removesuffix(".weight").rsplit(".", 1)[-1]
    return {
        "word_embeddings": "embedding",
        "output_layer": "head",
        "linear_qkv": "qkv",
        "linear_proj": "proj",
        "linear_fc1": "fc1",
        "linear_fc2": "fc2",
    }[name]


def _errors(
    shape: ModelShape,
    weights: dict[str, torch.Tensor],
    reference: ReferenceStep,
    values: dict[str, torch.Tensor],
    gradients: dict[str, torch.Tensor],
    means: dict[str, float],
) -> Errors:
    names = set(shape.tensors())
    assert set(values) == names, f"values: not compared: {sorted(names ^ set(values))}"
    assert names <= set(gradients), f"gradients: not compared: {sorted(names - set(gradients))}"
    apart = set(gradients) ^ set(reference.gradients)
    assert not apart, f"gradients: not compared: {sorted(apart)}"
    assert set(means) == set(reference.means), f"terms: not compared: {sorted(set(means) ^ set(reference.means))}"
    return Errors(
        {name: relative_error(values[name], weights[name]) for name in names},
        {name: relative_error(gradients[name], expected) for name, expected in reference.gradients.items()},
        {
            name: relative_error(*torch.tensor([means[name], expected], dtype=torch.float64).unbind())
            for name, expected in reference.means.items()
        },
    )


def _show(case: Case, errors: Errors, tolerance: float) -> dict[str, Any]:
    """Print one case's table; returns the same as figures."""
    table = Table(title=f"{case.name}: largest relative error", title_justify="left")
    for column, justify in (
        ("group", "left"),
        ("tensors", "right"),
        ("values", "right"),
        ("gradients", "right"),
        ("", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    tensors = case.student.tensors()
    figures: dict[str, Any] = {}
    for group in GROUPS:
        names = [name for name, tensor in tensors.items() if group_of(tensor) == group]
        if not names:
            continue
        worst = {"values": _worst(errors.values, names), "gradients": _worst(errors.gradients, names)}
        figures[group] = worst | {"tensors": len(names)}
        table.add_row(
            group, str(len(names)), *(f"{e:.1e}" for e in worst.values()), _mark(max(worst.values()), tolerance)
        )
    trained_beside = [name for name in errors.gradients if name not in tensors]
    if trained_beside:
        worst_of_all = _worst(errors.gradients, trained_beside)
        figures["projections"] = {"gradients": worst_of_all, "tensors": len(trained_beside)}
        mark = _mark(worst_of_all, tolerance)
        table.add_row("projections", str(len(trained_beside)), "", f"{worst_of_all:.1e}", mark)
    for name, error in errors.terms.items():
        figures[name] = {"values": error}
        table.add_row(name, "", f"{error:.1e}", "", _mark(error, tolerance))
    console.terminal().print(table)
    return figures


def _worst(errors: dict[str, float], names: list[str]) -> float:
    return max(math.inf if math.isnan(errors[name]) else errors[name] for name in names)


def _mark(error: float, tolerance: float) -> str:
    return "ok" if error <= tolerance else "FAILED"


def _failures(case: Case, errors: Errors, tolerance: float) -> list[str]:
    lines = []
    for what, found in (("term", errors.terms), ("value", errors.values), ("gradient", errors.gradients)):
        lines += [f"{case.name}: {what} {name}: {e:.1e}" for name, e in sorted(found.items()) if not e <= tolerance]
    return lines


def _write_weights(directory: Path, shape: ModelShape, seed: int) -> None:
    """fp32 weights that keep activations and logits near 1; norms away from 1, so that each one shows."""
    generator = torch.Generator().manual_seed(seed)
    with Writer(directory, {name: (size, torch.float32) for name, size in shape.tensor_shapes().items()}) as writer:
        for name, size in shape.tensor_shapes().items():
            noise = torch.randn(size, generator=generator)
            writer.write(name, 1 + 0.3 * noise if len(size) == 1 else noise / math.sqrt(size[-1]))


def _opened(directory: Path, names: dict[str, ModelShape]) -> list[tuple[str, Tensors]]:
    return [(name, Tensors(directory / name)) for name in names]


def _gathered(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors if tensor is not None}


def _describe(ranks: Layout) -> str:
    parts = [f"TP {ranks.tensor}", f"PP {ranks.pipeline}", f"DP {ranks.data}"]
    return " x ".join(parts) + (", sequence parallel" if ranks.sequence_parallel else "") + f", {ranks.device}"


def _check(settings: VerifyConfig, ranks: Layout, distil: DistilConfig) -> None:
    if settings.document_mask and across_tokens(distil.hidden, distil.attention):
        raise UserError(
            "verify.document_mask: expected false with losses on attention or relations, found true. Set it to false, "
            "or leave those losses out."
        )
    if ranks.context > 1:
        raise UserError(
            f"verify: expected parallel.context=1, found {ranks.context}. Context parallelism cuts the sequences, "
            "which the reference does not follow. Verify the same layout without it."
        )
    smallest = min(case.student.vocab_size for case in cases(ranks.tensor, ranks.pipeline))
    if settings.top_k and settings.top_k >= smallest:
        raise UserError(
            f"verify.top_k: expected fewer than the {smallest} ids of the smallest model, found {settings.top_k}. "
            "Lower it, or leave it out."
        )
