"""From a ModelShape to Megatron's TransformerConfig and GPTModel under the current process groups."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from pipelines.config import UserError
from pipelines.families import ModelShape
from pipelines.model import cpu_runtime
from pipelines.model.layers import layer_spec, uses_transformer_engine
from pipelines.model.rope import inverse_frequencies


def padded_vocabulary(vocab_size: int, tensor_parallel_size: int) -> int:
    """The rows of embedding and head: the vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def transformer_config(
    shape: ModelShape,
    *,
    sequence_parallel: bool = False,
    precision: str = "fp32",
    recompute: bool = False,
    **overrides: Any,
) -> TransformerConfig:
    """precision: "fp32", "bf16", or for a model that is not trained "fp8"; recompute: every layer's activations.

    Degrees come from Megatron's parallel_state.

    Raises UserError for shapes that the layout cannot hold, with expected, found and remedy.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    check_layout(shape, tensor=tensor, pipeline=pipeline)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]
    settings: dict[str, Any] = {
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "sequence_parallel": sequence_parallel and tensor > 1,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Weights are read from a directory, never drawn here: Megatron's random start depends on the TP size.
        "perform_initialization": False,
        "use_cpu_initialization": cpu_runtime.is_installed(),
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": uses_transformer_engine(),
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "window_size": (shape.sliding_window - 1, 0) if shape.sliding_window and uses_transformer_engine() else None,
    }
    if recompute:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if precision == "fp8":
        _check_fp8()
        settings |= FP8
    return TransformerConfig(**(settings | overrides))


# Weights lie in FP8 and nowhere else; inputs are scaled by their own greatest value, which needs no history of earlier
# ones: a frozen model has no backward pass that would keep such a history in step over the ranks.
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True}


def _check_fp8() -> None:
    if not uses_transformer_engine():
        raise UserError("fp8: expected a GPU with Transformer Engine, found none. Set the precision to bf16.")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        found = ".".join(map(str, capability))
        raise UserError(
            f"fp8: expected a GPU of compute capability 8.9 or more, found {found}. Set the precision to bf16."
        )


def build_model(
    shape: ModelShape,
    *,
    sequence_parallel: bool = False,
    precision: str = "fp32",
    recompute: bool = False,
    sequence_length: int | None = None,
    config: TransformerConfig | None = None,
) -> GPTModel:
    """The GPTModel of this rank's pipeline stage, its weights undefined until they are loaded.

    forward(input_ids, position_ids, None) gives logits (batch, sequence, padded vocabulary / tp) on the last stage.
    sequence_length: the longest sequence it will see; a sliding window shorter than it needs Transformer Engine.
    """
    length = sequence_length or shape.max_position_embeddings
    if shape.sliding_window and shape.sliding_window < length and not uses_transformer_engine():
        raise UserError(
            f"sliding window: expected at least the sequence length {length} without Transformer Engine, found "
            f"{shape.sliding_window}. Shorten the sequence or install Transformer Engine."
        )
    config = config or transformer_config(
        shape, sequence_parallel=sequence_parallel, precision=precision, recompute=recompute
    )
    # Without gradients Transformer Engine keeps no transposed copies of weights in FP8, nor what they were made from.
    with torch.set_grad_enabled(not config.fp8):
        model = GPTModel(
            config,
            layer_spec(config),
            vocab_size=padded_vocabulary(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=int(shape.rope_theta),
        )
    _mark_shards(model, shape)
    with torch.device("cpu"):  # numbers, also where the model is on the meta device and has none
        inv_freq = inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)
    model.rotary_pos_emb.inv_freq = inv_freq.to(model.rotary_pos_emb.inv_freq.device)
    return model


def _mark_shards(model: GPTModel, shape: ModelShape) -> None:
    """Tell Megatron which parameters are shards and which are replicas.

    It says so itself only where it draws random weights. Without the mark the optimizer takes every shard for a
    replica and leaves all but the first rank's out of the gradient norm, so that clipping is wrong without a word.
    """
    parallel_dims = {_within_layer(t.megatron): t.parallel_dim for t in shape.family.tensors}
    for name, parameter in model.named_parameters():
        dim = parallel_dims[_within_layer(name)]
        if dim is not None:
            for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def _within_layer(name: str) -> str:
    """A Megatron parameter's name without its layer's number."""
    return re.sub(r"^decoder\.layers\.[^.]+\.", "", name)


def check_layout(shape: ModelShape, *, tensor: int, pipeline: int) -> None:
    """Raises UserError where heads, KV groups, neurons or layers do not divide (Megatron replicates no KV groups)."""
    for what, size, degree, setting in (
        ("attention heads", shape.num_attention_heads, tensor, "parallel.tensor"),
        ("KV groups", shape.num_key_value_heads, tensor, "parallel.tensor"),
        ("ffn neurons", shape.intermediate_size, tensor, "parallel.tensor"),
        ("layers", shape.num_hidden_layers, pipeline, "parallel.pipeline"),
    ):
        if size % degree:
            raise UserError(f"{what}: expected a multiple of {setting}={degree}, found {size}. Lower {setting}.")
