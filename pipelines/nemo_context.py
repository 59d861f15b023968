"""What a NeMo 2 checkpoint says of its model without its weights: context/model.yaml. Imports no torch.

The file names NeMo's classes; none of them is made here, only their settings are read.
"""

from pathlib import Path
from typing import Any

from pipelines.config import UserError, expect
from pipelines.families import FAMILIES, ModelShape, check_rope_scaling
from pipelines.vocabulary import tokenizer_size

WEIGHTS, CONTEXT = "weights", "context"
# ModelShape's fields by NeMo's names.
FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "max_position_embeddings": "seq_length",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
# What a Llama has in NeMo's settings.
LLAMA = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False, "add_qkv_bias": False}
# {ours: NeMo's} of Llama 3.1's rope scaling; NeMo's Llama31Config carries the factors under names of its own.
_LLAMA3_ROPE = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
_LLAMA_FAMILY = FAMILIES["LlamaForCausalLM"]


def looks_like_nemo(directory: Path) -> bool:
    """Whether anything of a NeMo 2 checkpoint is there, whole or not."""
    return (directory / WEIGHTS).is_dir() or (directory / CONTEXT).is_dir()


def is_nemo_checkpoint(directory: Path) -> bool:
    return (directory / CONTEXT / "model.yaml").is_file() and (directory / WEIGHTS).is_dir()


def tokenizer_directories(checkpoint: Path) -> tuple[Path, ...]:
    """Where NeMo's importer and its exporters put the tokenizer."""
    return tuple(checkpoint / CONTEXT / name for name in ("nemo_tokenizer", "tokenizer"))


def read_nemo_shape(checkpoint: Path, rows: int | None = None) -> ModelShape:
    """The shape that context/model.yaml describes.

    rows: of the stored embedding, where they are known; without them and without the file's vocab_size, the
    tokenizer's ids count, padded as NeMo pads them. Raises UserError where it is no Llama's, or does not say enough.
    """
    path = checkpoint / CONTEXT / "model.yaml"
    config = _model_config(path)
    kind = str(config.get("_target_", ""))
    if "Llama" not in kind or config.get("num_moe_experts"):
        raise UserError(f"{path}: expected a Llama checkpoint of NeMo 2, found {kind or 'no model type'}.")
    for name, value in LLAMA.items():
        found = config.get(name, value)
        expect(found == value, f"{path}: {name}", f"a Llama's {value}", found, "Other models cannot be read.")
    missing = [name for name in FIELDS.values() if config.get(name) is None]
    remedy = "Convert the checkpoint to Hugging Face with NeMo, and give that as model.path."
    expect(not missing, str(path), f"the settings {', '.join(FIELDS.values())}", f"no {', '.join(missing)}", remedy)
    numbers = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    heads, groups = numbers["num_attention_heads"], config.get("num_query_groups")
    sizes = {name: value for name, value in numbers.items() if name not in ("rms_norm_eps", "rope_theta")}
    sizes |= {"num_query_groups": groups or heads, "kv_channels": config.get("kv_channels") or 1}
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if not isinstance(value, int)]
    expect(not wrong, str(path), "whole numbers as sizes", ", ".join(wrong), "Copy it again.")
    for name in ("rms_norm_eps", "rope_theta"):
        try:
            numbers[name] = float(numbers[name])  # YAML 1.1 reads 1e-05 as text
        except (TypeError, ValueError):
            raise UserError(f"{path}: {FIELDS[name]}: expected a number, found {numbers[name]!r}.") from None
    expect(heads >= 1, f"{path}: num_attention_heads", "1 or more", heads, "Copy it again.")
    shape = ModelShape(
        **numbers,
        num_key_value_heads=groups or heads,
        head_dim=config.get("kv_channels") or config["hidden_size"] // heads,
        vocab_size=_vocabulary(path, config, rows),
        rope_scaling=_rope_scaling(path, config),
    )
    shape.check(f"{path}: ")
    return shape


def _model_config(path: Path) -> dict[str, Any]:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """Reads a tagged value as if it had no tag: NeMo's classes are not made."""

    def plain(loader: Any, suffix: str, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    PlainLoader.add_multi_constructor("", plain)
    remedy = "Copy the checkpoint again, or convert it to Hugging Face and give that as model.path."
    try:
        model = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: expected NeMo's settings, found {error.strerror}. {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        found = str(error).splitlines()[0]
        raise UserError(f"{path}: expected NeMo's settings as YAML, found {found}. {remedy}") from None
    config = model.get("config") if isinstance(model, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected NeMo's settings with a model's config, found none. {remedy}")
    return config


def _vocabulary(path: Path, config: dict[str, Any], rows: int | None) -> int:
    """vocab_size, or the stored rows, or the tokenizer's ids rounded up as nemo.lightning.get_vocab_size does."""
    given = config.get("vocab_size")
    known = given if isinstance(given, int) and given > 0 else rows
    if known:
        return known
    for directory in tokenizer_directories(path.parent.parent):
        if size := tokenizer_size(directory):
            unit = (config.get("make_vocab_size_divisible_by") or 128) * (config.get("tensor_model_parallel_size") or 1)
            return -(-size // unit) * int(unit)
    raise UserError(
        f"{path}: expected vocab_size, or a tokenizer.json in {path.parent / 'nemo_tokenizer'}, found neither. "
        "Write vocab_size, the rows of the embedding, under config in that file."
    )


def _rope_scaling(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's factors; linear scaling is an interpolation."""
    if "old_context_len" in config:
        scaling = {ours: config[theirs] for ours, theirs in _LLAMA3_ROPE.items() if theirs in config}
        return check_rope_scaling(scaling | {"rope_type": "llama3"}, _LLAMA_FAMILY, f"{path}: rope scaling")
    if factor := config.get("seq_len_interpolation_factor"):
        return check_rope_scaling({"rope_type": "linear", "factor": factor}, _LLAMA_FAMILY, f"{path}: rope scaling")
    return None
