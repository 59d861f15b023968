"""Other projects' distillation losses as contenders of model/head_benchmark.py, each by its own code.

NeMo and ModelOpt take logits: the heads before them are Megatron's own column-parallel product, with the all-reduce of
the hidden states' gradient as in training, and the reduction after them is the one their trainers apply. Liger takes
hidden states and heads, on one GPU. Nothing is imported before it is asked for; what is missing raises Unavailable.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pipelines.model.head_benchmark import Contender, Heads
from pipelines.model.measure import Unavailable

_MODELOPT = "modelopt.torch.distill.plugins.megatron"
_NEMO = "nemo.collections.llm.modelopt.distill"


def nemo(tensor_parallel: int) -> Contender:
    """NeMo 2's LogitsKLLoss with the reduction of its DistillationGPTModel."""
    loss = imported(f"{_NEMO}.loss").LogitsKLLoss(_config(tensor_parallel))
    reduction = imported(f"{_NEMO}.model")._DistillationLossReduction(distillation_loss_fn=None)

    def contender(heads: Heads) -> Tensor:
        mask = torch.ones(1, heads.student_hidden.shape[0], device=heads.student_hidden.device)
        return reduction._masked_token_loss(loss(*_megatron_logits(heads)), mask)

    return contender


def modelopt(tensor_parallel: int) -> Contender:
    """ModelOpt's LogitsKLLoss for Megatron, which Megatron-Bridge trains with."""
    loss = imported(_MODELOPT).LogitsKLLoss(_config(tensor_parallel))

    def contender(heads: Heads) -> Tensor:
        per_token, tp_reduce, _ = loss(*_megatron_logits(heads))
        mean = per_token.float().mean()
        if tp_reduce and heads.ranks > 1:  # the value alone; each rank's gradient is whole already
            dist.all_reduce(mean, group=heads.group)
        return mean

    return contender


def liger(tensor_parallel: int, device: torch.device) -> Contender:
    """Liger's fused-linear JSD at beta 0, which is the forward KL; one rank and Triton only."""
    module = imported("liger_kernel.transformers.fused_linear_jsd")
    if device.type != "cuda":
        raise Unavailable("Liger's kernels run on a GPU alone")
    if tensor_parallel > 1:
        raise Unavailable("Liger's loss knows no tensor parallelism")
    loss = module.LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)
    return lambda heads: loss(heads.student_hidden, heads.student_head, heads.teacher_hidden, heads.teacher_head, None)


def _config(tensor_parallel: int) -> TransformerConfig:
    """All that the losses read of a model is its tensor-parallel size."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=tensor_parallel,
        num_attention_heads=tensor_parallel,
        tensor_model_parallel_size=tensor_parallel,
    )


def _megatron_logits(heads: Heads) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits of this rank's vocabulary, (tokens, 1, vocabulary / tp)."""
    with torch.no_grad():
        teacher = F.linear(heads.teacher_hidden.unsqueeze(1), heads.teacher_head)
    student = linear_with_grad_accumulation_and_async_allreduce(
        heads.student_hidden.unsqueeze(1),
        heads.student_head,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=heads.ranks > 1,
        sequence_parallel=False,
        tp_group=heads.group,
    )
    return student, teacher


def imported(name: str) -> Any:
    """A peer's module. Raises Unavailable where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is missing, or whose own imports fail on this machine
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None


FACTORIES: dict[str, Callable[..., Contender]] = {"nemo": nemo, "modelopt": modelopt, "liger": liger}
