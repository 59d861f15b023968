"""Run in ranks: NeMo's trainer against the plain step, and what the distil stage refuses."""

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


def fit_shortly(run: Path, corpus: str, config: Any, built: Any, callbacks: list[Any], **settings: Any) -> Any:
    """What `fit` returns; settings: those of the Schedule that are not the usual ones here."""
    from pipelines.trainer.fit import Schedule, fit

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
    )


def first_step(directory: str, corpus: str, tensor: int, distributed_optimizer: bool) -> dict[str, Any]:
    """One step through NeMo and one through model/step.py on the same batches; the largest relative difference."""
    from pipelines.model import parallel

    parallel.initialize(tensor)
    nemo_on_cpu()
    import torch
    from lightning.pytorch.callbacks import Callback
    from megatron.core import parallel_state

    from pipelines.families import ModelShape
    from pipelines.model import build, step
    from pipelines.model.pair import DistillationPair
    from pipelines.model.random_model import write_random_model
    from pipelines.model.weights import load_hugging_face

    teacher_shape = ModelShape(**SHAPE)
    shape = teacher_shape.replace(hidden_size=32, intermediate_size=48)
    root = Path(directory)
    if torch.distributed.get_rank() == 0 and not (root / "teacher").exists():
        write_random_model(root / "teacher", teacher_shape, seed=1, std=0.2)
        write_random_model(root / "student", shape, seed=2, std=0.2)
    torch.distributed.barrier()
    config = build.transformer_config(shape)
    teacher_config = build.transformer_config(teacher_shape)

    def built() -> DistillationPair:
        teacher = build.build_model(teacher_shape, config=teacher_config, sequence_length=SEQUENCE)
        load_hugging_face(teacher, root / "teacher", teacher_shape)
        student = build.build_model(shape, config=config, sequence_length=SEQUENCE)
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
    run = root / f"run-{tensor}-{distributed_optimizer}"
    settings = {"steps": 1, "validation_interval": 1, "checkpoint_interval": 10}
    fit_shortly(run, corpus, config, built, [capture], distributed_optimizer=distributed_optimizer, **settings)
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
    return {"differences": differences, "means": means, "row": row, "data": (rank, ranks)}


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
