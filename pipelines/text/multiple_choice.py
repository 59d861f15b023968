"""Multiple-choice questions as token ids, split into context and continuation as lm-evaluation-harness does. No torch.

Of one request: trailing spaces of the context go to the continuation; both are encoded together, and the context again
alone: as many ids as it has then are the context's, the others the continuation's. No id is added, but where there is
no context: then the beginning-of-text token (or else the end-of-text) stands for it. Names of special tokens in the
text are those tokens. What is longer than the model reads loses ids at its left.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from pipelines.config import UserError
from pipelines.questions import Question, Row
from pipelines.text import tokenizer
from pipelines.text.tokenizer_files import special_token


def encode(questions: Sequence[Question], directory: Path, vocab_size: int, longest: int) -> list[Row]:
    """A row per choice, one question after the other.

    directory: with the tokenizer.json of the model, whose embedding has vocab_size rows and which reads at most
    `longest` ids. Raises UserError where the tokenizer has other ids, and for a continuation that is longer than that.
    """
    found = tokenizer.load(directory)
    found.encode_special_tokens = False
    begin = _prefix(found, directory)
    pairs = [
        _moved_spaces(*pair)
        for question in questions
        for pair in zip(question.contexts, question.continuations, strict=True)
    ]
    together = found.encode_batch_fast(["".join(pair) for pair in pairs], add_special_tokens=False)
    alone = found.encode_batch_fast([context for context, _ in pairs], add_special_tokens=False)
    lines = [question.line for question in questions for _ in question.contexts]
    rows = []
    for line, both, context in zip(lines, together, alone, strict=True):
        ids, continuation = both.ids, len(both.ids) - len(context.ids)
        if not 0 < continuation <= longest:
            raise UserError(
                f"prune.task, line {line}: expected a choice of 1 to {longest} tokens, found {continuation}. Remove "
                "the line."
            )
        if max(ids) >= vocab_size:
            raise UserError(
                f"{directory}: expected a tokenizer of at most the model's {vocab_size} ids, found id {max(ids)} in "
                f"prune.task, line {line}. Put the model's own tokenizer there."
            )
        ids = ids if context.ids else [begin, *ids]
        rows.append(Row(tuple(ids[-(longest + 1) :]), continuation))
    return rows


def _moved_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _prefix(found: Tokenizer, directory: Path) -> int:
    """The id that stands for an empty context."""
    for name in ("bos_token", "eos_token"):
        token = special_token(directory, name)
        number = None if token is None else found.token_to_id(token[0])
        if number is not None:
            return int(number)
    raise UserError(
        f"{directory}: expected a bos_token or eos_token in tokenizer_config.json or special_tokens_map.json, found "
        "none. Add one."
    )
