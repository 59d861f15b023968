"""The teacher: a given Hugging Face directory as it is, a small one pretrained here, or one corrected on the corpus."""

from pathlib import Path
from typing import Any

from pipelines import artifacts, console
from pipelines.config import Config, Layout, TeacherMode, UserError, layout
from pipelines.families import ModelShape, read_shape
from pipelines.model import build, parallel
from pipelines.model.export import save_hugging_face
from pipelines.model.pair import DistillationPair
from pipelines.model.random_model import write_random_model
from pipelines.model.weights import load_hugging_face
from pipelines.planning import shape_from_config, training_flops
from pipelines.safetensors_header import check_model
from pipelines.vocabulary import check_vocabulary


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config, ranks = context.config, layout(context.config.parallel)
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
    if config.teacher.mode is TeacherMode.take:
        return _take(context)
    if config.teacher.mode is TeacherMode.pretrain:
        start, shape = context.directory / "start", shape_from_config(config.model.shape)

        def write() -> None:  # one rank looks: a slower one would find what the first has just written
            if not artifacts.is_hugging_face(start):
                write_random_model(start, shape, config.run.seed)

        parallel.on_first_rank(write)
    else:
        start = _as_hugging_face(context, context.directory / "start")
        shape = read_shape(start)
    return _train(context, ranks, start, shape)


def _train(context: artifacts.StageContext, ranks: Layout, start: Path, shape: ModelShape) -> dict[str, Any]:
    """Next-token training from `start`; writes hf/ at the end."""
    from pipelines.trainer.run import train

    config, settings = context.config, context.config.teacher
    check_vocabulary(artifacts.corpus_directory(config), start, shape.vocab_size)
    model_config = build.transformer_config(
        shape,
        sequence_parallel=ranks.sequence_parallel,
        precision=settings.precision.value,
        recompute=settings.recompute,
    )

    def built() -> DistillationPair:
        model = build.build_model(shape, config=model_config, sequence_length=settings.sequence_length)
        load_hugging_face(model, start, shape)
        return DistillationPair(model, vocab_size=shape.vocab_size, kd_weight=0.0, ce_weight=1.0)

    console.say(f"teacher  {settings.mode.value}: {shape.parameters():,} parameters, {settings.steps} steps, loss = CE")
    pair, validation, costs = train(
        context,
        settings,
        ranks,
        description="teacher",
        model_config=model_config,
        built=built,
        flops_per_token=training_flops(shape, settings.sequence_length),
    )
    tokenizer = artifacts.corpus_directory(config) / "tokenizer"
    save_hugging_face(pair.student, context.directory / "hf", shape, tokenizer=tokenizer, origin=start)
    return {
        "model": str(context.directory / "hf"),
        "parameters": shape.parameters(),
        "steps": settings.steps,
        "tokens": settings.steps * settings.global_batch_size * settings.sequence_length,
        "validation": validation,
        "training": costs,
    }


def _take(context: artifacts.StageContext) -> dict[str, Any]:
    """Check that the directory holds a model of its own config; a NeMo 2 checkpoint is written as hf/ first."""
    given = _as_hugging_face(context, context.directory / "hf")
    shape = read_shape(given)
    check_model(given, shape)
    check_vocabulary(artifacts.corpus_directory(context.config), given, shape.vocab_size)
    console.say(f"teacher  {given}: {shape.architecture}, {shape.parameters():,} parameters")
    return {"model": str(given), "parameters": shape.parameters()}


def _as_hugging_face(context: artifacts.StageContext, converted: Path) -> Path:
    """The given directory, or `converted`, written from the NeMo 2 checkpoint that is given instead. Collective."""
    given = _given(context.config)
    if artifacts.is_hugging_face(given):
        return given
    # An earlier attempt may have written it. One rank looks, before any of them writes.
    if not parallel.on_first_rank(lambda: artifacts.is_hugging_face(converted)):
        from pipelines.trainer.nemo_checkpoint import convert_to_hugging_face

        convert_to_hugging_face(given, converted, artifacts.corpus_directory(context.config) / "tokenizer")
    return converted


def _given(config: Config) -> Path:
    if not config.model.path:
        raise UserError(
            f"teacher.mode={config.teacher.mode.value}: expected model.path, a Hugging Face or NeMo 2 directory, found "
            "none. Set model.path, or teacher.mode=pretrain for a small one from scratch."
        )
    return Path(config.model.path)
