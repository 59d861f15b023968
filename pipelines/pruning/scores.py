"""The scores that a pruning ranks by: taken from where they lie, or measured; or random, as a control."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipelines import artifacts, console, scores_origin
from pipelines.choices import DepthMethod, Importance
from pipelines.config import Config, UserError
from pipelines.core.importance import Scores
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.model.forward import Batch
from pipelines.model.scoring import score
from pipelines.model.taylor import score_taylor
from pipelines.pruning import scores_file
from pipelines.pruning.loaded_teacher import LoadedTeacher

MEASURED = "measured"
Batches = Iterable[Batch]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Found:
    """scores: None where nothing has to be ranked. source: "measured", the file they were taken from, "random" or
    "none". seconds: of scoring, the loading of the teacher included."""

    scores: Scores | None
    source: str = "none"
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        samples, tokens = (self.scores.samples, self.scores.tokens) if self.scores else (0, 0)
        return {
            "scores": self.source,
            "calibration_samples": samples,
            "calibration_tokens": tokens,
            "scoring_seconds": round(self.seconds, 2),
            "scoring_tokens_per_second": round(tokens / self.seconds, 1) if tokens and self.seconds else None,
        }


def obtain(context: artifacts.StageContext, loaded: LoadedTeacher) -> Found:
    """The scores that the configuration asks for, the same on every rank, and what was measured in the stage's file.

    Measured ones are taken in this order: those of prune.scores; those that the stage's directory has, of the same
    model, data and settings; those of new passes over the calibration split. Random ones are drawn.

    Raises UserError where the given file does not fit, the split is too small, or activations are not finite; no file
    is written then. Collective: every rank calls it.
    """
    config, teacher, path = context.config, loaded.shape, context.directory / scores_file.FILE
    needed = scores_origin.needed(config, teacher)
    found = parallel.on_first_rank(lambda: _look(config, path, needed, teacher))
    origin, source, missing = found["origin"], found["source"], found["missing"]
    if not needed:
        drawn = None
        if Importance.random is config.prune.importance or DepthMethod.random is config.prune.depth_method:
            drawn = ranking(None, config, teacher)
        if not any(scores_origin.ranked(config, teacher)):
            console.say("prune  nothing has to be ranked: no scoring, the prune.* calibration settings have no effect")
        return Found(drawn, "random" if drawn else "none")
    if source and not missing:
        scores = scores_file.read(Path(source), teacher)
        console.say(f"prune  scores of {scores.samples} samples taken from {source}")
        return Found(ranking(scores, config, teacher), source)
    started = time.monotonic()
    scores = _measure(loaded, missing)
    if source:  # it has all but some arrays
        parallel.on_first_rank(lambda: scores_file.add(path, scores, missing))
        scores = scores_file.read(path, teacher)
    else:
        parallel.on_first_rank(lambda: scores_file.write(path, scores, origin))
    return Found(ranking(scores, config, teacher), MEASURED, time.monotonic() - started)


def _look(config: Config, path: Path, needed: list[str], teacher: ModelShape) -> dict[str, Any]:
    """{"origin": what new scores would be made of, "source": the file that fits or None, "missing": arrays of needed
    that it lacks}. A stage's own file that does not fit gives way to an empty one where nothing is needed."""
    origin = scores_origin.asked(config)
    if config.prune.scores and needed:
        given = Path(config.prune.scores)
        scores_origin.check_given(given, origin, needed, teacher)
        scores_file.check_finite(given, needed)
        if _origin(path) != _origin(given):  # else it has them, and what was added to them
            scores_file.copy(given, path)
        return {"origin": origin, "source": str(given), "missing": []}
    if origin["importance"] == Importance.random.value:  # what is measured for layers alone
        origin["importance"] = "taylor" if "taylor_layers" in needed else "activation"
    if path.is_file():
        try:
            present, lines = scores_file.present(path), scores_origin.differences(path, origin, needed)
        except UserError as error:  # its own, and replaceable
            present, lines = [], [str(error)]
        if not lines:
            return {"origin": origin, "source": str(path), "missing": [n for n in needed if n not in present]}
        if needed and present:
            console.say(f"prune  scores of {path} are of something else and are measured again: {'; '.join(lines)}")
    if not needed:
        scores_file.write(path, None, origin)
    return {"origin": origin, "source": None, "missing": needed}


def _origin(path: Path) -> scores_origin.Origin | None:
    try:
        return scores_origin.read_origin(path)
    except UserError:
        return None


# Measuring


def _measure(teacher: LoadedTeacher, missing: list[str]) -> Scores:
    """Forward passes for all but Taylor scores; these take forward and backward passes of their own."""
    settings = teacher.config.prune
    by_loss = settings.importance is Importance.taylor or "taylor_layers" in missing
    by_activation = settings.importance is not Importance.taylor and missing != ["taylor_layers"]

    def activation(batches: Batches, advance: Advance) -> Scores:
        return score(
            teacher.model(),
            batches,
            micro_batch_size=settings.micro_batch_size,
            sequence_aggregation=settings.sequence_aggregation,
            sample_aggregation=settings.sample_aggregation,
            advance=advance,
        )

    def taylor(batches: Batches, advance: Advance) -> Scores:
        return score_taylor(
            teacher.model(),
            batches,
            vocab_size=teacher.shape.vocab_size,
            sample_aggregation=settings.sample_aggregation,
            advance=advance,
        )

    found = [_pass(teacher, settings.micro_batch_size, activation)] if by_activation else []
    found += [_pass(teacher, 1, taylor)] if by_loss else []
    return replace(found[0], taylor_layers=found[-1].taylor_layers)


def _pass(teacher: LoadedTeacher, micro_batch_size: int, work: Callable[[Batches, Advance], Scores]) -> Scores:
    """One pass over the calibration split, with a progress bar."""
    settings = teacher.config.prune
    batches = teacher.batches("calibration", settings.calibration_samples, micro_batch_size)
    started = time.monotonic()
    with console.progress("prune  scoring", settings.calibration_samples, "samples") as bar:

        def advance(done: int) -> None:
            tokens = (bar.done + done) * settings.sequence_length
            bar.advance(done, detail=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")

        return work(batches, advance)


# Random


def ranking(scores: Scores | None, config: Config, teacher: ModelShape) -> Scores:
    """The scores as prune.importance and prune.depth_method rank by them: `layers` set, and random numbers in the place
    of what they say is random. Uniform from 0 to 1 by prune.random_seed, the same at every layout."""
    settings = config.prune
    drawn = random_scores(teacher, settings.random_seed)
    if settings.importance is Importance.random and scores is not None:
        names = ("hidden", "ffn", "heads", "kv_groups")
        scores = replace(scores, **{name: getattr(drawn, name) for name in names})
    scores = scores or drawn
    by_method = {DepthMethod.taylor: scores.taylor_layers, DepthMethod.random: drawn.block_influence}
    return replace(scores, layers=by_method.get(settings.depth_method))


def random_scores(teacher: ModelShape, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    layers = teacher.num_hidden_layers

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(size, dtype=torch.float64, generator=generator)

    return Scores(
        hidden=draw(teacher.hidden_size),
        ffn=draw(layers, teacher.intermediate_size),
        heads=draw(layers, teacher.num_attention_heads),
        kv_groups=draw(layers, teacher.num_key_value_heads),
        block_influence=draw(layers),
        samples=0,
        tokens=0,
    )
