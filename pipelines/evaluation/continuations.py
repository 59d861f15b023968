"""Text that models make of prompts, by transformers' generate."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.config import UserError


@dataclass(frozen=True)
class Continuation:
    """ids: of what came after the prompt, without the end-of-text. ended: by such an id, before new_tokens."""

    text: str
    ids: tuple[int, ...]
    ended: bool


def content(path: str | Path | None) -> str | None:
    """The hash of a file that is named and there."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


def continued(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    micro_batch_size: int,
    seed: int,
    chat: bool = False,
    **sampling: Any,
) -> list[Continuation]:
    """One continuation of each prompt. model, tokenizer: of transformers.

    chat: as the answer to a message, where the tokenizer has a chat template. sampling: of GenerationConfig; none:
    greedy. Each prompt's drawing begins anew from the seed, so that it depends on no other prompt. Raises UserError for
    a prompt that leaves no room for an answer.
    """
    from transformers import GenerationConfig

    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or [tokenizer.eos_token_id])
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends - {None}), 0)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, pad_token_id=filler, eos_token_id=sorted(ends - {None}) or None, **sampling
    )
    drawn = bool(sampling.get("do_sample"))
    longest = getattr(model.config, "max_position_embeddings", None)
    rows = [_ids(tokenizer, text, chat) for text in prompts]
    for text, row in zip(prompts, rows, strict=True):
        if longest and len(row) + new_tokens > longest:
            raise UserError(
                f"expected a prompt and {new_tokens} new tokens within the {longest} positions of the model, found a "
                f"prompt of {len(row)} tokens: {text[:60]!r}. Shorten it."
            )
    found: list[Continuation] = []
    step = 1 if drawn else micro_batch_size
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        width = max(len(row) for row in some)
        ids = torch.tensor([[filler] * (width - len(row)) + row for row in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some], device=model.device)
        torch.manual_seed(seed + start)
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        found += [_continuation(tokenizer, row[width:].tolist(), ends) for row in made]
    return found


def _ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """At least one: what begins a text, where a prompt is none."""
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True))
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
    return list(tokenizer(text)["input_ids"]) or [begin]


def _continuation(tokenizer: Any, ids: list[int], ends: set[int | None]) -> Continuation:
    place = next((number for number, id_ in enumerate(ids) if id_ in ends), None)
    ids = ids if place is None else ids[:place]
    return Continuation(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), place is not None)
