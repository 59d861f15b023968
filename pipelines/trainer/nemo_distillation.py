"""NeMo 2's own distillation model and loss as a contender of model/step_benchmark.py.

What NeMo's DistillationGPTModel builds in `configure_model` is put together here from the same functions, around models
whose weights come from Hugging Face directories instead of NeMo checkpoints. Megatron's schedule runs it, with NeMo's
reduction of the loss, as NeMo's MegatronStrategy does.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from pipelines.model.step import Batch
from pipelines.model.step_benchmark import Models, Step, optimizer


def nemo(models: Models) -> Step:
    """Raises measure.Unavailable where NeMo or ModelOpt cannot be imported."""
    from pipelines.trainer.peers import imported

    model_module = imported("nemo.collections.llm.modelopt.distill.model")
    utils = imported("nemo.collections.llm.modelopt.distill.utils")
    mtd = imported("modelopt.torch.distill")
    # NeMo averages each micro batch by itself, and lets the schedule average those.
    student = models.load("student", calculate_per_token_loss=False)
    teacher = models.load("teacher", calculate_per_token_loss=False)
    settings = utils.load_distillation_config(None, student.config, teacher.config)
    modes = {
        "teacher_model": teacher,
        "criterion": settings.criterion,
        "loss_balancer": settings.loss_balancer,
    }
    pair = mtd.convert(student, mode=[("kd_loss", modes)])
    utils.adjust_distillation_model_for_mcore(pair, distill_cfg=settings)
    reduction = model_module._DistillationLossReduction(distillation_loss_fn=pair.compute_kd_loss)
    model = _wrapped(pair, distributed_optimizer=models.distributed_optimizer)
    update = optimizer(model, models)

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        device = torch.cuda.current_device()
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(reduction.forward, batch)

    def step(batches: Sequence[Batch]) -> float:
        model.train()
        model.zero_grad_buffer()
        rows, length = batches[0]["tokens"].shape
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )
        update()
        return sum(float(report["avg"]) for report in reports) / len(reports)

    return step


def _wrapped(pair: Any, *, distributed_optimizer: bool) -> DistributedDataParallel:
    """As model/step.py's `wrap`, but for the mean that NeMo takes."""
    config = pair.config
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    return DistributedDataParallel(config, ddp_config, Float16Module(config, pair) if config.bf16 else pair)
