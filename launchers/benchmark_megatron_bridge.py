"""Megatron-Bridge's distillation on the shapes of `stage=benchmark`: the same rows, by Megatron-Bridge's own trainer.

Runs in NVIDIA's container that holds Megatron-Bridge, where launchers/benchmark_megatron_bridge.sh starts it:

    torchrun --nproc-per-node=8 launchers/benchmark_megatron_bridge.py experiment=benchmark_gpu parallel=tp8

Arguments are those of `python -m pipelines stage=benchmark`. It writes the same random weights, converts them with
AutoBridge, trains `benchmark.warmup + benchmark.rounds` steps on mock data, and adds a row named "megatron-bridge" to
<run.directory>/benchmark/steps.json, for the first of benchmark.micro_batch_sizes: its trainer runs once per process.
Interface: Megatron-Bridge's "Knowledge Distillation" and
"Training Entry Points" pages, and ModelOpt's examples/megatron_bridge/distill.py for nvcr.io/nvidia/nemo:26.02.
"""

import datetime
import functools
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines import artifacts, files, planning  # noqa: E402
from pipelines.compose import compose  # noqa: E402
from pipelines.config import Config, Layout, layout  # noqa: E402
from pipelines.model.random_model import write_random_model  # noqa: E402
from pipelines.report import benchmark as table  # noqa: E402


class Clock:
    """Seconds from one step's first micro batch to the next one's, and the peak of memory, on this rank."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches, self.calls, self.starts = micro_batches, 0, []

    def wrap(self, forward_step: Any) -> Any:
        @functools.wraps(forward_step)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.calls % self.micro_batches == 0:
                torch.cuda.synchronize()
                self.starts.append(time.perf_counter())
                if self.calls == 0:
                    self.held = torch.cuda.memory_allocated()
            if self.calls == self.micro_batches:  # the optimizer's state is there from here on
                self.held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.calls += 1
            return forward_step(*args, **kwargs)

        return timed

    def seconds(self, warmup: int) -> list[float]:
        steps = [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]
        return steps[warmup:]

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self.held


def provider(directory: Path, config: Config, ranks: Layout) -> Any:
    from megatron.bridge import AutoBridge

    model = AutoBridge.from_hf_pretrained(str(directory)).to_megatron_provider(load_weights=True)
    model.tensor_model_parallel_size = ranks.tensor
    model.sequence_parallel = ranks.sequence_parallel
    model.pipeline_model_parallel_size = 1
    model.pipeline_dtype = torch.bfloat16
    model.context_parallel_size = 1
    model.seq_length = config.benchmark.sequence_length
    return model


def settings(config: Config, ranks: Layout, models: Path, micro_batch_size: int) -> Any:
    """Megatron-Bridge's ConfigContainer: logits alone, no recompute, no checkpoint, no validation."""
    from megatron.bridge.models.distillation_provider import convert_to_distillation_provider
    from megatron.bridge.recipes.utils.optimizer_utils import distributed_fused_adam_with_cosine_annealing
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        LoggerConfig,
        MockGPTDatasetConfig,
        RNGConfig,
        TokenizerConfig,
        TrainingConfig,
    )
    from megatron.bridge.training.post_training.distillation import ModelOptDistillConfig
    from megatron.core.distributed import DistributedDataParallelConfig

    benchmark = config.benchmark
    steps = benchmark.warmup + benchmark.rounds + 2  # the first makes the optimizer's state, the last ends the clock
    pair = convert_to_distillation_provider(
        provider(models / "student", config, ranks),
        provider(models / "teacher", config, ranks),
        ModelOptDistillConfig(skip_lm_loss=True),
    )
    optimizer, scheduler = distributed_fused_adam_with_cosine_annealing(
        lr_warmup_iters=1, lr_decay_iters=steps, max_lr=1e-5, min_lr=1e-5
    )
    return ConfigContainer(
        model=pair,
        train=TrainingConfig(
            train_iters=steps,
            eval_interval=10 * steps,
            eval_iters=0,
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size * benchmark.micro_batches * ranks.data,
        ),
        optimizer=optimizer,
        scheduler=scheduler,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
        ),
        dataset=MockGPTDatasetConfig(
            seq_length=benchmark.sequence_length,
            random_seed=config.run.seed,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            num_dataset_builder_threads=1,
            data_sharding=True,
            dataloader_type="single",
            skip_getting_attention_mask_from_dataset=True,
        ),
        logger=LoggerConfig(log_interval=steps),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=pair.vocab_size),
        checkpoint=CheckpointConfig(save=None, load=None),
        rng=RNGConfig(seed=config.run.seed),
        mixed_precision="bf16_mixed",
    )


def measure(config: Config, ranks: Layout, models: Path, micro_batch_size: int) -> dict[str, Any]:
    from megatron.bridge.training.gpt_step import forward_step_modelopt
    from megatron.bridge.training.pretrain import pretrain

    clock = Clock(config.benchmark.micro_batches)
    pretrain(settings(config, ranks, models, micro_batch_size), clock.wrap(forward_step_modelopt))
    teacher = planning.teacher_shape(config)
    student = planning.target_shape(teacher, config.student)
    length = config.benchmark.sequence_length
    tokens = micro_batch_size * length * config.benchmark.micro_batches * ranks.data
    times = clock.seconds(1 + config.benchmark.warmup)
    seconds = statistics.median(times)
    return {
        "name": "megatron-bridge",
        "tokens": tokens,
        "vocabulary": student.vocab_size,
        "micro_batch_size": micro_batch_size,
        "sequence_length": length,
        "student_parameters": student.parameters(),
        "teacher_parameters": teacher.parameters(),
        "seconds": seconds,
        "fastest_seconds": min(times),
        "peak_bytes_beyond_state": clock.peak_bytes(),
        "loss": None,  # of other tokens
        "tokens_per_second": tokens / seconds,
        "largest_micro_batch": None,
        "tensor_parallel": ranks.tensor,
        "dtype": "bf16",
        "device": torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "commit": None,
        "date": datetime.date.today().isoformat(),
    }


def main(overrides: list[str]) -> None:
    config = compose([*overrides, "stage=benchmark"])
    ranks = layout(config.parallel)
    directory = artifacts.stage_directory(config, "benchmark")
    models = directory / "models"
    teacher = planning.teacher_shape(config)
    shapes = {"teacher": teacher, "student": planning.target_shape(teacher, config.student)}
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    first = torch.distributed.get_rank() == 0
    if first:
        for number, (name, shape) in enumerate(shapes.items()):
            write_random_model(models / name, shape, config.run.seed + number, "bfloat16")
    torch.distributed.barrier()
    row = measure(config, ranks, models, config.benchmark.micro_batch_sizes[0])
    if first:
        rows = table.merged(table.read(directory, table.STEPS), [row], table.STEPS)
        files.write_json(directory / table.STEPS.file, rows)
        print(" | ".join(table.cells(row, rows, table.STEPS)))
        shutil.rmtree(models)


if __name__ == "__main__":
    main(sys.argv[1:])
