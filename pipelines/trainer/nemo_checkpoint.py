"""NeMo 2 checkpoints in and out: `weights/` (Megatron's distributed checkpoint) and `context/` (NeMo's configuration).

Opening one reads the settings in context/model.yaml and the weights; NeMo's pickled classes are not opened. Writing one
leaves a directory that NeMo's own `io.load_context`, exporters and trainers open.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel

from pipelines import files
from pipelines.config import UserError
from pipelines.families import EMBEDDING, ModelShape, read_shape
from pipelines.model import build, parallel
from pipelines.model.export import save_hugging_face
from pipelines.model.layers import uses_transformer_engine
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.weights import load_hugging_face
from pipelines.nemo_context import CONTEXT, FIELDS, WEIGHTS, is_nemo_checkpoint, read_nemo_shape
from pipelines.trainer import checkpoint_writer

_PREFIX = "module."
_EMBEDDING = "embedding.word_embeddings.weight"


def convert_to_hugging_face(checkpoint: Path, output: Path, tokenizer: Path) -> ModelShape:
    """Write a NeMo 2 Llama checkpoint as a Hugging Face directory, read as shards of the current layout. Collective.

    bf16 weights stay bf16; all others become fp32.

    tokenizer: a Hugging Face tokenizer directory, whose files are copied. Raises UserError for what is not a Llama
    checkpoint of NeMo 2.
    """
    if not is_nemo_checkpoint(checkpoint):
        raise UserError(
            f"{checkpoint}: expected a Hugging Face directory (config.json) or a NeMo 2 checkpoint "
            f"({CONTEXT}/model.yaml and {WEIGHTS}/), found neither."
        )
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint / WEIGHTS))
    stored = stored_shapes(metadata)
    if _EMBEDDING not in stored:
        raise UserError(
            f"{checkpoint / WEIGHTS}: expected a GPT model's {_EMBEDDING}, found {len(stored)} other tensors."
        )
    shape = read_nemo_shape(checkpoint, stored[_EMBEDDING][0])
    model = build.build_model(shape, precision=stored_precision(metadata))
    load_weights(model, checkpoint, shape, stored)
    save_hugging_face(model, output, shape, tokenizer=tokenizer)
    return shape


def save_nemo_checkpoint(hugging_face: Path, output: Path, tokenizer: Path) -> None:
    """Write a Hugging Face directory as a NeMo 2 checkpoint, from shards of the current layout. Collective.

    bf16 weights stay bf16; all others become fp32.

    The directory appears whole. NeMo opens it with Transformer Engine's layers where it has them. Raises UserError
    where the layout would pad the vocabulary: NeMo counts padded ids as tokens.
    """
    shape = read_shape(hugging_face)
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    if shape.vocab_size % tensor:
        raise UserError(
            f"export.nemo: expected a vocabulary that parallel.tensor={tensor} divides, found {shape.vocab_size}. "
            "Export with parallel.tensor=1."
        )
    model = build.build_model(shape, precision=_precision(Tensors(hugging_face).dtype(EMBEDDING)))
    load_hugging_face(model, hugging_face, shape)
    partial = output.with_name(output.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / WEIGHTS).mkdir(parents=True)

    def finish() -> None:
        _write_context(partial / CONTEXT, shape, tokenizer)
        files.sync_files(path for path in partial.rglob("*") if path.is_file())
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
        files.sync_directory(output.parent)

    parallel.on_first_rank(begin)
    checkpoint_writer.install()
    dist_checkpointing.save({"state_dict": model.sharded_state_dict(prefix=_PREFIX)}, str(partial / WEIGHTS))
    parallel.on_first_rank(finish)


def stored_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{Megatron's name: global shape}, layers stacked, as Megatron stores them, of what load_tensors_metadata gives."""
    return {name.removeprefix(_PREFIX): tuple(tensor.global_shape) for name, tensor in metadata.items()}


def stored_precision(metadata: Mapping[str, Any]) -> str:
    """Of the weights: bf16, or fp32 for all others."""
    return _precision(metadata[_PREFIX + _EMBEDDING].dtype)


def _precision(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def load_weights(model: GPTModel, checkpoint: Path, shape: ModelShape, stored: dict[str, tuple[int, ...]]) -> None:
    """Into the shards of the current layout, from `checkpoint`/weights. Collective."""
    missing = {t.megatron.replace("layers.0.", "layers.") for t in shape.tensors().values() if ".0." in t.megatron}
    missing -= stored.keys()
    if missing:
        raise UserError(
            f"{checkpoint}: expected Transformer Engine's parameter names, found none of {', '.join(sorted(missing))}. "
            "The checkpoint was written with NeMo's local layers: export it to Hugging Face with NeMo first."
        )
    # Transformer Engine's checkpoints also hold `_extra_state` entries, which no weight depends on.
    loaded = dist_checkpointing.load(
        model.sharded_state_dict(prefix=_PREFIX), str(checkpoint / WEIGHTS), strict=StrictHandling.LOG_UNEXPECTED
    )
    state = {name.removeprefix(_PREFIX): value for name, value in loaded.items() if "_extra_state" not in name}
    model.load_state_dict(state, strict=False)


def _write_context(directory: Path, shape: ModelShape, tokenizer: Path) -> None:
    """NeMo's own serialization of a LlamaModel with this shape, as its checkpoints carry it."""
    from nemo import lightning as nl
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig, LlamaModel
    from nemo.lightning.io.pl import TrainerContext

    fields = {theirs: getattr(shape, ours) for ours, theirs in FIELDS.items()}
    fields |= {
        "rotary_base": int(shape.rope_theta),
        "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        # NeMo's default, True, cannot even be constructed without Transformer Engine.
        "apply_rope_fusion": uses_transformer_engine(),
    }
    scaling = shape.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        config: Any = Llama31Config(
            **fields,
            scale_factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            old_context_len=scaling["original_max_position_embeddings"],
        )
    else:
        config = LlamaConfig(**fields, seq_len_interpolation_factor=scaling.get("factor"))
    model = LlamaModel(config, tokenizer=AutoTokenizer(str(tokenizer)))
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy(), logger=False)
    trainer.strategy.connect(model)
    directory.mkdir(parents=True)
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(directory, yaml_attrs=["model"])
