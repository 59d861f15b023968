"""Samples of teacher, pruned and student for the same prompts, and how varied they are.

A student that has been distilled for too long, or on too little, says the same things in the same words: its samples
differ less among each other than the teacher's, repeat themselves, and begin alike.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.evaluation import task_files
from pipelines.evaluation.continuations import Continuation, content, continued
from pipelines.evaluation.parts import Pieces
from pipelines.evaluation.sharing import INPUTS, Bench, Models, share
from pipelines.model.parallel import on_first_rank
from pipelines.prompts import read_prompts

REPEATED = 4  # ids of a run that counts as repeated
TEMPLATE_WORDS = 3  # at the beginning of a text


def settings_of(config: Config) -> dict[str, Any]:
    """What decides the part beside models and corpus, and its settings."""
    return {
        "content": content(config.evaluate.generation.prompts),
        "split": config.evaluate.split,
        "seed": config.run.seed,
    }


def measure(config: Config, models: Models, pieces: Pieces) -> dict[str, Any]:
    """results.json's "generation", and "missing": {model: reason}. Every rank calls it; no collective while ranks are
    at work. Raises UserError, and Stopped where the stage is to end."""
    settings, seed = config.evaluate.generation, config.run.seed
    prompts = on_first_rank(lambda: _prompts(config, models.corpus))
    drawing = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    sampling = {"do_sample": False} if settings.greedy else {"do_sample": True, **drawing}
    origin = {"prompts": prompts, "new_tokens": settings.new_tokens, "seed": seed, "precision": models.precision}

    def work(bench: Bench, name: str) -> dict[str, Any]:
        def generate() -> dict[str, Any]:
            made = continued(
                *bench.open(name),
                prompts,
                new_tokens=settings.new_tokens,
                micro_batch_size=settings.micro_batch_size,
                seed=seed,
                **sampling,
            )
            rows = [{"prompt": prompt, "text": each.text} for prompt, each in zip(prompts, made, strict=True)]
            return {"samples": rows, "diversity": diversity(made)}

        return pieces.measure(name, origin | sampling, INPUTS[name], generate)

    names = list(models.directories)
    found = dict(zip(names, share("generation", names, models, work), strict=True))
    shown = {"new_tokens": settings.new_tokens, "greedy": settings.greedy, "seed": seed}
    if not settings.greedy:
        shown |= {"temperature": settings.temperature, "top_p": settings.top_p}
    return {
        "settings": shown | {"prompts": settings.prompts or f"held-out text ({config.evaluate.split})"},
        "models": {name: result for name, result in found.items() if "gap" not in result},
        "missing": {name: result["gap"] for name, result in found.items() if "gap" in result},
    }


def _prompts(config: Config, corpus: Path) -> list[str]:
    settings = config.evaluate.generation
    if settings.prompts:
        found = read_prompts(Path(settings.prompts), "evaluate.generation.prompts", categories=False)
        return [prompt.text for prompt in found[: settings.count]]
    return task_files.prompts(
        corpus, config.evaluate.split, settings.count, random.Random(f"{config.run.seed} prompts")
    )


def diversity(made: Sequence[Continuation]) -> dict[str, float | None]:
    """Figures of one model's continuations; None where there is nothing to count.

    distinct_n: different runs of n ids among all such runs of all texts (arXiv 1510.03055). repetition: share of a
    text's runs of four ids that it has had before, mean over the texts (seq-rep-4 of arXiv 1908.04319). template_rate:
    share of texts whose first three words another one begins with, too; after arXiv 2407.00211, which finds templates
    of any place by parts of speech. mean_new_tokens; ended: share that end by themselves.
    """
    texts = [each.ids for each in made]
    found: dict[str, float | None] = {f"distinct_{n}": _distinct(texts, n) for n in (1, 2, 3)}
    repeated = [1 - share for ids in texts if (share := _distinct([ids], REPEATED)) is not None]
    begun = Counter(tuple(each.text.split()[:TEMPLATE_WORDS]) for each in made)
    alike = sum(count for words, count in begun.items() if count > 1 and len(words) == TEMPLATE_WORDS)
    long = sum(count for words, count in begun.items() if len(words) == TEMPLATE_WORDS)
    return found | {
        "repetition": sum(repeated) / len(repeated) if repeated else None,
        "template_rate": alike / long if long else None,
        "mean_new_tokens": sum(map(len, texts)) / len(texts),
        "ended": sum(each.ended for each in made) / len(made),
    }


def _distinct(texts: Iterable[Sequence[int]], n: int) -> float | None:
    runs = [tuple(ids[start : start + n]) for ids in texts for start in range(len(ids) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None
