"""What runs in the ranks of test_step.py."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipelines.core.reference import distillation_step
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.export import gather_hugging_face
from pipelines.model.pair import DistillationPair
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.step import evaluation_step, gather_gradients, training_step, wrap
from pipelines.model.weights import load_hugging_face

TEACHER = ModelShape(
    vocab_size=67,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=12,
    rope_theta=10000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)
STUDENT = TEACHER.replace(hidden_size=24, intermediate_size=36, num_attention_heads=4)
SEQUENCE, MICRO_BATCH = 12, 2


def write_models(directory: Path, student: ModelShape = STUDENT, teacher: ModelShape = TEACHER) -> None:
    """Large weights, so that the softmax is far from uniform and nothing hides in rounding."""
    if dist.get_rank() == 0:
        write_random_model(directory / "teacher", teacher, seed=1, std=0.3)
        write_random_model(directory / "student", student, seed=2, std=0.3)
    dist.barrier()


def random_batches(micro_batches: int, replicas: int, vocab_size: int, seed: int = 5) -> list[list[dict[str, Any]]]:
    """[replica][micro batch] of uneven masks, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[dict[str, Any]]] = []
    for _ in range(replicas):
        batches.append([])
        for _ in range(micro_batches):
            ids = torch.randint(0, vocab_size, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
            mask = torch.rand(MICRO_BATCH, SEQUENCE, generator=generator) < torch.rand((), generator=generator)
            positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, SEQUENCE)
            mask[0, 0] = True
            batches[-1].append(
                {
                    "tokens": ids[:, :-1].contiguous(),
                    "labels": ids[:, 1:].contiguous(),
                    "position_ids": positions.contiguous(),
                    "loss_mask": mask.float(),
                }
            )
    return batches


def build_pair(
    directory: Path, student: ModelShape, teacher: ModelShape | None, sequence_parallel: bool, **settings: Any
) -> DistillationPair:
    models = []
    for name, shape in (("student", student), ("teacher", teacher)):
        if shape is not None:
            model = build_model(shape, sequence_parallel=sequence_parallel, sequence_length=SEQUENCE)
            load_hugging_face(model, directory / name, shape)
            models.append(model)
    return DistillationPair(*models, vocab_size=student.vocab_size, **settings)


def step_errors(
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    micro_batches: int = 2,
    tied: bool = False,
    kd_weight: float = 0.7,
    ce_weight: float = 0.3,
    temperature: float = 2.0,
) -> dict[str, float]:
    """Relative errors of means and gradients against float64 on rank 0, {} elsewhere."""
    parallel.initialize(tensor, pipeline)
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    directory = Path(shared[0])
    student = STUDENT.replace(tie_word_embeddings=tied)
    write_models(directory, student)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight, "temperature": temperature}
    pair = build_pair(directory, student, TEACHER if kd_weight else None, sequence_parallel, **weights)
    model = wrap(pair, distributed_optimizer=distributed_optimizer)
    replicas = parallel_state.get_data_parallel_world_size()
    batches = random_batches(micro_batches, replicas, student.vocab_size)
    means = training_step(model, batches[parallel_state.get_data_parallel_rank()])
    gather_gradients(model)
    gradients = {
        name: gradient
        for name, gradient in gather_hugging_face(pair.student, student, value=lambda p: p.main_grad)
        if gradient is not None
    }
    evaluated = evaluation_step(model, batches[parallel_state.get_data_parallel_rank()])
    if dist.get_rank() != 0:
        return {}
    everything = {key: torch.cat([b[key] for replica in batches for b in replica]) for key in batches[0][0]}
    files = [
        {name: found[name] for name in found.names}
        for found in (Tensors(directory / d) for d in ("student", "teacher"))
    ]
    expected = distillation_step(
        files[0],
        student,
        files[1],
        TEACHER,
        everything["tokens"],
        everything["labels"],
        everything["loss_mask"],
        **weights,
    )
    errors = {name: abs(value - expected.means[name]) for name, value in means.items()}
    errors |= {f"evaluation {name}": abs(value - expected.means[name]) for name, value in evaluated.items()}
    for name, gradient in expected.gradients.items():
        errors[name] = ((gradients[name] - gradient).norm() / gradient.norm()).item()
    return errors
