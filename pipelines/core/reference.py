"""The float64 oracle: a Llama forward, the loss of distillation and its gradients, as plainly as they can be written.

For the verify stage and tests alone. Unsharded, gradients by autograd, tensors by their Hugging Face names. It shares
no code with what it checks: no function of the loss, the layers or rope is imported here.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Shape(Protocol):
    """What the forward pass reads of a model's shape, in the words of Hugging Face's config.json."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> dict[str, Any] | None: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class ReferenceStep(NamedTuple):
    """means: "loss", "kd", "ce", "agreement" over the valid tokens, and "tokens", their number.
    gradients: of the student's loss, by Hugging Face name."""

    means: dict[str, float]
    gradients: Tensors


class States(NamedTuple):
    """What lies inside a model: hidden[n] (batch, sequence, hidden) after layer n, hidden[0] the embedding's output;
    queries[n], keys[n] (batch, sequence, heads or KV groups, head_dim) of layer n + 1, after rotary embedding."""

    hidden: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]


def llama_logits(
    tensors: Tensors,
    shape: Shape,
    tokens: Tensor,
    states: States | None = None,
    end_of_document: int | None = None,
) -> Tensor:
    """tokens: (batch, sequence) int64 -> logits (batch, sequence, vocabulary), in the dtype of the tensors.

    states: lists to which the model's are appended. end_of_document: the id after which attention and positions begin
    anew; None: nowhere within a row.
    """
    states = states or States([], [], [])
    embedding = tensors["model.embed_tokens.weight"]
    x = embedding[tokens]
    states.hidden.append(x)
    documents, positions = _documents(tokens, end_of_document)
    hidden_from = documents[:, :, None] != documents[:, None, :]
    cosine, sine = _rope_tables(shape, positions)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        normed = _rms_norm(x, weights["input_layernorm.weight"], shape.rms_norm_eps)
        x = x + _attention(normed, weights, shape, cosine, sine, hidden_from, states)
        normed = _rms_norm(x, weights["post_attention_layernorm.weight"], shape.rms_norm_eps)
        gate = normed @ weights["mlp.gate_proj.weight"].T
        up = normed @ weights["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ weights["mlp.down_proj.weight"].T
        states.hidden.append(x)
    x = _rms_norm(x, tensors["model.norm.weight"], shape.rms_norm_eps)
    return x @ (embedding if shape.tie_word_embeddings else tensors["lm_head.weight"]).T


def distillation_step(
    student: Tensors,
    student_shape: Shape,
    teacher: Tensors,
    teacher_shape: Shape,
    tokens: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
    temperature_squared: bool = True,
    divergence: str = "forward_kl",
    divergence_parameter: float | None = None,
    top_k: int | None = None,
    end_of_document: int | None = None,
) -> ReferenceStep:
    """One step over the whole global batch: tokens, labels, mask (batch, sequence); a token counts where mask is not 0.

    loss = kd_weight * T^2 * D(teacher, student, T) + ce_weight * CE(labels, student), the mean over all that count.
    end_of_document: see llama_logits; what follows such a token does not count, since nothing there foretells it.
    """
    student = {name: t.detach().double().requires_grad_() for name, t in student.items()}
    teacher = {name: t.double() for name, t in teacher.items()}
    with torch.no_grad():
        teacher_logits = llama_logits(teacher, teacher_shape, tokens, end_of_document=end_of_document)
    student_logits = llama_logits(student, student_shape, tokens, end_of_document=end_of_document)
    softened = teacher_logits / temperature, student_logits / temperature
    kd = divergences(*softened, divergence, divergence_parameter, top_k)
    ce = -torch.log_softmax(student_logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = kd_weight * (temperature * temperature if temperature_squared else 1.0) * kd + ce_weight * ce
    agreement = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).double()
    counted = mask != 0
    if end_of_document is not None:
        counted = counted & (tokens != end_of_document)
    mean_loss = loss[counted].mean()
    gradients = torch.autograd.grad(mean_loss, list(student.values()))
    means = {
        "loss": mean_loss.item(),
        "kd": kd[counted].mean().item(),
        "ce": ce[counted].mean().item(),
        "agreement": agreement[counted].mean().item(),
        "tokens": float(counted.sum().item()),
    }
    return ReferenceStep(means, dict(zip(student, gradients, strict=True)))


def divergences(
    teacher: Tensor, student: Tensor, name: str, parameter: float | None = None, top_k: int | None = None
) -> Tensor:
    """One number per token of logits (..., vocabulary) that are divided by the temperature already.

    top_k: over the teacher's k most likely ids and one bucket for all others.
    """
    log_p, log_q = torch.log_softmax(teacher, dim=-1), torch.log_softmax(student, dim=-1)
    if top_k is not None:
        order = teacher.argsort(dim=-1, descending=True)
        log_p, log_q = (
            torch.cat([row[..., :top_k], row[..., top_k:].logsumexp(-1, keepdim=True)], dim=-1)
            for row in (log_p.gather(-1, order), log_q.gather(-1, order))
        )
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if name == "skew_kl":
        alpha = 0.1 if parameter is None else parameter
        return (p * (log_p - (alpha * p + (1 - alpha) * q).log())).sum(-1)
    if name == "jensen_shannon":
        beta = 0.5 if parameter is None else parameter
        log_m = (beta * p + (1 - beta) * q).log()
        return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    raise ValueError(f"divergence: {name} is not known here.")


def telemetry(teacher: Tensor, student: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a validation watches, one number per token, by the names of the loss's own: logits (..., vocabulary)."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return {
        "overlap": torch.minimum(p, q).sum(-1),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "student_confidence": q.max(-1).values,
        "teacher_confidence": p.max(-1).values,
        "student_correct": (q.argmax(-1) == labels).double(),
        "teacher_correct": (p.argmax(-1) == labels).double(),
    }


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def _documents(tokens: Tensor, end_of_document: int | None) -> tuple[Tensor, Tensor]:
    """The number of each token's document in its row, and its position in that document, (batch, sequence)."""
    documents, positions = [], []
    for row in tokens.tolist():
        document, position = 0, 0
        for token in row:
            documents.append(document)
            positions.append(position)
            position += 1
            if token == end_of_document:
                document, position = document + 1, 0
    numbers = torch.tensor([documents, positions], device=tokens.device).view(2, *tokens.shape)
    return numbers[0], numbers[1]


def _attention(
    x: Tensor, weights: Tensors, shape: Shape, cosine: Tensor, sine: Tensor, hidden_from: Tensor, states: States
) -> Tensor:
    """Causal grouped-query attention; x: (batch, sequence, hidden) -> the same. hidden_from: (batch, query, key)."""
    batch, sequence, _ = x.shape
    heads, groups, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    query = (x @ weights["self_attn.q_proj.weight"].T).view(batch, sequence, heads, head_dim)
    key = (x @ weights["self_attn.k_proj.weight"].T).view(batch, sequence, groups, head_dim)
    value = (x @ weights["self_attn.v_proj.weight"].T).view(batch, sequence, groups, head_dim)
    query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
    states.queries.append(query)
    states.keys.append(key)
    key, value = (t.repeat_interleave(heads // groups, dim=2) for t in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(head_dim)
    future = torch.ones(sequence, sequence, dtype=torch.bool, device=x.device).triu(1)
    probabilities = scores.masked_fill(future | hidden_from[:, None], -math.inf).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", probabilities, value).reshape(batch, sequence, heads * head_dim)
    return mixed @ weights["self_attn.o_proj.weight"].T


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x: (batch, sequence, heads, head_dim); the pair of element i is i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine[:, :, None].to(x.device), sine[:, :, None].to(x.device)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _rope_tables(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions: (batch, sequence) -> cos and sin, (batch, sequence, head_dim / 2) float64."""
    frequencies = []
    for index in range(shape.head_dim // 2):
        frequencies.append(_scaled(shape.rope_theta ** (-2 * index / shape.head_dim), shape.rope_scaling))
    angles = positions.double()[..., None] * torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    return angles.cos(), angles.sin()


def _scaled(frequency: float, scaling: dict[str, Any] | None) -> float:
    """One rope frequency under "linear" (arXiv 2306.15595) or "llama3" scaling (the Llama 3.1 release)."""
    if scaling is None:
        return frequency
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return frequency / factor
    if kind != "llama3":
        raise ValueError(f"rope scaling: expected linear or llama3, found {kind}.")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    share = (turns - low) / (high - low)
    return (1 - share) * frequency / factor + share * frequency
