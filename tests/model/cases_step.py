"""What runs in the ranks of test_step.py."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipelines.core import linear_divergence
from pipelines.core.reference import ReferenceStep, distillation_step, divergences, llama_logits, telemetry
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.export import gather_hugging_face
from pipelines.model.offload import HostLayers
from pipelines.model.pair import DistillationPair
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.step import Batch, evaluation_step, gather_gradients, training_step, wrap
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


def write_models(
    directory: Path, student: ModelShape = STUDENT, teacher: ModelShape = TEACHER, teacher_std: float = 0.2
) -> None:
    """Large weights, so that the softmax is far from uniform."""
    if dist.get_rank() == 0:
        write_random_model(directory / "teacher", teacher, seed=1, std=teacher_std)
        write_random_model(directory / "student", student, seed=2, std=0.2)
    dist.barrier()


def random_batches(micro_batches: int, replicas: int, vocab_size: int, seed: int = 5) -> list[list[Batch]]:
    """[replica][micro batch], the same on every rank. Uneven masks, labels of -100, one micro batch without a token."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[Batch]] = []
    for replica in range(replicas):
        batches.append([])
        for number in range(micro_batches):
            ids = torch.randint(0, vocab_size, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
            mask = torch.rand(MICRO_BATCH, SEQUENCE, generator=generator) < 0.3 + 0.6 * (replica + number) / 3
            if replica == 0 and number == 1:
                mask[:] = False
            labels = ids[:, 1:].clone()
            labels[0, 3] = -100
            batches[-1].append(
                {
                    "tokens": ids[:, :-1].contiguous(),
                    "labels": labels,
                    "position_ids": torch.arange(SEQUENCE).expand(MICRO_BATCH, SEQUENCE).contiguous(),
                    "loss_mask": mask.float(),
                }
            )
    return batches


def build_pair(
    directory: Path,
    student: ModelShape,
    teacher: ModelShape | None,
    options: dict[str, Any],
    teacher_precision: str | None = None,
    **weights: Any,
) -> DistillationPair:
    models = []
    for name, shape in (("student", student), ("teacher", teacher)):
        if shape is not None:
            own = {"precision": teacher_precision} if name == "teacher" and teacher_precision else {}
            model = build_model(shape, sequence_length=SEQUENCE, **options | own)
            load_hugging_face(model, directory / name, shape)
            models.append(model)
    return DistillationPair(*models, vocab_size=student.vocab_size, **weights)


def step_errors(
    directory: Path,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    precision: str = "fp32",
    distributed_optimizer: bool = False,
    micro_batches: int = 2,
    tied: bool = False,
    teacher_vocab_size: int = TEACHER.vocab_size,
    kd_weight: float = 0.7,
    ce_weight: float = 0.3,
    temperature: float = 2.0,
    teacher_precision: str | None = None,
) -> dict[str, float]:
    """On rank 0, {} elsewhere: absolute errors of the means in training and in evaluation ("evaluation ..."), relative
    errors of the gradients by Hugging Face name, against the float64 reference. teacher_precision: None: as precision;
    given, the reference starts from both models' rounded weights."""
    parallel.initialize(tensor, pipeline)
    student, teacher = STUDENT.replace(tie_word_embeddings=tied), TEACHER.replace(vocab_size=teacher_vocab_size)
    write_models(directory, student, teacher, teacher_std=0.35)  # its entropy lies in several bands
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight, "temperature": temperature}
    options = {"sequence_parallel": sequence_parallel, "precision": precision}
    pair = build_pair(directory, student, teacher if kd_weight else None, options, teacher_precision, **weights)
    model = wrap(pair, distributed_optimizer=distributed_optimizer)
    batches = random_batches(micro_batches, parallel_state.get_data_parallel_world_size(), student.vocab_size)
    own = batches[parallel_state.get_data_parallel_rank()]
    before = evaluation_step(pair, own)
    means = training_step(model, own)
    gather_gradients(model)
    gathered = gather_hugging_face(pair.student, student, value=lambda p: p.main_grad)
    gradients = {name: gradient for name, gradient in gathered if gradient is not None}
    if dist.get_rank() != 0:
        return {}
    rounded = {"student": precision, "teacher": teacher_precision} if teacher_precision else {}
    expected = reference(directory, student, teacher, batches, weights, rounded)
    seen = expected.means | (
        reference_telemetry(directory, student, teacher, batches, temperature, rounded) if kd_weight else {}
    )
    assert set(before) == (set(seen) if kd_weight else {"loss", "ce", "tokens"}), sorted(set(before) ^ set(seen))
    errors = {name: abs(value - expected.means[name]) for name, value in means.items()}
    errors |= {f"evaluation {name}": abs(value - seen[name]) for name, value in before.items()}
    for name, gradient in expected.gradients.items():
        errors[name] = ((gradients[name] - gradient).norm() / gradient.norm()).item()
    return errors


def whole_batch(batches: list[list[Batch]]) -> tuple[Batch, torch.Tensor]:
    """The batches of every replica as one, and which of its labels are -100."""
    whole = {key: torch.cat([b[key] for replica in batches for b in replica]) for key in batches[0][0]}
    return whole, whole["labels"] < 0


def weights_of(
    directory: Path, student: ModelShape, rounded: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, torch.Tensor]]:
    """Both models' in float64, the teacher's vocabulary cut to the student's. rounded: the precision that a model's
    weights are held in, where it is not that of its files."""
    files = {}
    for name in ("student", "teacher"):
        found = Tensors(directory / name)
        held = torch.bfloat16 if rounded.get(name) == "bf16" else torch.float32
        files[name] = {n: found[n].to(held).double() for n in found.names}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        files["teacher"][name] = files["teacher"][name][: student.vocab_size]
    return files


def reference_telemetry(
    directory: Path,
    student: ModelShape,
    teacher: ModelShape,
    batches: list[list[Batch]],
    temperature: float,
    rounded: Mapping[str, str],
) -> dict[str, float]:
    """What an evaluation adds to the means: from whole logits in float64, one token after the other."""
    whole, ignored = whole_batch(batches)
    files, kept = weights_of(directory, student, rounded), (whole["loss_mask"] != 0) & ~ignored
    labels = whole["labels"][kept]
    s, t = (
        llama_logits(files[name], shape, whole["tokens"])[kept]
        for name, shape in (("student", student), ("teacher", teacher.replace(vocab_size=student.vocab_size)))
    )
    kd, seen = divergences(t / temperature, s / temperature, "forward_kl"), telemetry(t, s, labels)
    found = {name: seen[name].mean().item() for name in ("overlap", "teacher_entropy")}
    for name, low, high in (("0_1", 0, 1), ("1_2", 1, 2), ("2_4", 2, 4), ("4_up", 4, 99)):
        inside = [
            value for value, e in zip(kd.tolist(), seen["teacher_entropy"].tolist(), strict=True) if low <= e < high
        ]
        if inside:
            found[f"kd_entropy_{name}"] = sum(inside) / len(inside)
    for name in ("student", "teacher"):
        confidence, correct = seen[f"{name}_confidence"], seen[f"{name}_correct"]
        error = 0.0
        for number in range(15):
            inside_bin = (confidence > number / 15) & (confidence <= (number + 1) / 15)
            if inside_bin.any():
                gap = correct[inside_bin].mean() - confidence[inside_bin].mean()
                error += inside_bin.double().mean().item() * abs(gap.item())
        found[f"{name}_calibration_error"] = error
    assert sum(name.startswith("kd_entropy") for name in found) >= 2
    return found


def reference(
    directory: Path,
    student: ModelShape,
    teacher: ModelShape,
    batches: list[list[Batch]],
    weights: dict[str, float],
    rounded: Mapping[str, str] = MappingProxyType({}),
) -> ReferenceStep:
    whole, ignored = whole_batch(batches)
    files = weights_of(directory, student, rounded)
    return distillation_step(
        files["student"],
        student,
        files["teacher"],
        teacher,
        whole["tokens"],
        whole["labels"].masked_fill(ignored, 0),
        whole["loss_mask"].masked_fill(ignored, 0),
        **weights,
    )


def bounds_of_the_filter(directory: Path) -> list[float]:
    """Below which probability each chunk of a step left columns out."""
    parallel.initialize(2)
    write_models(directory)
    model = wrap(build_pair(directory, STUDENT, TEACHER, {}, gradient_filter=1e-7))
    with mock.patch.object(linear_divergence, "live_columns", wraps=linear_divergence.live_columns) as asked:
        training_step(model, random_batches(2, 1, STUDENT.vocab_size)[0])
    return [call.args[-1] for call in asked.call_args_list]


def teacher_stays_as_it_was(
    directory: Path, precision: str = "fp32", teacher_precision: str = "fp32"
) -> dict[str, Any]:
    """After .train() and a step: what is in which mode and dtype, which parameters have gradients, what checkpoints
    hold; and the bytes of the teacher's weights."""
    parallel.initialize(2)
    write_models(directory)
    pair = build_pair(directory, STUDENT, TEACHER, {"precision": precision}, teacher_precision)
    assert pair.teacher is not None
    before = {name: p.clone() for name, p in pair.teacher.named_parameters()}
    model = wrap(pair)
    training_step(model, random_batches(1, 1, STUDENT.vocab_size)[0])
    return {
        "dtypes": {n: {p.dtype for p in m.parameters()} for n, m in (("student", pair), ("teacher", pair.teacher))},
        "teacher_bytes": sum(p.nbytes for p in pair.teacher.parameters()),
        "student_training": all(m.training for m in pair.student.modules()),
        "teacher_training": any(m.training for m in pair.teacher.modules()),
        "unchanged": all(torch.equal(p, before[name]) for name, p in pair.teacher.named_parameters()),
        "teacher_gradients": [
            n
            for n, p in pair.teacher.named_parameters()
            if p.requires_grad or p.grad is not None or hasattr(p, "main_grad")
        ],
        "state": sorted(k for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)),
        "sharded_state": sorted(k for k in model.sharded_state_dict() if not k.endswith("_extra_state")),
        "student_parameters": sorted(name for name, _ in pair.student.named_parameters()),
    }


def terms_returned(directory: Path) -> dict[str, list[str]]:
    """Which terms a pair returns in training and in eval mode, and how often the teacher ran, by weights."""
    parallel.initialize(2)
    write_models(directory)
    batch = random_batches(1, 1, STUDENT.vocab_size)[0][0]
    del batch["loss_mask"]
    found = {}
    for kd_weight, ce_weight in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
        pair = build_pair(directory, STUDENT, TEACHER, {}, kd_weight=kd_weight, ce_weight=ce_weight)
        assert pair.teacher is not None
        runs = []
        pair.teacher.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        for mode in ("train", "eval"):
            getattr(pair, mode)()
            terms = pair(**batch)
            assert all(t.dtype == torch.float32 for t in terms.values())
            assert terms["loss"].shape == () and terms["loss"].requires_grad
            per_token = [n for n, t in terms.items() if t.shape == batch["labels"].shape and not t.requires_grad]
            found[f"{kd_weight} {ce_weight} {mode}"] = [*per_token, f"teacher ran {len(runs)}"]
            runs.clear()
    return found


def kept_by_a_layer(recompute: bool) -> float:
    """Bytes per token that autograd keeps for the backward pass of one more layer; each storage once, no weights."""
    parallel.initialize(1)

    def kept(layers: int) -> int:
        model = build_model(STUDENT.replace(num_hidden_layers=layers), sequence_length=SEQUENCE, recompute=recompute)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.is_floating_point():
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        (batch,) = random_batches(1, 1, STUDENT.vocab_size)[0]
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(batch["tokens"], batch["position_ids"], None)
        assert logits.requires_grad
        return sum(found.values())

    return (kept(4) - kept(2)) / 2 / (MICRO_BATCH * SEQUENCE)


def offloaded_teacher(directory: Path, layers: int = 3, precision: str = "fp32", pipeline: int = 1) -> dict[str, Any]:
    """Means, gradients and the teacher's memory, of two steps with its layers in host memory and of two without."""
    parallel.initialize(dist.get_world_size() // pipeline, pipeline)
    teacher = TEACHER.replace(num_hidden_layers=layers)
    write_models(directory, STUDENT, teacher)
    found: dict[str, Any] = {}
    for name in ("resident", "offloaded"):
        pair = build_pair(directory, STUDENT, teacher, {}, precision, ce_weight=0.3, temperature=2.0)
        assert pair.teacher is not None
        hosted = HostLayers(pair.teacher) if name == "offloaded" else None
        model = wrap(pair)
        states = []
        pair.teacher.register_forward_hook(lambda *call, states=states: states.append(call[-1].clone()))
        steps = [training_step(model, batches) for batches in random_batches(3, 2, STUDENT.vocab_size)]
        gradients = [p.main_grad.clone() for p in pair.student.parameters()]
        found[name] = {"means": steps, "states": states, "gradients": gradients}
        if hosted is not None:
            own = list(pair.teacher.decoder.layers.parameters())
            found["on device"] = sum(b.nbytes for b in hosted.buffers)
            found["layer"] = max(sum(p.nbytes for p in layer) for layer in hosted.parameters)
            found["at home"] = all(any(p.data_ptr() in _span(m) for m in hosted.host) for p in own)
    return found | {
        "equal": all(
            torch.equal(a, b)
            for kind in ("states", "gradients")
            for a, b in zip(found["resident"][kind], found["offloaded"][kind], strict=True)
        )
    }


def _span(memory: torch.Tensor) -> range:
    return range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)


def refused_offload(directory: Path) -> str:
    parallel.initialize(1)
    write_models(directory)
    try:
        HostLayers(build_pair(directory, STUDENT, TEACHER, {}).student)
    except ValueError as error:
        return str(error)
    return "accepted"
