"""One training run with NeMo's Trainer and MegatronStrategy, continued from its last checkpoint where there is one."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo import lightning as nl
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.lightning.pytorch.plugins import MegatronDataSampler, MegatronMixedPrecision

from pipelines import console, gpus, interpreter, planning, processes
from pipelines.model import adam, parallel
from pipelines.trainer import checkpoint_writer, checkpoints
from pipelines.trainer.background_write import HeldBack
from pipelines.trainer.callbacks import Metrics
from pipelines.trainer.data_index import DataIndex
from pipelines.trainer.guard import Guard
from pipelines.trainer.loop import TrainingLoop
from pipelines.trainer.module import TrainedModel, unwrap
from pipelines.trainer.profile import Trace
from pipelines.trainer.trackers import Trackers, Tracking


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Batch sizes in sequences, lengths in tokens, intervals in steps."""

    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    steps: int
    warmup_steps: int
    learning_rate: float
    min_learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    gradient_clip: float
    precision: str
    optimizer: str
    distributed_optimizer: bool
    validation_interval: int
    validation_batches: int
    checkpoint_interval: int
    keep_checkpoints: int
    log_interval: int
    keep_best: int = 0
    save_asynchronous: bool = False
    skip_steps: int = 0
    spike: float | None = None
    profile: bool = False


class Ranks(ClusterEnvironment):
    """The ranks that are running already, as `processes` knows them: Lightning starts none and asks SLURM nothing."""

    creates_processes_externally = True
    main_address = property(lambda self: os.environ["MASTER_ADDR"])
    main_port = property(lambda self: int(os.environ["MASTER_PORT"]))

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return processes.world_size()

    def global_rank(self) -> int:
        return processes.rank()

    def local_rank(self) -> int:
        return processes.local_rank()

    def node_rank(self) -> int:
        return processes.rank() // processes.local_world_size()

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size()

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank()


def fit(
    *,
    description: str,
    directory: Path,
    config: TransformerConfig,
    build: Callable[[], MegatronModule],
    schedule: Schedule,
    blend: dict[str, list[str]],
    tokenizer: Path,
    seed: int,
    device: str,
    callbacks: list[Callback],
    flops_per_token: int,
    bytes_per_value: int,
    share_of_peak: float = planning.SHARE_OF_PEAK,
    tracking: Tracking,
    end_of_document: int | None = None,
) -> tuple[MegatronModule, dict[str, float], dict[str, float]]:
    """Train to schedule.steps. Returns the trained module, unwrapped, the figures of its validation, and what training
    took: seconds, those of saving among them and their share, over resumes; seconds_to_first_step of this start; where
    steps may be left out, skipped_steps.

    config, build: see TrainedModel. blend: for "train" and "validation" Megatron's list of weights and prefixes.
    flops_per_token: of training, as planning counts them. share_of_peak: of the devices', what the plan expects.
    bytes_per_value: of a checkpoint, as storage counts them.
    Writes checkpoints/, metrics.jsonl, tensorboard/ and data_index/ under directory. Every rank calls it.
    """
    console.say(f"{description}  optimizer: {adam.install(schedule.optimizer)}")
    checkpoint = checkpoints.newest(directory / "checkpoints", description)
    if checkpoint:
        console.say(f"{description}  continues from {checkpoint}")
    checkpoint_writer.install()
    data_index = DataIndex(directory / "data_index")
    parallel.on_first_rank(data_index.discard_unfinished)
    # NeMo takes one training run per process for granted.
    unset_num_microbatches_calculator()
    saving = checkpoints.Checkpoints(
        directory / "checkpoints",
        interval=schedule.checkpoint_interval,
        keep=schedule.keep_checkpoints,
        best=schedule.keep_best,
        steps=schedule.steps,
        bytes_per_value=bytes_per_value,
        asynchronous=schedule.save_asynchronous,
        writes=lambda: guard.writes,
        stops=lambda: guard.stops,
        validation=lambda: metrics.last_validation,
    )
    guard = Guard(description, most=schedule.skip_steps, spike=schedule.spike, is_writing=saving.is_writing)
    metrics = Metrics(
        directory,
        Trackers(directory, description, tracking),
        guard,
        lambda: saving.seconds,
        description=description,
        start=checkpoints.step_of(checkpoint),
        steps=schedule.steps,
        tokens_per_step=schedule.global_batch_size * schedule.sequence_length,
        log_interval=schedule.log_interval,
        flops_per_token=flops_per_token,
        peak=_peak(description, schedule.precision, device, flops_per_token, share_of_peak),
        share_of_peak=share_of_peak,
    )
    trace = Trace(directory / "tensorboard", description=description, steps=schedule.steps, device=device)
    callbacks = [metrics, data_index, *callbacks, *([trace] if schedule.profile else []), saving]
    model = TrainedModel(config, build, _optimizer(schedule), guard, end_of_document)
    trainer = _trainer(schedule, config, device, callbacks)
    data = _data(schedule, blend, tokenizer, data_index.directory, seed, one_row=end_of_document is not None)
    with interpreter.settled():
        trainer.fit(model, data, ckpt_path=str(checkpoint) if checkpoint else None)
    # Lightning moves what it has trained to the CPU, where nccl cannot gather it.
    return unwrap(model.module).to(parallel.torch_device(device)), metrics.last_validation, _costs(metrics, guard)


def _costs(metrics: Metrics, guard: Guard) -> dict[str, float]:
    """On rank 0, as the manifest has them; nothing where no step was left to take."""
    if not metrics.seconds_to_first_step:
        return {}
    took = metrics.costs()
    found = {
        "seconds": round(took["time"], 1),
        "checkpoint_seconds": round(took["checkpoint_seconds"], 2),
        "checkpoint_percent": round(100 * took["checkpoint_seconds"] / took["time"], 2),
        "seconds_to_first_step": round(metrics.seconds_to_first_step, 1),
    }
    return found | ({"skipped_steps": guard.left_out} if guard.most else {})


def _peak(description: str, precision: str, device: str, flops_per_token: int, share: float) -> float | None:
    """bf16 FLOP/s of all ranks' GPUs together; None in fp32, and where the device's peak is not known."""
    one = gpus.peak_flops(torch.cuda.get_device_name()) if device == "cuda" and precision == "bf16" else None
    if one is None:
        return None
    peak = one * processes.world_size()
    console.say(
        f"{description}  plan: {share * peak / flops_per_token:,.0f} tokens/s, {flops_per_token / 1e9:,.4g} GFLOP per "
        f"token at {share:.0%} of {peak / 1e12:,.0f} TFLOP/s"
    )
    return peak


def _optimizer(schedule: Schedule) -> MegatronOptimizerModule:
    return MegatronOptimizerModule(
        OptimizerConfig(
            optimizer="adam",
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            adam_beta1=schedule.adam_beta1,
            adam_beta2=schedule.adam_beta2,
            clip_grad=schedule.gradient_clip,
            bf16=schedule.precision == "bf16",
            use_distributed_optimizer=schedule.distributed_optimizer,
        ),
        # constant_steps is 80,000 by default, which would drop the rate to its minimum right after the warm-up.
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=schedule.steps,
            warmup_steps=schedule.warmup_steps,
            constant_steps=0,
            min_lr=schedule.min_learning_rate,
        ),
    )


def _trainer(schedule: Schedule, config: TransformerConfig, device: str, callbacks: list[Callback]) -> nl.Trainer:
    on_gpu = device == "cuda"
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        sequence_parallel=config.sequence_parallel,
        pipeline_dtype=config.pipeline_dtype,
        process_group_backend="nccl" if on_gpu else "gloo",
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=schedule.distributed_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=on_gpu,
            overlap_param_gather=on_gpu and schedule.distributed_optimizer,
            # Megatron's check ends one process with an assertion; ours is in callbacks.Metrics.
            check_for_nan_in_grad=False,
        ),
        ckpt_async_save=False,  # ours: trainer/background_write.py
        ckpt_optim_fully_reshardable=True,
        # NeMo's progress printer makes a collective on rank 0 alone: the run hangs at the next checkpoint.
        replace_progress_bar=False,
    )
    local = processes.local_world_size()
    plugins: list[Any] = [Ranks()]
    if schedule.precision == "bf16":
        plugins.append(MegatronMixedPrecision("bf16-mixed"))
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=local,
        num_nodes=processes.world_size() // local,
        strategy=strategy,
        plugins=plugins,
        max_steps=schedule.steps,
        val_check_interval=min(schedule.validation_interval, schedule.steps),
        limit_val_batches=schedule.validation_batches,
        limit_test_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=schedule.log_interval,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit_loop.epoch_loop = TrainingLoop(trainer, trainer.min_steps, trainer.max_steps)
    # After construction: NeMo's Trainer makes deep copies of its arguments.
    trainer.strategy.checkpoint_io = HeldBack(trainer.strategy.checkpoint_io)
    trainer.callbacks.extend(callbacks)
    return trainer


def _data(
    schedule: Schedule, blend: dict[str, list[str]], tokenizer: Path, index_directory: Path, seed: int, one_row: bool
) -> PreTrainingDataModule:
    known = AutoTokenizer(str(tokenizer))
    # Nothing is padded. Megatron would put token 0 for each padding token, which may be the one that ends documents.
    known.pad_token = None
    data: Any = PreTrainingDataModule(
        # A test split must be named; it is not read.
        paths={"train": blend["train"], "validation": blend["validation"], "test": blend["validation"]},
        seq_length=schedule.sequence_length,
        micro_batch_size=schedule.micro_batch_size,
        global_batch_size=schedule.global_batch_size,
        tokenizer=known,
        num_workers=0,
        seed=seed,
        split=None,
        index_mapping_dir=str(index_directory),
        output_log=False,
    )
    # NeMo asks for a mask tensor where Transformer Engine is missing; no layer of ours takes one.
    data.create_attention_mask = False
    if one_row:
        sizes = ("seq_len", "micro_batch_size", "global_batch_size", "dataloader_type", "output_log")
        data.data_sampler = _OneRow(**{name: getattr(data.data_sampler, name) for name in sizes})
    return data


class _OneRow(MegatronDataSampler):
    """Tells Megatron's schedule the shape of a micro batch whose documents TrainedModel has separated in one row."""

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        step = super().on_megatron_step_start(step)
        return replace(step, seq_length=step.seq_length * step.micro_batch_size, micro_batch_size=1)
