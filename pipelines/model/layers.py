"""Transformer layers for Megatron's GPTModel: Transformer Engine's on GPUs that have it, plain torch elsewhere.

The plain layers carry Transformer Engine's parameter names: `linear_qkv` and `linear_fc1` own the weight of the RMSNorm
before them as `layer_norm_weight`, and its `eps`. So weights, checkpoints and hooks address one set of names on every
machine. They do causal grouped-query attention over whole sequences or over each document of a row
(model/documents.py), with tensor and sequence parallelism, and refuse anything else.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from pipelines.model import cpu_runtime


def uses_transformer_engine() -> bool:
    """Whether models are built of Transformer Engine's layers: where it is installed, but not on the CPU."""
    return bool(gpt_layer_specs.HAVE_TE) and not cpu_runtime.is_installed()


class CausalAttention(MegatronModule):
    """softmax(q k^T / sqrt(head_dim)) v, causal, by torch's scaled_dot_product_attention; no mask tensor is built."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *_: Any, **__: Any):
        super().__init__(config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"attention mask: expected causal, found {attn_mask_type}.")
        if config.context_parallel_size > 1:
            raise ValueError(
                f"context parallelism: expected 1 without Transformer Engine, found {config.context_parallel_size}. "
                "Install Transformer Engine (the NGC image has it) or set parallel.context=1."
            )
        if config.attention_dropout:
            raise ValueError(f"attention dropout: expected 0, found {config.attention_dropout}.")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query: (sequence, batch, heads / tp, head_dim); key, value: (sequence, batch, groups / tp, head_dim).

        Returns (sequence, batch, heads / tp * head_dim). With packed_seq_params all of them have no batch: one row of
        documents, each of which attends to itself alone, at the cost of its own length squared. No collectives.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "attention: expected whole causal sequences, found a mask or a bias. Those need Transformer Engine."
            )
        if packed_seq_params is None:
            return _causal(query, key, value)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        documents = zip(*(t.unsqueeze(1).split(lengths) for t in (query, key, value)), strict=True)
        return torch.cat([_causal(*document).squeeze(1) for document in documents])


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, _norm_weight(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and the column-parallel product after it, named as Transformer Engine's TELayerNormColumnParallelLinear.

    Under sequence parallelism the norm runs on the rank's own part of the sequence, before the all-gather.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps, self.layer_norm_weight = config.layernorm_epsilon, _norm_weight(config, input_size)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


def layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """What GPTModel takes as `transformer_layer_spec` on this machine."""
    if uses_transformer_engine():
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    return torch_layer_spec(config)


def torch_layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage in plain torch."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention, self_attn_bda=get_bias_dropout_add, mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _norm_weight(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    # Under sequence parallelism each rank sees its part of the sequence: Megatron sums these gradients over TP.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


def layer_input(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a layer was called with, by name or by position: for hooks."""
    found: torch.Tensor = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]
    return found
