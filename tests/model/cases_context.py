"""What runs in the ranks of test_context.py: context parallelism but for attention, which needs Transformer Engine."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from pipelines.model import build, pair, parallel
from pipelines.model.step import training_step, wrap
from pipelines.model.weights import load_hugging_face
from tests.model.cases_step import SEQUENCE, STUDENT, TEACHER, random_batches, write_models


def _without_attention(model: Any, tokens: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> torch.Tensor:
    """Hidden states that depend on their own token and its place alone."""
    places = position_ids.t().unsqueeze(-1)
    if model.config.sequence_parallel:
        group = parallel_state.get_tensor_model_parallel_group()
        places = places.chunk(group.size())[group.rank()]
    states = model.embedding(tokens, position_ids) * (1 + places / 7)
    return model.decoder.final_layernorm(states)


def step(directory: Path, tensor: int = 1, context: int = 1, sequence_parallel: bool = False) -> dict[str, Any]:
    """A step's means, and the gradients of what takes part, whole sequences or cut over `context` ranks."""
    parallel.initialize(tensor, 1, context)
    write_models(directory)
    models = []
    for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
        # 1 for the layers, which are not run; the process groups are those of `context` ranks.
        config = build.transformer_config(shape, sequence_parallel=sequence_parallel, context_parallel_size=1)
        models.append(build.build_model(shape, config=config, sequence_length=SEQUENCE))
        load_hugging_face(models[-1], directory / name, shape)
    made = pair.DistillationPair(*models, vocab_size=STUDENT.vocab_size, kd_weight=0.7, ce_weight=0.3)
    model = wrap(made)
    with mock.patch.object(pair, "hidden_states", _without_attention):
        means = training_step(model, random_batches(3, 1, STUDENT.vocab_size)[0])
    names = ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight")
    found = {name: p.main_grad.numpy().copy() for name, p in made.student.named_parameters() if name in names}
    return {"means": means, "gradients": found, "tokens": means["tokens"]}


def places(context: int) -> dict[str, Any]:
    """Of this rank: the positions of its tokens, those of its rotary angles, and whether labels still follow tokens."""
    parallel.initialize(1, 1, context)
    config = build.transformer_config(STUDENT, context_parallel_size=1)
    model = build.build_model(STUDENT, config=config, sequence_length=SEQUENCE)
    rows = torch.arange(2 * (SEQUENCE + 1)).view(2, -1)
    batch = {
        "tokens": rows[:, :-1].contiguous(),
        "labels": rows[:, 1:].contiguous(),
        "position_ids": torch.arange(SEQUENCE).expand(2, -1).contiguous(),
        "loss_mask": torch.ones(2, SEQUENCE),
    }
    cut = get_batch_on_this_cp_rank(batch)
    angles = model.rotary_pos_emb(SEQUENCE)[:, 0, 0, 0]  # of the fastest frequency, which is 1
    return {
        "positions": cut["position_ids"][0].tolist(),
        "angles": (angles / model.rotary_pos_emb.inv_freq[0]).round().int().tolist(),
        "labels follow": torch.equal(cut["labels"], cut["tokens"] + 1),
        "rank": parallel_state.get_context_parallel_rank(),
        "data": (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
        "world": dist.get_world_size(),
    }
