"""A training stage's settings into `fit`: what teacher and distil have in common."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron.core.transformer.transformer_config import TransformerConfig

from pipelines import artifacts, console, interpreter, storage
from pipelines.config import Layout, TrainingConfig, UserError
from pipelines.files import read_object
from pipelines.model.course import Course
from pipelines.model.pair import DistillationPair
from pipelines.model.windows import end_of_document


def prepare(device: str) -> None:
    """Load what training needs, NeMo with it, so that what comes after is the training's own."""
    if device == "cpu":
        from pipelines.trainer import cpu_runtime

        cpu_runtime.install()
    interpreter.load("pipelines.trainer.fit")


def train(
    context: artifacts.StageContext,
    settings: TrainingConfig,
    ranks: Layout,
    *,
    description: str,
    model_config: TransformerConfig,
    built: Callable[[], DistillationPair],
    flops_per_token: int,
    course: Course | None = None,
) -> tuple[DistillationPair, dict[str, float], dict[str, float]]:
    """Train what `built` returns on the run's corpus; `course` changes the loss on the way. Returns it with the figures
    of the last validation and what the training took (see fit). flops_per_token: as planning counts them."""
    prepare(ranks.device)
    from pipelines.trainer.course import CourseCallback
    from pipelines.trainer.fit import Schedule, fit
    from pipelines.trainer.trackers import Tracking

    corpus = artifacts.corpus_directory(context.config)
    if word := _passes(corpus, settings):
        console.say(f"{description}  {word}")
    schedule = {name: getattr(settings, name) for name in Schedule.__dataclass_fields__}
    schedule |= {"precision": settings.precision.value, "optimizer": settings.optimizer.value}
    pair, validation, costs = fit(
        description=description,
        directory=context.directory,
        config=model_config,
        build=built,
        schedule=Schedule(**schedule),
        blend={split: _blend(corpus, split) for split in ("train", "validation")},
        tokenizer=corpus / "tokenizer",
        seed=context.config.run.seed,
        device=ranks.device,
        flops_per_token=flops_per_token,
        bytes_per_value=storage.checkpoint_bytes(1, settings),
        share_of_peak=context.config.plan.share_of_peak,
        tracking=Tracking(
            tuple(tracker.value for tracker in context.config.run.trackers),
            context.config.run.project,
            context.settings(),
        ),
        callbacks=[] if course is None else [CourseCallback(course)],
        end_of_document=end_of_document(corpus, "train", "validation") if settings.document_mask else None,
    )
    assert isinstance(pair, DistillationPair)
    return pair, validation, costs


def _passes(corpus: Path, settings: TrainingConfig) -> str:
    """How often the splits are read, where the corpus tells how many tokens they have; else nothing."""
    counts = corpus / "counts.json"
    splits = read_object(counts).get("splits", {}) if counts.is_file() else {}
    per_step = settings.global_batch_size * settings.sequence_length
    parts = []
    for name, what, steps in (
        ("train", "training", settings.steps),
        ("validation", "each validation", settings.validation_batches),
    ):
        if held := splits.get(name, {}).get("tokens"):
            read = steps * per_step
            parts.append(f"{what} reads {read:,} tokens, {read / held:.3g} times the {held:,} of its split")
    return "; ".join(parts)


def _blend(corpus: Path, split: str) -> list[str]:
    """Megatron's blend: weight and prefix in turns."""
    entries = json.loads((corpus / "blend.json").read_text())["splits"].get(split) or []
    if not entries:
        raise UserError(f"{corpus}: expected a {split} split in blend.json, found none. Run stage=corpus again.")
    return [text for entry in entries for text in (str(entry["weight"]), str(corpus / entry["prefix"]))]
