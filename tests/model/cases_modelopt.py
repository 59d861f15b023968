"""Runs on one rank of its own: ModelOpt 0.37's `mcore_minitron` on a teacher's weights, and our scores beside it.

Importing ModelOpt changes torch and Megatron for the whole process.
"""

from itertools import permutations
from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from pipelines.core.importance import Scores
from pipelines.core.selection import select
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model, transformer_config
from pipelines.model.scoring import score
from pipelines.model.slicing import slice_checkpoint
from pipelines.model.weights import load_hugging_face
from tests.model.cases_scoring import as_numpy, make_batches

# Our parameter names to those of Megatron's local spec, whose norms are modules of their own.
_NORMS = {"linear_qkv.layer_norm_weight": "input_layernorm", "linear_fc1.layer_norm_weight": "pre_mlp_layernorm"}


def both(directory: str, samples: int, length: int, micro_batch_size: int) -> dict[str, dict[str, Any]]:
    """{"ours": scores, "modelopt": scores} from the same weights and batches at TP=1."""
    found, local, batches = _scored(directory, samples, length, micro_batch_size)
    theirs = _pruned(local, batches, {"hidden_size": 64, "ffn_hidden_size": 64})
    return {"ours": as_numpy(found), "modelopt": {name: numpy.asarray(value) for name, value in theirs.items()}}


def pruned_weights(
    directory: str, student: str, samples: int, length: int, micro_batch_size: int, sizes: dict[str, int]
) -> dict[str, bool]:
    """{parameter: whether it is the same} of our student and ModelOpt's, both pruned by their own scores at TP=1.

    student: an empty place for ours. sizes: ModelOpt's names. ModelOpt leaves what it prunes in the order of its
    scores, and with heads the KV groups in one of its own: ours is put into that order.
    """
    scores, local, batches = _scored(directory, samples, length, micro_batch_size)
    teacher = read_shape(directory)
    groups = teacher.num_key_value_heads
    kept = select(
        scores,
        hidden_size=teacher.hidden_size,
        ffn_size=teacher.intermediate_size,
        heads=teacher.num_attention_heads,
        groups=groups,
        layers=teacher.num_hidden_layers,
        keep_hidden=sizes.get("hidden_size"),
        keep_ffn=sizes.get("ffn_hidden_size"),
        keep_heads=sizes.get("num_attention_heads"),
    )
    slice_checkpoint(directory, student, teacher, kept)
    shape = read_shape(student)
    model = build_model(shape, sequence_length=length)
    load_hugging_face(model, student, shape)
    _pruned(local, batches, sizes)
    hidden = _order(scores.hidden, kept.hidden)
    found = {}
    for name, value in model.state_dict().items():
        if value is None:
            continue
        theirs = local.state_dict()[_local_name(name)]
        if "layers" not in name:
            found[name] = torch.equal(value[..., hidden], theirs)
            continue
        number = int(name.split(".")[2]) + 1
        ffn = _order(scores.ffn[number - 1], kept.ffn[number])
        heads = [list(range(len(row))) for row in _rows(kept.heads[number], groups)]
        if "num_attention_heads" in sizes:
            heads = [_order(scores.heads[number - 1], row) for row in _rows(kept.heads[number], groups)]
        found[name] = any(
            torch.equal(_ordered(name, value, shape, hidden, ffn, heads, list(order)), theirs)
            for order in permutations(range(groups))
        )
    assert len(found) == 3 + 6 * teacher.num_hidden_layers
    return found


def _order(scores: torch.Tensor, kept: list[int]) -> list[int]:
    """Positions in `kept`, from the highest score to the lowest."""
    return torch.sort(scores[kept], descending=True, stable=True).indices.tolist()


def _rows(heads: list[int], groups: int) -> list[list[int]]:
    size = len(heads) // groups
    return [heads[start : start + size] for start in range(0, len(heads), size)]


def _ordered(
    name: str,
    value: torch.Tensor,
    shape: ModelShape,
    hidden: list[int],
    ffn: list[int],
    heads: list[list[int]],
    groups: list[int],
) -> torch.Tensor:
    """A layer's parameter with its channels, neurons, heads and groups in the given order. heads: of each group."""
    if "layer_norm" in name:
        return value[hidden]
    if "linear_fc1" in name:
        return value.unflatten(0, (2, -1))[:, ffn][..., hidden].flatten(0, 1)
    if "linear_fc2" in name:
        return value[hidden][:, ffn]
    queries = shape.num_attention_heads // shape.num_key_value_heads
    if "linear_qkv" in name:
        each = value.unflatten(0, (len(groups), queries + 2, shape.head_dim))[..., hidden]
        return torch.cat([each[g][[*heads[g], queries, queries + 1]] for g in groups]).flatten(0, 1)
    each = value[hidden].unflatten(1, (len(groups), queries, shape.head_dim))
    return torch.cat([each[:, g][:, heads[g]] for g in groups], dim=1).flatten(1)


def _scored(
    directory: str, samples: int, length: int, micro_batch_size: int
) -> tuple[Scores, GPTModel, list[dict[str, torch.Tensor]]]:
    """Our scores, the same model in Megatron's local spec, and the batches."""
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
    return found, local, batches


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


def _pruned(model: GPTModel, batches: list[dict[str, torch.Tensor]], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Prune the model in place to ModelOpt's sizes. Returns its scores."""
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
        found["block_influence"] = torch.tensor([layer._scores for layer in layers]) / len(batches)

    pruning.prune(
        model,
        mode="mcore_minitron",
        constraints={"export_config": sizes},
        dummy_input=None,
        config={"forward_loop": calibrate},
    )
    return found
