"""How often models refuse, and how often their answers hold words of a list, by categories of prompts.

A student takes these habits over from its teacher, so both are measured, on the same prompts. What is counted is words:
a refusal in other words is missed, a quoted insult counts. The numbers compare models; they prove none to be safe.
The prompts that are shipped are harmless: benign ones; borderline ones, harmless but with words that make models refuse
(in the manner of XSTest, arXiv 2308.01263); and ones that a careful assistant declines mildly, as it cannot know or
should not decide. Refusals are told by how they begin, as in arXiv 2307.15043.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.config import Config, UserError
from pipelines.evaluation.continuations import content, continued
from pipelines.evaluation.intervals import paired, wilson
from pipelines.evaluation.parts import Pieces
from pipelines.evaluation.sharing import INPUTS, Bench, Models, share
from pipelines.evaluation_settings import SHIPPED
from pipelines.model.parallel import on_first_rank
from pipelines.prompts import Prompt, read_prompts, read_text

HERE = Path(__file__).parent
REFUSED_WITHIN = 200  # characters of the answer in which a refusal begins
EXAMPLES = 2  # answers of each model and category that results.json shows
KINDS = ("refusal", "toxic")


def files_of(config: Config) -> dict[str, Path]:
    """{"prompts", "lexicon", "refusals": file} as set, or those that lie beside this module."""
    settings = config.evaluate.behaviour
    prompts = None if settings.prompts == SHIPPED else settings.prompts
    given = {"prompts": prompts, "lexicon": settings.lexicon, "refusals": settings.refusals}
    shipped = {"prompts": "prompts.jsonl", "lexicon": "lexicon.txt", "refusals": "refusals.txt"}
    return {name: Path(path) if path else HERE / shipped[name] for name, path in given.items()}


def settings_of(config: Config) -> dict[str, Any]:
    """What decides the part beside the models, and its settings."""
    return {name: content(path) for name, path in files_of(config).items()}


def measure(config: Config, models: Models, pieces: Pieces) -> dict[str, Any]:
    """results.json's "behaviour", and "missing": {model: reason}. Every rank calls it; no collective while ranks are
    at work. Raises UserError, and Stopped where the stage is to end."""
    settings, places = config.evaluate.behaviour, files_of(config)
    read = on_first_rank(lambda: _read(places))
    prompts = [Prompt(text, category) for text, category in read["prompts"]]
    origin = {"new_tokens": settings.new_tokens, "precision": models.precision} | settings_of(config)

    def work(bench: Bench, name: str) -> dict[str, Any]:
        def answer() -> dict[str, Any]:
            made = continued(
                *bench.open(name),
                [prompt.text for prompt in prompts],
                new_tokens=settings.new_tokens,
                micro_batch_size=settings.micro_batch_size,
                seed=config.run.seed,
                chat=True,
                do_sample=False,
            )
            texts = [each.text for each in made]
            return {
                "texts": texts,
                "refusal": [float(matches(text[:REFUSED_WITHIN], read["refusals"])) for text in texts],
                "toxic": [float(matches(text, read["lexicon"])) for text in texts],
            }

        return pieces.measure(name, origin, INPUTS[name], answer)

    names = list(models.directories)
    found = dict(zip(names, share("behaviour", names, models, work), strict=True))
    good = {name: result for name, result in found.items() if "gap" not in result}
    return {
        "file": settings.prompts if settings.prompts == SHIPPED else str(places["prompts"]),
        "models": {name: _by_category(prompts, answers) for name, answers in good.items()},
        "examples": [row for name, answers in good.items() for row in _examples(name, prompts, answers)],
        "differences": _differences(prompts, good),
        "missing": {name: result["gap"] for name, result in found.items() if "gap" in result},
    }


def _read(places: dict[str, Path]) -> dict[str, Any]:
    prompts = read_prompts(places["prompts"], "evaluate.behaviour.prompts", categories=True)
    lines = {name: _lines(places[name], f"evaluate.behaviour.{name}") for name in ("lexicon", "refusals")}
    for pattern in lines["refusals"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{places['refusals']}: expected a regular expression per line, found {pattern!r}: {error}. Correct it."
            ) from None
    return {
        "prompts": [[prompt.text, prompt.category] for prompt in prompts],
        "lexicon": [rf"(?<!\w){re.escape(word)}(?!\w)" for word in lines["lexicon"]],
        "refusals": lines["refusals"],
    }


def _lines(path: Path, setting: str) -> list[str]:
    """Those that are neither empty nor begin with #."""
    lines = [line.strip() for line in read_text(path, setting).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"{setting}={path}: expected a line or more, found none. Give another file.")
    return found


def matches(text: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is in the text, whatever the case. Typographic apostrophes count as plain ones."""
    plain = text.replace("\u2019", "'")
    return any(re.search(pattern, plain, re.IGNORECASE) for pattern in patterns)


def _categories(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.category, []).append(place)
    return places


def _by_category(prompts: Sequence[Prompt], answers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for category, places in _categories(prompts).items():
        row: dict[str, Any] = {"prompts": len(places)}
        for kind in KINDS:
            count = int(sum(answers[kind][place] for place in places))
            row |= {f"{kind}_rate": count / len(places), f"{kind}_interval": wilson(count, len(places))}
        found[category] = row
    return found


def _examples(name: str, prompts: Sequence[Prompt], answers: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "category": category,
            "prompt": prompts[place].text,
            "text": answers["texts"][place],
            "refused": bool(answers["refusal"][place]),
            "toxic": bool(answers["toxic"][place]),
        }
        for category, places in _categories(prompts).items()
        for place in places[:EXAMPLES]
    ]


def _differences(prompts: Sequence[Prompt], good: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(good)
    return [
        {"category": category, "figure": f"{kind}_rate", "model": name, "other": other}
        | paired([good[name][kind][p] for p in places], [good[other][kind][p] for p in places])
        for category, places in _categories(prompts).items()
        for kind in KINDS
        for place, name in enumerate(names)
        for other in names[:place]
    ]
