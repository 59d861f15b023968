"""Settings without effect, each told once."""

import math
from collections.abc import Collection, Iterator
from pathlib import Path

from pipelines import artifacts, planning
from pipelines.choices import DepthMethod, StepTeacher
from pipelines.config import PROFILED, Config, Divergence, Format, Layout, SourceKind, TeacherMode, searches
from pipelines.families import ModelShape, read_shape
from pipelines.nemo_context import is_nemo_checkpoint
from pipelines.prune_settings import PRUNED_SIZES
from pipelines.validation import depth, memory, scores, search, signals, texts
from pipelines.validation.data import given_tokenizer, makes_corpus
from pipelines.validation.training import trainings

WITH_TEXT_KEY = (SourceKind.auto, SourceKind.jsonl, SourceKind.parquet, SourceKind.datasets)


def warnings(
    config: Config, ranks: Layout, stages: Collection[str], teacher: ModelShape, student: ModelShape
) -> Iterator[str]:
    if "plan" in stages:
        yield from _planned(config)
        yield from memory.warnings(config, teacher, student)
    if config.format is Format.json and not {"plan", "decide"} & set(stages):
        yield "format=json has no effect without stage=plan or stage=decide"
    if config.report.runs and not {"report", "decide"} & set(stages):
        yield "report.runs has no effect without stage=report or stage=decide"
    if config.report.name and ("report" not in stages or not config.report.runs):
        yield "report.name has no effect without stage=report and report.runs"
    for name, value in vars(config.decide).items():
        if value is not None and "decide" not in stages:
            yield f"decide.{name} has no effect without stage=decide"
    for name in ("dry_run", "layouts"):
        if getattr(config.plan, name) and "plan" not in stages:
            yield f"plan.{name}=true has no effect without stage=plan"
    if config.iterate.teacher is StepTeacher.previous and len(config.iterate.students) < 2:
        yield "iterate.teacher=previous has no effect without several iterate.students"
    if ranks.sequence_parallel and ranks.tensor == 1:
        yield "parallel.sequence_parallel=true has no effect with parallel.tensor=1"
    for name, training in trainings(config, stages):
        if training.distributed_optimizer and ranks.data * ranks.context == 1:
            yield f"{name}.distributed_optimizer=true has no effect with one data-parallel rank"
        together = math.lcm(training.validation_interval, training.checkpoint_interval)
        if training.keep_best and together >= training.steps:
            yield f"{name}.keep_best has no effect: no step before the last has both a validation and a checkpoint"
        if training.profile and training.steps < PROFILED[-1]:
            yield f"{name}.profile=true has no effect with fewer than {PROFILED[-1]} steps"
    yield from _loss(config, stages)
    if "distil" in stages and config.distil.keep_best:
        changing = [name for name, given in vars(config.distil.schedules).items() if given.end is not None]
        if changing or config.distil.taid.enabled:
            what = ", ".join([*changing, *(["taid"] if config.distil.taid.enabled else [])])
            yield f"distil.keep_best compares losses that are not the same over training, because of {what}"
    if "distil" in stages:
        yield from signals.warnings(config)
    if makes_corpus(config, stages):
        yield from _corpus(config)
    if config.model.path and config.teacher.mode is TeacherMode.pretrain:
        yield f"model.path={config.model.path} has no effect with teacher.mode=pretrain"
    yield from search.warnings(config, stages, ranks, teacher, student)
    yield from texts.warnings(config, stages, teacher)
    yield from _student(config, stages, teacher, student)


def _planned(config: Config) -> Iterator[str]:
    pretrains = config.teacher.mode is TeacherMode.pretrain
    for setting, path in (("model.path", config.model.path), ("student.path", config.student.path)):
        nemo = setting == "model.path" and path and is_nemo_checkpoint(Path(path))
        if path and not artifacts.is_hugging_face(path) and not nemo and not (setting == "model.path" and pretrains):
            yield f"{setting}={path} has no config.json: plan counts the shape of the configuration instead"


def _loss(config: Config, stages: Collection[str]) -> Iterator[str]:
    if "distil" not in stages:
        return
    if not planning.needs_logits(config.distil):
        if config.distil.temperature != 1:
            yield "distil.temperature has no effect with distil.kd_weight=0"
        if not config.distil.temperature_squared:
            yield "distil.temperature_squared has no effect with distil.kd_weight=0"
        if config.distil.divergence is not Divergence.forward_kl:
            yield "distil.divergence has no effect with distil.kd_weight=0"
        if config.distil.top_k:
            yield "distil.top_k has no effect with distil.kd_weight=0"
        return
    always_1 = config.distil.temperature == 1 and config.distil.schedules.temperature.end is None
    if always_1 and not config.distil.temperature_squared:
        yield "distil.temperature_squared=false has no effect with distil.temperature=1"


def _corpus(config: Config) -> Iterator[str]:
    taken = given_tokenizer(config)
    if taken and config.data.tokenizer_vocab_size:
        which = "data.tokenizer" if taken[0] == "data.tokenizer" else f"the tokenizer of model.path={config.model.path}"
        yield f"data.tokenizer_vocab_size has no effect with {which}"
    for number, source in enumerate(config.data.sources):
        if source.text_key != "text" and source.kind not in WITH_TEXT_KEY:
            yield f"data.sources[{number}].text_key has no effect with kind={source.kind.value}"


def _student(config: Config, stages: Collection[str], teacher: ModelShape, student: ModelShape) -> Iterator[str]:
    if config.student.path:
        if "prune" in stages:
            yield "student.path is given: the prune stage has nothing to do"
        return
    if "prune" in stages and student == teacher:
        yield "student: nothing is smaller than the teacher's; the student starts as a copy"
    if "prune" in stages and config.prune.depth_method is DepthMethod.layers and not config.student.drop_layers:
        yield "prune.depth_method=layers has no effect without student.drop_layers"
    yield from scores.warnings(config, stages, teacher)
    if "prune" in stages:
        yield from depth.warnings(config, teacher)
    made = artifacts.student_start_directory(config)
    alone = "distil" in stages and "prune" not in stages and not searches(config)
    if alone and artifacts.is_hugging_face(made):
        there, asked = read_shape(made), planning.target_shape(teacher, config.student)
        for name in PRUNED_SIZES:
            wanted, found = getattr(asked, name), getattr(there, name)
            if wanted != found:
                yield f"student.{name}={wanted} has no effect without stage=prune: {made} has {found}"
