"""Run in ranks: NeMo's trainer against the plain step, and what the distil stage refuses."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 600,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SEQUENCE, MICRO, GLOBAL = 32, 2, 8


def nemo_on_cpu() -> None:
    from pipelines.trainer import cpu_runtime

    cpu_runtime.install()
    # NeMo takes one training run per process for granted.
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    unset_num_microbatches_calculator()


def fit_shortly(
    run: Path,
    corpus: str,
    config: Any,
    built: Any,
    callbacks: list[Any],
    end_of_document: int | None = None,
    trackers: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    """What `fit` returns; settings: those of the Schedule that are not the usual ones here."""
    from pipelines.trainer.fit import Schedule, fit
    from pipelines.trainer.trackers import Tracking

    usual = {
        "sequence_length": SEQUENCE,
        "micro_batch_size": MICRO,
        "global_batch_size": GLOBAL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "gradient_clip": 1.0,
        "precision": "fp32",
        "optimizer": "auto",
        "distributed_optimizer": False,
        "validation_batches": 1,
        "keep_checkpoints": 1,
        "log_interval": 1,
    }
    prefix = str(next(Path(corpus).glob("data/train/*.idx")).with_suffix(""))
    return fit(
        description="test",
        directory=run,
        config=config,
        build=built,
        schedule=Schedule(**(usual | settings)),
        blend={"train": ["1", prefix], "validation": ["1", prefix]},
        tokenizer=Path(corpus) / "tokenizer",
        seed=1,
        device="cpu",
        callbacks=callbacks,
        flops_per_token=1000,
        bytes_per_value=12,
        tracking=Tracking(trackers, settings={"test.steps": settings["steps"]}),
        end_of_document=end_of_document,
    )


def padded_with_ends(corpus: Path, copy: Path) -> None:
    """The same corpus, whose tokenizer names the token that ends documents as its padding too, as many do."""
    shutil.copytree(corpus, copy)
    settings = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"]
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))


def first_step(
    directory: str,
    corpus: str,
    tensor: int,
    distributed_optimizer: bool,
    pipeline: int = 1,
    document_mask: bool = False,
    precision: str = "fp32",
    teacher_precision: str = "fp32",
) -> dict[str, Any]:
    """One step through NeMo and one through model/step.py on the same batches; the largest relative difference.

    document_mask: with documents apart, of a corpus as padded_with_ends makes it.
    """
    from pipelines.model import parallel

    parallel.initialize(tensor, pipeline)
    nemo_on_cpu()
    import torch
    from lightning.pytorch.callbacks import Callback
    from megatron.core import parallel_state

    from pipelines.families import ModelShape
    from pipelines.model import build, step
    from pipelines.model.pair import DistillationPair, schedule_config
    from pipelines.model.random_model import write_random_model
    from pipelines.model.weights import load_hugging_face
    from pipelines.model.windows import end_of_document

    teacher_shape = ModelShape(**SHAPE)
    shape = teacher_shape.replace(hidden_size=32, intermediate_size=48)
    root = Path(directory)
    if torch.distributed.get_rank() == 0 and not (root / "teacher").exists():
        write_random_model(root / "teacher", teacher_shape, seed=1, std=0.2)
        write_random_model(root / "student", shape, seed=2, std=0.2)
        padded_with_ends(Path(corpus), root / "corpus")
    torch.distributed.barrier()
    if document_mask:
        corpus = str(root / "corpus")
    end = end_of_document(Path(corpus), "train") if document_mask else None
    student_config = build.transformer_config(shape, precision=precision)
    teacher_config = build.transformer_config(teacher_shape, precision=teacher_precision)
    config = schedule_config(student_config, teacher_config)
    teachers = []

    def built() -> DistillationPair:
        teacher = build.build_model(teacher_shape, config=teacher_config, sequence_length=SEQUENCE)
        load_hugging_face(teacher, root / "teacher", teacher_shape)
        teachers.append(teacher)
        student = build.build_model(shape, config=student_config, sequence_length=SEQUENCE)
        load_hugging_face(student, root / "student", shape)
        return DistillationPair(
            student, teacher, config=config, vocab_size=shape.vocab_size, kd_weight=0.6, ce_weight=0.4, temperature=2.0
        )

    class Capture(Callback):
        def __init__(self) -> None:
            self.batches: list[dict[str, torch.Tensor]] = []
            self.gradients: dict[str, torch.Tensor] = {}

        def on_megatron_microbatch_start(self, step: Any, batch: Any, forward_callback: Any) -> None:
            if not step.forward_only:
                self.batches.append({name: value.clone() for name, value in batch.items()})

        def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any = None) -> None:
            if step.forward_only:
                return
            for name, parameter in step.model.module.named_parameters():
                if parameter.requires_grad:
                    self.gradients[name.split("student.")[-1]] = parameter.main_grad.clone()

    capture = Capture()
    run = root / f"run-{tensor}-{pipeline}-{distributed_optimizer}"
    settings = {"steps": 1, "validation_interval": 1, "checkpoint_interval": 10, "precision": precision}
    distributed = {"distributed_optimizer": distributed_optimizer}
    fit_shortly(run, corpus, config, built, [capture], end_of_document=end, **distributed, **settings)
    model = step.wrap(built(), distributed_optimizer=distributed_optimizer)
    means = step.training_step(model, capture.batches)
    differences = {}
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours, nemos = parameter.main_grad, capture.gradients[name.split("student.")[-1]]
            differences[name] = ((ours - nemos).norm() / ours.norm()).item()
    row = (run / "metrics.jsonl").read_text().splitlines()[0]
    parallel_state.destroy_model_parallel()
    ends = sum(int((batch["tokens"] == (-1 if end is None else end)).sum()) for batch in capture.batches)
    documents = sum(len(batch.get("cu_seqlens", [0])) - 1 for batch in capture.batches)
    held = {str(p.dtype) for teacher in teachers for p in teacher.parameters()}
    found = {
        "teacher": held,
        "documents": documents,
        "ends": ends,
        "shapes": {tuple(b["tokens"].shape) for b in capture.batches},
    }
    return {"differences": differences, "means": means, "row": row, "data": (rank, ranks)} | found


def distil_from_random_teacher(directory: str, corpus: str) -> str:
    """The message with which the distil stage refuses a teacher of random weights."""
    nemo_on_cpu()
    import torch

    from pipelines.artifacts import StageContext
    from pipelines.config import Config, UserError
    from pipelines.families import ModelShape
    from pipelines.model.random_model import write_random_model
    from pipelines.stages import distil

    root, shape = Path(directory), ModelShape(**SHAPE)
    if torch.distributed.get_rank() == 0:
        write_random_model(root / "random", shape, seed=1)
    torch.distributed.barrier()
    config = Config()
    config.model.path = config.student.path = str(root / "random")
    config.data.corpus = corpus
    config.distil.sequence_length, config.distil.micro_batch_size = SEQUENCE, MICRO
    (root / "distil").mkdir(exist_ok=True)
    try:
        distil.run(StageContext(config, "distil", root / "distil"))
    except UserError as error:
        return str(error)
    return "accepted"


def course_stopped_and_continued(directory: str, corpus: str, tensor: int, pipeline: int) -> dict[str, Any]:
    """TAID, schedules and projections: a run without interruption, and one that is stopped and continued."""
    from pipelines.model import parallel

    parallel.initialize(tensor, pipeline)
    nemo_on_cpu()
    import torch
    from lightning.pytorch.callbacks import Callback
    from megatron.core import parallel_state

    from pipelines.core.loss import LossWeights
    from pipelines.core.schedules import AdaptiveInterpolation, Schedule
    from pipelines.families import ModelShape
    from pipelines.model import build
    from pipelines.model.course import Course
    from pipelines.model.pair import DistillationPair, schedule_config
    from pipelines.model.random_model import write_random_model
    from pipelines.model.signals import FeatureLosses
    from pipelines.model.weights import load_hugging_face
    from pipelines.signals import HiddenKind, HiddenLossConfig, feature_losses
    from pipelines.trainer.course import CourseCallback

    teacher_shape, root = ModelShape(**SHAPE), Path(directory)
    shape = teacher_shape.replace(hidden_size=32, intermediate_size=48)
    if torch.distributed.get_rank() == 0:
        write_random_model(root / "teacher", teacher_shape, seed=1, std=0.2)
        write_random_model(root / "student", shape, seed=2, std=0.2)
    torch.distributed.barrier()
    hidden = [HiddenLossConfig(), HiddenLossConfig(-1, -1, kind=HiddenKind.cosine, rank=4)]
    losses = feature_losses(hidden, [], student_layers=2, teacher_layers=2)
    weights = LossWeights(0.9, 0.1, 2.0)

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise KeyError("stop")

    class Projections(Callback):
        drawn: list[torch.Tensor]

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            from pipelines.trainer.module import unwrap

            self.trained = [p.clone() for p in unwrap(pl_module.module).features.parameters()]  # type: ignore

    def run(name: str, callbacks: list[Any]) -> list[torch.Tensor]:
        student_config, teacher_config = build.transformer_config(shape), build.transformer_config(teacher_shape)
        config = schedule_config(student_config, teacher_config)
        kept: list[torch.Tensor] = []

        def built() -> DistillationPair:
            teacher = build.build_model(teacher_shape, config=teacher_config, sequence_length=SEQUENCE)
            load_hugging_face(teacher, root / "teacher", teacher_shape)
            student = build.build_model(shape, config=student_config, sequence_length=SEQUENCE)
            load_hugging_face(student, root / "student", shape)
            features = FeatureLosses(losses, student, teacher, seed=5)
            kept[:] = [p.detach().clone() for p in features.parameters()]
            return DistillationPair(
                student, teacher, config=config, vocab_size=shape.vocab_size, features=features, **vars_of(weights)
            )

        course = Course(
            weights,
            ce=Schedule(0.1, 0.5, steps=6),
            features=Schedule(1.0, 0.5, steps=9, shape="cosine"),
            taid=AdaptiveInterpolation(steps=80, alpha=0.05, beta=0.5),
        )
        projections = Projections()
        settings = {"steps": 10, "validation_interval": 4, "checkpoint_interval": 3}
        everything = [CourseCallback(course), projections, *callbacks]
        fit_shortly(root / name, corpus, config, built, everything, distributed_optimizer=False, **settings)
        assert all(not torch.equal(a, b) for a, b in zip(kept, projections.trained, strict=True)), "they are trained"
        return projections.trained

    whole = run("whole", [])
    with contextlib.suppress(KeyError):
        run("stopped", [Stop()])
    again = run("stopped", [])
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)),
        **{name: (root / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")},
    }


def vars_of(weights: Any) -> dict[str, float]:
    return {"kd_weight": weights.kd, "ce_weight": weights.ce, "temperature": weights.temperature}
