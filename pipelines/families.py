"""What a model family is made of: one table of tensors, read by planning, weights in and out, and pruning alike.

A family is the list of its tensors: the Hugging Face name, what each axis counts, and where the tensor goes in
Megatron. Parameter counts, tensor-parallel slices and pruning slices all follow from that list. A new family is a
new entry in `FAMILIES`. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipelines.config import UserError, expect
from pipelines.files import read_object

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


_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_TYPES: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_ROPE}


@dataclass(frozen=True)
class Family:
    """rope_types: {type: the numbers that its rope_scaling must give}."""

    architecture: str
    model_type: str
    tensors: tuple[Tensor, ...]
    rope_types: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ROPE_TYPES)


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

    def check(self, where: str) -> None:
        """Raises UserError for sizes that no model can have. where: what stands before a size's name in the message."""
        for entry in fields(self):
            size = getattr(self, entry.name)
            if entry.type is int:
                expect(size >= 1, where + entry.name, "1 or more", size, "Correct it.")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            expect(0 < value < math.inf, where + name, "a number above 0", value, "Correct it.")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        expect(
            heads % groups == 0,
            f"{where}num_attention_heads",
            f"a multiple of num_key_value_heads={groups}",
            heads,
            "Change one of them.",
        )
        even = "an even number, for the rotary embedding"
        expect(self.head_dim % 2 == 0, f"{where}head_dim", even, self.head_dim, "Set head_dim.")

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any]) -> "ModelShape":
        """config: the content of a config.json. Raises UserError for what is not supported, by name."""
        architecture = _architecture(config)
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UserError(
                    f"{key}=true: expected a {architecture} without biases. "
                    "Biases have no entry in pipelines/families.py."
                )
        expect(config.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'", config.get("hidden_act"), _OTHER)
        if quantized := config.get("quantization_config"):
            method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
            raise UserError(
                f"quantization_config: expected unquantized weights, found a model quantized by {method}. Dequantize "
                "it first."
            )
        heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
        window = config.get("sliding_window")
        rope_theta, rope_scaling = _rope(config, FAMILIES[architecture])
        shape = cls(
            vocab_size=_whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(config, "intermediate_size"),
            num_hidden_layers=_whole(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(config, "num_key_value_heads", heads),
            head_dim=_whole(config, "head_dim", hidden // heads),
            max_position_embeddings=_whole(config, "max_position_embeddings", 2048),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=None if window is None else _whole(config, "sliding_window"),
            architecture=architecture,
        )
        shape.check("")
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
        for entry in fields(self):
            if entry.name == "architecture" or (entry.name == "sliding_window" and self.family.model_type == "llama"):
                continue
            config[entry.name] = getattr(self, entry.name)
        return config


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of a Hugging Face directory's model, from its config.json.

    Raises UserError with expected, found and remedy when there is none or it is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: expected a Hugging Face model directory with a config.json, found none there.")
    config = read_object(path, "Fetch it again.")
    try:
        return ModelShape.from_hugging_face(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_rope_scaling(scaling: Mapping[str, Any], family: Family, where: str) -> dict[str, Any] | None:
    """rope_scaling in one spelling (rope_type, never type), None for the default. Raises UserError.

    where: the name of the setting, for the message.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    supported = ", ".join(family.rope_types)
    known = isinstance(kind, str) and kind in family.rope_types
    expect(known, f"{where}.rope_type", f"one of {supported}", repr(kind), "Other kinds of scaling cannot be computed.")
    for name in family.rope_types[kind]:
        setting = f"{where}.{name}"
        expect(name in scaling, setting, f"a number, which rope_type={kind} needs", "none", "Give it.")
        value = scaling[name]
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        expect(good, setting, "a number above 0", repr(value), "Correct it.")
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        expect(low < high, f"{where}.low_freq_factor", f"less than high_freq_factor={high}", low, "Correct it.")
    if kind == "default":
        return None
    return {**{name: value for name, value in scaling.items() if name != "type"}, "rope_type": kind}


_OTHER = "Only what pipelines/families.py describes can be read."


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures") or "(none)"
    architecture = str(named[0] if isinstance(named, list) else named)
    if architecture not in FAMILIES:
        raise UserError(
            f"model architecture: expected one of {', '.join(FAMILIES)}, found {architecture}. "
            "Only these families can be read; an entry in pipelines/families.py adds another."
        )
    return architecture


def _whole(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """A size of a config.json; null stands for the default where there is one."""
    value = config.get(name)
    if value is None and default is None:
        raise UserError(f"{name}: expected a whole number, found none. A complete config.json has it.")
    if value is None and default is not None:
        return default
    good = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1 and value >= 1
    expect(good, name, "a whole number of 1 or more", repr(value), "Correct it.")
    return int(value or 0)


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    value = default if value is None else value
    good = isinstance(value, int | float) and not isinstance(value, bool)
    expect(good, name, "a number", repr(value), "Correct it.")
    return float(value)


def _rope(config: dict[str, Any], family: Family) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either spelling: rope_theta + rope_scaling, or the newer rope_parameters."""
    for name in ("rope_scaling", "rope_parameters"):
        good = isinstance(config.get(name) or {}, dict)
        expect(good, name, "an object with names and values", repr(config.get(name)), "Correct it.")
    parameters = dict(config.get("rope_parameters") or {})
    inner = parameters.pop("rope_theta", None)
    theta = _number({"rope_theta": config.get("rope_theta") or inner}, "rope_theta", 10000.0)
    scaling = config.get("rope_scaling")
    return theta, check_rope_scaling(scaling or parameters, family, "rope_scaling" if scaling else "rope_parameters")


def _at_layer(tensor: Tensor, layer: int) -> Tensor:
    number = str(layer)
    return replace(tensor, name=tensor.name.replace(LAYER, number), megatron=tensor.megatron.replace(LAYER, number))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
