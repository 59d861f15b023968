"""What a model family is made of: one table of tensors, read by planning, weights in and out, and pruning alike.

A family is the list of its tensors: the Hugging Face name, what each axis counts, and where the tensor goes in
Megatron. Parameter counts, tensor-parallel slices and pruning slices all follow from that list. A new family is a
new entry in `FAMILIES`. Imports no torch.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.config import UserError

LAYER = "{layer}"


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor of a family.

    axes: what each dim counts, of "vocabulary", "hidden", "ffn", "query" (heads * head_dim) and "key_value"
    (KV groups * head_dim).
    parallel_dim: the dim that tensor parallelism cuts; None: replicated.
    megatron: the Megatron parameter it goes into; part: its place there where several tensors share one parameter
    ("query", "key", "value" interleaved by KV group; "gate", "up" stacked).
    """

    name: str
    axes: tuple[str, ...]
    megatron: str
    parallel_dim: int | None = None
    part: str = ""

    @property
    def per_layer(self) -> bool:
        return LAYER in self.name


@dataclass(frozen=True)
class Family:
    architecture: str
    model_type: str
    tensors: tuple[Tensor, ...]
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")


_ATTENTION = "decoder.layers.{layer}.self_attention"
_MLP = "decoder.layers.{layer}.mlp"
_HF_ATTENTION = "model.layers.{layer}.self_attn"
_HF_MLP = "model.layers.{layer}.mlp"

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_LLAMA_TENSORS = (
    Tensor(EMBEDDING, ("vocabulary", "hidden"), "embedding.word_embeddings.weight", 0),
    Tensor("model.layers.{layer}.input_layernorm.weight", ("hidden",), f"{_ATTENTION}.linear_qkv.layer_norm_weight"),
    Tensor(f"{_HF_ATTENTION}.q_proj.weight", ("query", "hidden"), f"{_ATTENTION}.linear_qkv.weight", 0, "query"),
    Tensor(f"{_HF_ATTENTION}.k_proj.weight", ("key_value", "hidden"), f"{_ATTENTION}.linear_qkv.weight", 0, "key"),
    Tensor(f"{_HF_ATTENTION}.v_proj.weight", ("key_value", "hidden"), f"{_ATTENTION}.linear_qkv.weight", 0, "value"),
    Tensor(f"{_HF_ATTENTION}.o_proj.weight", ("hidden", "query"), f"{_ATTENTION}.linear_proj.weight", 1),
    Tensor("model.layers.{layer}.post_attention_layernorm.weight", ("hidden",), f"{_MLP}.linear_fc1.layer_norm_weight"),
    Tensor(f"{_HF_MLP}.gate_proj.weight", ("ffn", "hidden"), f"{_MLP}.linear_fc1.weight", 0, "gate"),
    Tensor(f"{_HF_MLP}.up_proj.weight", ("ffn", "hidden"), f"{_MLP}.linear_fc1.weight", 0, "up"),
    Tensor(f"{_HF_MLP}.down_proj.weight", ("hidden", "ffn"), f"{_MLP}.linear_fc2.weight", 1),
    Tensor("model.norm.weight", ("hidden",), "decoder.final_layernorm.weight"),
    Tensor(HEAD, ("vocabulary", "hidden"), "output_layer.weight", 0),
)

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", _LLAMA_TENSORS),
        Family("MistralForCausalLM", "mistral", _LLAMA_TENSORS),
    )
}


@dataclass(frozen=True)
class ModelShape:
    """The shape of one model, in the words of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    architecture: str = "LlamaForCausalLM"

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    def axis_size(self, axis: str) -> int:
        return {
            "vocabulary": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
        }[axis]

    def tensors(self) -> dict[str, Tensor]:
        """Every Hugging Face tensor of the model by its full name, layer by layer, in the order of the forward pass."""
        table = [t for t in self.family.tensors if not (t.name == HEAD and self.tie_word_embeddings)]
        first = next(i for i, t in enumerate(table) if t.per_layer)
        last = max(i for i, t in enumerate(table) if t.per_layer)
        entries = list(table[:first])
        for layer in range(self.num_hidden_layers):
            entries += [_at_layer(t, layer) for t in table[first : last + 1]]
        entries += table[last + 1 :]
        return {t.name: t for t in entries}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.axis_size(axis) for axis in t.axes) for name, t in self.tensors().items()}

    def parameters(self) -> int:
        return sum(_product(shape) for shape in self.tensor_shapes().values())

    def non_embedding_parameters(self) -> int:
        """Parameters without the embedding and the output head."""
        return sum(_product(s) for name, s in self.tensor_shapes().items() if name not in (EMBEDDING, HEAD))

    def replace(self, **changes: Any) -> "ModelShape":
        return replace(self, **changes)

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any]) -> "ModelShape":
        """config: the content of a config.json. Raises UserError for what is not supported, by name."""
        if not isinstance(config, dict):
            raise UserError(f"config.json: expected an object with names and values, found {type(config).__name__}.")
        architecture = (config.get("architectures") or ["(none)"])[0]
        if architecture not in FAMILIES:
            raise UserError(
                f"model architecture: expected one of {', '.join(FAMILIES)}, found {architecture}. "
                "Only these families can be read; an entry in pipelines/families.py adds another."
            )
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UserError(
                    f"config.json has {key}=true: expected a {architecture} without biases. "
                    "Biases have no entry in pipelines/families.py."
                )
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json has hidden_act={config['hidden_act']!r}: expected 'silu'.")
        if config.get("quantization_config"):
            raise UserError("config.json has a quantization_config: expected unquantized weights. Dequantize first.")
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            rope_theta, rope_scaling = _rope(config)
            shape = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                sliding_window=config.get("sliding_window"),
                architecture=architecture,
            )
        except KeyError as missing:
            raise UserError(
                f"config.json has no {missing.args[0]!r}: expected a complete {architecture} config."
            ) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"config.json: expected numbers where the shape stands, found: {error}.") from None
        for field in fields(shape):
            size = getattr(shape, field.name)
            if field.type is int and size < 1:
                raise UserError(f"config.json has {field.name}={size}: expected 1 or more.")
        return shape

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of a config.json; head_dim always stands in it: hidden_size / heads can be another number."""
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.family.model_type,
            "hidden_act": "silu",
            "use_cache": True,
        }
        if self.family.model_type == "llama":
            config |= {"attention_bias": False, "mlp_bias": False}
        for field in fields(self):
            if field.name == "architecture" or (field.name == "sliding_window" and self.family.model_type == "llama"):
                continue
            config[field.name] = getattr(self, field.name)
        return config


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of a Hugging Face directory's model, from its config.json.

    Raises UserError with expected, found and remedy when there is none or it is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: expected a Hugging Face model directory with a config.json, found none there.")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: expected JSON, found an error at line {error.lineno}: {error.msg}.") from None
    try:
        return ModelShape.from_hugging_face(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either spelling: rope_theta + rope_scaling, or the newer rope_parameters."""
    scaling = dict(config.get("rope_scaling") or {})
    parameters = dict(config.get("rope_parameters") or {})
    theta = float(config.get("rope_theta") or parameters.pop("rope_theta", None) or 10000.0)
    scaling = scaling or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    supported = FAMILIES[config["architectures"][0]].rope_types
    if kind not in supported:
        raise UserError(f"config.json has rope type {kind!r}: expected one of {', '.join(supported)}.")
    scaling.pop("type", None)
    return theta, {**scaling, "rope_type": kind}


def _at_layer(tensor: Tensor, layer: int) -> Tensor:
    number = str(layer)
    return replace(tensor, name=tensor.name.replace(LAYER, number), megatron=tensor.megatron.replace(LAYER, number))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
