"""Small Hugging Face teachers with random weights, as given or with parts that do nothing."""

import random
from pathlib import Path

import torch

from pipelines.core.selection import Kept
from pipelines.families import EMBEDDING, HEAD, ModelShape
from pipelines.model.hub_files import write_hub_files
from pipelines.model.safetensors_stream import Writer


def random_weights(shape: ModelShape, seed: int = 1) -> dict[str, torch.Tensor]:
    """Norm weights around 1, every other tensor with outputs of about the size of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shape.tensor_shapes().items():
        value = torch.randn(size, generator=generator)
        weights[name] = value / size[-1] ** 0.5 if len(size) > 1 else 1 + value / 4
    return weights


def write_teacher(directory: Path, shape: ModelShape, weights: dict[str, torch.Tensor]) -> Path:
    with Writer(directory, {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}) as writer:
        write_hub_files(writer.partial, shape, torch.float32)
        for name, weight in weights.items():
            writer.write(name, weight)
    return directory


def silence(weights: dict[str, torch.Tensor], shape: ModelShape, kept: Kept) -> None:
    """Change the weights so that everything outside `kept` has no effect on the logits, and scores lowest.

    Hidden: half the channels stay; every other one repeats a kept one in the residual stream, which leaves each norm's
    mean square as it is, and has norm weight 0. Neurons: the gate is 0. KV groups: values are 0. Heads: attend evenly
    (query 0), where kept ones attend sharply, and the output projection drops them. Layers: add nothing to the residual
    stream.
    """
    assert 2 * len(kept.hidden) == shape.hidden_size
    away = [channel for channel in range(shape.hidden_size) if channel not in kept.hidden]
    for name, tensor in shape.tensors().items():
        weight = weights[name]
        if name == HEAD or (tensor.axes[-1] == "hidden" and name != EMBEDDING and len(tensor.axes) == 2):
            continue
        if tensor.axes == ("hidden",):
            weight[away] = 0
        elif name == EMBEDDING:
            weight[:, away] = weight[:, kept.hidden]
        elif tensor.axes[0] == "hidden":
            weight[away] = weight[kept.hidden]
    for number in range(1, shape.num_hidden_layers + 1):
        prefix = f"model.layers.{number - 1}"
        query, value, output = (weights[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qvo")
        gate, down = (weights[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "down"))
        if number not in kept.layers:
            output.zero_()
            down.zero_()
            continue
        query *= 20
        for head in set(range(shape.num_attention_heads)) - set(kept.heads[number]):
            rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            query[rows] = 0
            output[:, rows] = 0
        for group in set(range(shape.num_key_value_heads)) - set(kept.groups[number]):
            value[group * shape.head_dim : (group + 1) * shape.head_dim] = 0
        gate[sorted(set(range(shape.intermediate_size)) - set(kept.ffn[number]))] = 0


def sample_rows(vocab_size: int, samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (samples, length), and a mask that leaves out a part of most rows and all of one."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, vocab_size, (samples, length), generator=generator)
    mask = (torch.rand(samples, length, generator=generator) < 0.8).float()
    mask[0], mask[1] = 1, 0
    return tokens, mask


def random_case(seed: int, tensor: int = 1) -> tuple[ModelShape, Kept]:
    """A random shape that `tensor` ranks can share, and what stays of it: half the hidden channels, and any part of
    neurons, KV groups, heads and layers.
    """
    draw = random.Random(seed)
    hidden, groups, per_group = 2 * draw.randint(4, 12), tensor * draw.randint(1, 3), draw.randint(1, 4)
    shape = ModelShape(
        vocab_size=draw.randint(20, 60),
        hidden_size=hidden,
        intermediate_size=tensor * draw.randint(6, 30),
        num_hidden_layers=draw.randint(2, 4),
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        head_dim=2 * draw.randint(2, 5),
        tie_word_embeddings=draw.random() < 0.5,
        architecture=draw.choice(["LlamaForCausalLM", "MistralForCausalLM"]),
    )
    layers = sorted(draw.sample(range(1, shape.num_hidden_layers + 1), draw.randint(1, shape.num_hidden_layers)))
    neurons, heads = draw.randint(1, shape.intermediate_size), draw.randint(1, per_group)
    left = draw.randint(1, groups)
    kept_groups = {n: sorted(draw.sample(range(groups), left)) for n in layers}
    kept = Kept(
        hidden=sorted(draw.sample(range(hidden), hidden // 2)),
        ffn={n: sorted(draw.sample(range(shape.intermediate_size), neurons)) for n in layers},
        heads={
            n: [g * per_group + h for g in kept_groups[n] for h in sorted(draw.sample(range(per_group), heads))]
            for n in layers
        },
        layers=layers,
        groups=kept_groups,
    )
    return shape, kept
