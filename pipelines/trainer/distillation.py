"""Distillation through NeMo's trainer: a student trained on the logits of its frozen teacher, both sharded over the
same ranks. What the stage distil is made of, and what pruning's search follows its candidates with."""

import math
from dataclasses import replace
from pathlib import Path

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from pipelines import artifacts, console, planning
from pipelines.config import DistilConfig, Layout, UserError, layout, teacher_precision
from pipelines.core.family import divergence_named
from pipelines.core.kernels import kernels_for
from pipelines.core.loss import LossWeights, loss_identity
from pipelines.core.schedules import AdaptiveInterpolation, Schedule
from pipelines.families import ModelShape, read_shape
from pipelines.model import build, step, windows
from pipelines.model.course import Course
from pipelines.model.offload import HostLayers
from pipelines.model.pair import DistillationPair, schedule_config
from pipelines.model.signals import FeatureLosses
from pipelines.model.weights import load_hugging_face
from pipelines.signals import in_words
from pipelines.trainer.run import train
from pipelines.vocabulary import check_vocabulary


def distil(
    context: artifacts.StageContext, *, teacher: Path, start: Path, description: str = "distil"
) -> tuple[DistillationPair, dict[str, float], dict[str, float]]:
    """Train the student in `start` on the logits of `teacher`, both Hugging Face directories, by the settings distil.*.

    context: its config.distil and its directory, into which training writes checkpoints/, metrics.jsonl and the like,
    and from whose newest checkpoint it continues. description: what begins its lines on the console.
    Returns the pair, the figures of the last validation and what the training took (see fit). Every rank calls it, at
    the layout of config.parallel, initialized. Raises UserError where the models or the corpus do not fit each other,
    and for a teacher that knows next to nothing.
    """
    config, settings, ranks = context.config, context.config.distil, layout(context.config.parallel)
    teacher_shape, shape = read_shape(teacher), read_shape(start)
    if teacher_shape.vocab_size != shape.vocab_size:
        raise UserError(
            f"distil: expected teacher and student to share a vocabulary, found {teacher_shape.vocab_size} ids in "
            f"{teacher} and {shape.vocab_size} in {start}. Prune the student from this teacher."
        )
    for directory in (teacher, start):
        check_vocabulary(artifacts.corpus_directory(config), directory, shape.vocab_size)
    losses = planning.feature_losses_of(settings, teacher_shape, shape)
    teacher_config, student_config = _configurations(settings, ranks, teacher_shape, shape)
    pair_config, weights = schedule_config(student_config, teacher_config), _weights(settings)

    def built() -> DistillationPair:
        model = _teacher(context, teacher_config, teacher_shape, teacher, description)
        student = build.build_model(shape, config=student_config, sequence_length=settings.sequence_length)
        load_hugging_face(student, start, shape)
        return DistillationPair(
            student,
            model,
            config=pair_config,
            vocab_size=shape.vocab_size,
            kd_weight=weights.kd,
            ce_weight=weights.ce,
            temperature=weights.temperature,
            temperature_squared=weights.temperature_squared,
            divergence=settings.divergence.value,
            divergence_parameter=settings.divergence_parameter,
            top_k=settings.top_k,
            gradient_filter=settings.gradient_filter,
            features=FeatureLosses(losses, student, model, seed=config.run.seed) if losses else None,
        )

    console.say(
        f"{description}  {shape.parameters():,} of {teacher_shape.parameters():,} parameters, {settings.steps} steps\n"
        f"{description}  {identity(settings)}\n"
        f"{description}  student in {settings.precision.value}, teacher in {teacher_precision(settings).value}"
        f"{', its layers in host memory' * settings.teacher_offload}\n"
        f"{description}  kernels of the loss: {kernels_for(ranks.device)[1]}"
    )
    return train(
        context,
        settings,
        ranks,
        description=description,
        model_config=pair_config,
        built=built,
        flops_per_token=planning.step_flops(settings, teacher_shape, shape).total,
        course=_course(settings, weights),
    )


def shortened(settings: DistilConfig, tokens: float) -> DistilConfig:
    """The same training in as many steps as `tokens` take, at least one: warm-up and schedules in the same shares, a
    checkpoint half-way at the latest."""
    steps = max(1, math.ceil(tokens / (settings.global_batch_size * settings.sequence_length)))
    share = steps / settings.steps
    schedules = {
        name: replace(
            given,
            steps=given.steps and max(1, round(given.steps * share)),
            first_step=min(steps - 1, round(given.first_step * share)),
        )
        for name, given in vars(settings.schedules).items()
    }
    return replace(
        settings,
        steps=steps,
        warmup_steps=min(steps - 1, round(settings.warmup_steps * share)),
        schedules=replace(settings.schedules, **schedules),
        checkpoint_interval=min(settings.checkpoint_interval, max(1, steps // 2)),
    )


def identity(settings: DistilConfig) -> str:
    """The loss in words."""
    losses = in_words(settings.hidden, settings.attention, settings.schedules, settings.taid)
    return loss_identity(_weights(settings)) + losses


def _weights(settings: DistilConfig) -> LossWeights:
    return LossWeights(
        settings.kd_weight,
        settings.ce_weight,
        settings.temperature,
        settings.temperature_squared,
        divergence_named(settings.divergence.value, settings.divergence_parameter),
        settings.top_k,
    )


def _configurations(
    settings: DistilConfig, ranks: Layout, teacher: ModelShape, student: ModelShape
) -> tuple[TransformerConfig, TransformerConfig]:
    """Megatron's, of teacher and student."""
    split, own = ranks.sequence_parallel, settings.precision.value
    return (
        build.transformer_config(teacher, sequence_parallel=split, precision=teacher_precision(settings).value),
        build.transformer_config(student, sequence_parallel=split, precision=own, recompute=settings.recompute),
    )


def _teacher(
    context: artifacts.StageContext, config: TransformerConfig, shape: ModelShape, directory: Path, description: str
) -> GPTModel:
    """Loaded, frozen, where the settings want it, and checked."""
    settings = context.config.distil
    teacher = build.build_model(shape, config=config, sequence_length=settings.sequence_length)
    load_hugging_face(teacher, directory, shape)
    teacher.requires_grad_(False)
    if settings.teacher_offload:
        HostLayers(teacher)
    _check_teacher(context, teacher, shape, directory, description)
    return teacher


def _course(settings: DistilConfig, weights: LossWeights) -> Course:
    """Schedules without steps of their own reach their end in the last step of training."""
    starts = {"kd": weights.kd, "ce": weights.ce, "temperature": weights.temperature, "features": 1.0}
    schedules = {}
    for name, given in vars(settings.schedules).items():
        if given.end is not None:
            steps = given.steps or max(1, settings.steps - 1 - given.first_step)
            schedules[name] = Schedule(starts[name], given.end, steps, given.shape.value, given.first_step)
    taid = settings.taid
    adaptive = AdaptiveInterpolation(settings.steps, taid.start, taid.end, taid.alpha, taid.momentum)
    return Course(weights, **schedules, taid=adaptive if taid.enabled else None)


def _check_teacher(
    context: artifacts.StageContext, teacher: GPTModel, shape: ModelShape, directory: Path, description: str
) -> None:
    """Print the teacher's own loss on validation data; raise where it knows next to nothing.

    A teacher whose weights silently stayed random is a known failure of such tools. One validation pass over at most
    four micro batches per data-parallel rank.
    """
    from megatron.core import parallel_state

    settings = context.config.distil
    corpus = artifacts.corpus_directory(context.config)
    prefixes = windows.split_prefixes(corpus, "validation")
    end = windows.end_of_document(corpus, "validation") if settings.document_mask else None
    batches = list(
        windows.batches(
            windows.Windows(prefixes, settings.sequence_length, end),
            settings.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            4,
        )
    )
    model = DistillationPair(teacher, vocab_size=shape.vocab_size, kd_weight=0.0, ce_weight=1.0)
    loss = step.evaluation_step(model, batches)["ce"]
    bound = 0.9 * math.log(shape.vocab_size)
    console.say(
        f"{description}  the teacher's own loss on validation data: {loss:.4f} nats/token; chance: {bound / 0.9:.2f}"
    )
    if not loss < bound:
        raise UserError(
            f"distil: expected a teacher with a loss below 0.9 * log(vocabulary) = {bound:.3f} nats/token on "
            f"validation data, found {loss:.3f} for {directory}. Its weights are random, or its tokenizer is another."
        )
