"""One training run with NeMo's Trainer and MegatronStrategy, continued from its last checkpoint where there is one."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo import lightning as nl
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision
from nemo.lightning.pytorch.trainer import configure_no_restart_validation_training_loop

from pipelines import console
from pipelines.model import adam, parallel
from pipelines.trainer.callbacks import Checkpoints, Metrics, whole_checkpoints
from pipelines.trainer.module import TrainedModel, unwrap


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
    distributed_optimizer: bool
    validation_interval: int
    validation_batches: int
    checkpoint_interval: int
    keep_checkpoints: int
    log_interval: int


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
) -> tuple[MegatronModule, dict[str, float]]:
    """Train to schedule.steps. Returns the trained module, unwrapped, and the figures of the last validation.

    config, build: see TrainedModel. blend: for "train" and "validation" Megatron's list of weights and
    prefixes. Writes checkpoints/, metrics.jsonl, tensorboard/ and data_index/ under directory. Every rank calls it.
    """
    console.say(f"{description}  optimizer: {adam.install()}")
    checkpoints, data_index = directory / "checkpoints", directory / "data_index"
    found = whole_checkpoints(checkpoints)
    for damaged in sorted(set(checkpoints.glob("step-*")) - set(found)):
        console.say(f"{description}  leaves out {damaged}: its files are not of the sizes they were written with")
    if found:
        console.say(f"{description}  continues from {found[-1]}")
    elif console.rank() == 0:
        # Megatron writes its index in place and would take one that a kill cut short for whole.
        shutil.rmtree(data_index, ignore_errors=True)
    # NeMo takes one training run per process for granted.
    unset_num_microbatches_calculator()
    metrics = Metrics(
        directory,
        description=description,
        steps=schedule.steps,
        tokens_per_step=schedule.global_batch_size * schedule.sequence_length,
        log_interval=schedule.log_interval,
    )
    saving = Checkpoints(
        checkpoints,
        interval=schedule.checkpoint_interval,
        keep=schedule.keep_checkpoints,
        steps=schedule.steps,
    )
    model = TrainedModel(config, build, _optimizer(schedule))
    trainer = _trainer(schedule, config, device, [metrics, *callbacks, saving])
    data = _data(schedule, blend, tokenizer, data_index, seed)
    trainer.fit(model, data, ckpt_path=str(found[-1]) if found else None)
    # Lightning moves what it has trained to the CPU, where nccl cannot gather it.
    return unwrap(model.module).to(parallel.torch_device(device)), metrics.last_validation


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
            # Megatron's check ends the process without a word to the user; ours is in callbacks.Metrics.
            check_for_nan_in_grad=False,
        ),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,
        # NeMo's progress printer makes a collective on rank 0 alone: the run hangs at the next checkpoint.
        replace_progress_bar=False,
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=local,
        num_nodes=int(os.environ.get("WORLD_SIZE", "1")) // local,
        strategy=strategy,
        plugins=[MegatronMixedPrecision("bf16-mixed")] if schedule.precision == "bf16" else None,
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
    # Lightning's own loop would begin a resumed run with the validation that its checkpoint has behind it.
    configure_no_restart_validation_training_loop(trainer)
    # After construction: NeMo's Trainer makes deep copies of its arguments.
    trainer.callbacks.extend(callbacks)
    return trainer


def _data(
    schedule: Schedule, blend: dict[str, list[str]], tokenizer: Path, index_directory: Path, seed: int
) -> PreTrainingDataModule:
    index_directory.mkdir(parents=True, exist_ok=True)
    data: Any = PreTrainingDataModule(
        # A test split must be named; it is not read.
        paths={"train": blend["train"], "validation": blend["validation"], "test": blend["validation"]},
        seq_length=schedule.sequence_length,
        micro_batch_size=schedule.micro_batch_size,
        global_batch_size=schedule.global_batch_size,
        tokenizer=AutoTokenizer(str(tokenizer)),
        num_workers=0,
        seed=seed,
        split=None,
        index_mapping_dir=str(index_directory),
        output_log=False,
    )
    # NeMo asks for a mask tensor where Transformer Engine is missing; no layer of ours takes one.
    data.create_attention_mask = False
    return data
