"""AdamW for Megatron's optimizers: Transformer Engine's, Apex's, or torch's, which is the only one on the CPU.

For the last Megatron takes torch.optim.AdamW, which keeps the step count as a tensor per parameter. Megatron's
distributed optimizer trains with that and then cannot save it. Here, as in the fused optimizers of Transformer Engine
and Apex, the step count is a number in the parameter group. The arithmetic is torch's own.
"""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from pipelines.config import UserError
from pipelines.model import cpu_runtime

FUSED = {"transformer_engine": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}


class Adam(torch.optim.Optimizer):
    """AdamW (adam_w_mode=True) or Adam with L2 regularization, with the state layout of Apex's FusedAdam."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            on_gpu = parameters[0].is_cuda
            step = torch.tensor(float(group["step"] - 1), device=parameters[0].device if on_gpu else "cpu")
            (adamw if self.adam_w_mode else adam)(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [step.clone() for _ in parameters],
                foreach=not on_gpu,
                fused=on_gpu,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install(choice: str = "auto") -> str:
    """Give Megatron the Adam of `choice`: transformer_engine, apex, torch (this one), or auto, the first that is there.

    Transformer Engine's and Apex's are CUDA kernels: on the CPU auto is torch. Returns the name of the one in use.
    Raises UserError where the one asked for is not installed.
    """
    import megatron.core.optimizer as optimizer
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    on_cpu = cpu_runtime.is_installed()
    if on_cpu:
        clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
        clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
        clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    name, found = chosen(choice)
    optimizer.Adam = distrib_optimizer.Adam = found
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = name == "transformer_engine"
    distrib_optimizer.USING_APEX_OPTIMIZER = not distrib_optimizer.USING_TE_OPTIMIZER
    return in_words((name, found))


def chosen(choice: str = "auto") -> tuple[str, Any]:
    """(name, class) that `install` takes for a choice. Raises UserError where the one asked for is not installed."""
    return ("torch", Adam) if cpu_runtime.is_installed() and choice == "auto" else _named(choice)


def in_words(found: tuple[str, Any]) -> str:
    if found[1] is not Adam:
        return f"{found[1].__module__}.{found[1].__name__}"
    return "torch AdamW" + ("" if cpu_runtime.is_installed() else ", fused")


def _named(choice: str) -> tuple[str, Any]:
    for name, module in FUSED.items():
        if choice in (name, "auto"):
            try:
                return name, importlib.import_module(module).FusedAdam
            except ImportError as error:
                if choice == name:
                    raise UserError(
                        f"optimizer={choice}: expected {module}.FusedAdam, found none: {error}. Use optimizer=auto, or "
                        "NVIDIA's container."
                    ) from None
    return "torch", Adam
