"""A directory as transformers opens it, held to our sharded model of the same weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipelines import artifacts
from pipelines.config import Config, UserError, layout, without_context
from pipelines.families import ModelShape
from pipelines.model import parallel, quality
from pipelines.model.build import build_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.weights import load_hugging_face
from pipelines.model.windows import Windows, batches, split_prefixes

WINDOWS, WINDOW_TOKENS = 2, 64  # held-out text on which logits are compared


def initialize(config: Config) -> None:
    """Process groups of the run's layout. Idempotent."""
    ranks = without_context(layout(config.parallel))
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)


def reference_logits(
    config: Config, source: str | Path | Tensors, shape: ModelShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens (windows, sequence), logits (windows, sequence, vocabulary) fp32 on the CPU) of our sharded model.

    On every rank; the collectives of `load_hugging_face` and `quality.gathered_logits`.
    """
    initialize(config)
    windows = Windows(split_prefixes(artifacts.corpus_directory(config), config.evaluate.split), WINDOW_TOKENS)
    batch = next(batches(windows, WINDOWS, limit=1))
    model = build_model(shape, precision="fp32", sequence_length=WINDOW_TOKENS)
    load_hugging_face(model, source, shape)
    logits = quality.gathered_logits(model, batch, shape.vocab_size)
    return batch["tokens"], logits.float().cpu()


def reload(directory: Path, dtype: torch.dtype = torch.float32, **placement: Any) -> PreTrainedModel:
    """Open a directory with transformers, on the CPU unless `placement` (of from_pretrained) says otherwise.

    Raises UserError where transformers cannot open it, or where weights are missing or left over.
    """
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True, **placement
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{directory}: expected a directory that transformers opens, found: {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes.get(kind):
            raise UserError(f"{directory}: expected weights that fit config.json, found {kind}: {sorted(notes[kind])}")
    return model.eval()


def compare(
    directory: Path, model: PreTrainedModel, tokens: torch.Tensor, reference: torch.Tensor, *, tolerance: float
) -> dict[str, float]:
    """The model's logits on tokens (windows, sequence) against reference (windows, sequence, vocabulary).

    Returns relative_difference norm(a - b) / norm(b) and largest_difference. Raises UserError above the tolerance.
    """
    with torch.no_grad():
        logits = model(tokens).logits.float()
    if logits.shape != reference.shape:
        raise UserError(f"{directory}: expected logits {tuple(reference.shape)}, found {tuple(logits.shape)}.")
    difference = (logits - reference).norm().item() / reference.norm().item()
    if not difference <= tolerance:
        raise UserError(
            f"{directory}: expected transformers' logits within export.tolerance={tolerance:g} of the sharded model's, "
            f"found a relative difference of {difference:.2e}. Its weights or its config.json are not the student's."
        )
    return {"relative_difference": difference, "largest_difference": (logits - reference).abs().max().item()}


def greedy(model: PreTrainedModel, tokens: list[int], new_tokens: int) -> list[int]:
    """The most likely ids behind these, one after the other, end of text or not."""
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(tokens) :].tolist()


def generate(directory: Path, model: PreTrainedModel, prompt: str, new_tokens: int) -> str:
    """The prompt and what transformers' generate writes behind it, with the directory's own generation_config."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=new_tokens)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
