"""Runs on one rank of its own: ModelOpt 0.37's `mcore_minitron` on a teacher's weights, and our scores beside it.

Importing ModelOpt changes torch and Megatron for the whole process.
"""

from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model, transformer_config
from pipelines.model.scoring import score
from pipelines.model.weights import load_hugging_face
from tests.model.cases_scoring import as_numpy, make_batches

# Our parameter names to those of Megatron's local spec, whose norms are modules of their own.
_NORMS = {"linear_qkv.layer_norm_weight": "input_layernorm", "linear_fc1.layer_norm_weight": "pre_mlp_layernorm"}


def both(directory: str, samples: int, length: int, micro_batch_size: int) -> dict[str, dict[str, Any]]:
    """{"ours": scores, "modelopt": scores} from the same weights and batches at TP=1."""
    parallel.initialize(1)
    assert parallel_state.get_data_parallel_world_size() == 1
    shape = read_shape(directory)
    ours = build_model(shape, sequence_length=length)
    load_hugging_face(ours, directory, shape)
    tokens = torch.randint(0, shape.vocab_size, (samples, length), generator=torch.Generator().manual_seed(3))
    batches = list(make_batches(tokens, torch.ones(samples, length), micro_batch_size))
    found = score(ours, batches, micro_batch_size=micro_batch_size)
    local = _local_model(shape, length)
    local.load_state_dict({_local_name(name): value for name, value in ours.state_dict().items() if value is not None})
    return {"ours": as_numpy(found), "modelopt": _modelopt_scores(local, batches, len(batches))}


def _local_model(shape: ModelShape, length: int) -> GPTModel:
    return GPTModel(
        transformer_config(shape),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=length,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
    )


def _local_name(name: str) -> str:
    for ending, norm in _NORMS.items():
        if name.endswith(ending):
            return f"{name.removesuffix(ending).rsplit('.', 2)[0]}.{norm}.weight"
    return name


def _modelopt_scores(model: GPTModel, batches: list[dict[str, torch.Tensor]], count: int) -> dict[str, Any]:
    import modelopt.torch.prune as pruning
    from modelopt.torch.nas.plugins.megatron import DMRegistry, _DynamicLayerNorm, _DynamicMCoreLanguageModel
    from modelopt.torch.nas.traced_hp import TracedHp

    if torch.nn.RMSNorm not in DMRegistry:

        @DMRegistry.register({torch.nn.RMSNorm: "torch.nn.RMSNorm"})  # the local spec's norm without Transformer Engine
        class _DynamicRMSNorm(_DynamicLayerNorm):
            def _setup(self) -> None:
                sizes = list(self.normalized_shape)
                sizes[-1] = TracedHp(list(range(1, sizes[-1] + 1)))
                self._register_hparam("num_features", sizes[-1])
                self._register_dynamic_attribute("weight", self._cut_to_active_features)
                self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    length = batches[0]["tokens"].shape[1]
    future = torch.ones(1, 1, length, length).tril() < 0.5
    found: dict[str, Any] = {}

    def calibrate(converted: Any) -> None:
        for batch in batches:
            converted(batch["tokens"], batch["position_ids"], future)
        unwrapped = next(m for m in converted.modules() if isinstance(m, _DynamicMCoreLanguageModel))
        layers = unwrapped.decoder.layers
        found["hidden"] = unwrapped._estimate_hidden_size_importance()
        found["ffn"] = torch.stack([layer.mlp._estimate_importance() for layer in layers])
        found["heads"] = torch.stack([layer.self_attention._estimate_all_head_importance() for layer in layers])
        found["block_influence"] = torch.tensor([layer._scores for layer in layers]) / count

    pruning.prune(
        model,
        mode="mcore_minitron",
        constraints={"export_config": {"hidden_size": 64, "ffn_hidden_size": 64}},
        dummy_input=None,
        config={"forward_loop": calibrate},
    )
    return {name: numpy.asarray(value) for name, value in found.items()}
