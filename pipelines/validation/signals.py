"""The signals of distillation beside the logits: layers that exist, on the same rank, compared as they can be."""

from collections.abc import Collection, Iterator

from pipelines import planning
from pipelines.config import Config, DistilConfig, Layout, expect
from pipelines.families import ModelShape
from pipelines.signals import (
    AttentionLossConfig,
    Heads,
    HiddenKind,
    HiddenLossConfig,
    ScheduleConfig,
    feature_losses,
    layer_pairs,
    pipeline_stage,
)


def check(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape, student: ModelShape) -> None:
    if not {"plan", "distil"} & set(stages):
        return
    settings = config.distil
    entries: list[HiddenLossConfig | AttentionLossConfig] = [*settings.hidden, *settings.attention]
    for place, entry in enumerate(entries):
        attends = isinstance(entry, AttentionLossConfig)
        place -= len(settings.hidden) if attends else 0
        setting = f"distil.{'attention' if attends else 'hidden'}[{place}]"
        _check_layers(setting, entry, ranks, teacher, student)
        if isinstance(entry, AttentionLossConfig):
            _check_attention(setting, entry, settings, ranks, teacher, student)
        else:
            _check_hidden(setting, entry, ranks, teacher, student)
    layers = {"student_layers": student.num_hidden_layers, "teacher_layers": teacher.num_hidden_layers}
    names = [loss.name for loss in feature_losses(settings.hidden, settings.attention, **layers)]
    twice = next((name for name in names if names.count(name) > 1), None)
    expect(twice is None, "distil.hidden, distil.attention", "each loss of a pair of layers once", twice, "Drop one.")
    for name, schedule in vars(settings.schedules).items():
        _check_schedule(name, schedule)
    if settings.kd_weight or settings.ce_weight:
        _check_sum(settings)
    taid = settings.taid
    ordered = 0 <= taid.start <= taid.end <= 1
    found = f"{taid.start:g} and {taid.end:g}"
    expect(ordered, "distil.taid", "0 <= start <= end <= 1", found, "Change start or end.")
    expect(taid.alpha <= 1, "distil.taid.alpha", "from 0 to 1", taid.alpha, "Lower it.")


def _check_layers(
    setting: str,
    entry: HiddenLossConfig | AttentionLossConfig,
    ranks: Layout,
    teacher: ModelShape,
    student: ModelShape,
) -> None:
    first = 1 if isinstance(entry, AttentionLossConfig) else 0
    both = (entry.student_layer is None) == (entry.teacher_layer is None)
    found = f"{entry.student_layer} and {entry.teacher_layer}"
    remedy = "Give both, or neither for every student layer with its teacher layer."
    expect(both, setting, "student_layer and teacher_layer", found, remedy)
    for name, layer, layers in (
        ("student_layer", entry.student_layer, student.num_hidden_layers),
        ("teacher_layer", entry.teacher_layer, teacher.num_hidden_layers),
    ):
        there = layer is None or first <= layer <= layers or -layers <= layer <= -1
        remedy = "Layers count from 1; -1 is the last" + (", 0 the embedding's output." if not first else ".")
        expect(there, f"{setting}.{name}", f"a layer from {first} to {layers}", layer, remedy)
    if ranks.pipeline == 1:
        return
    for student_layer, teacher_layer in layer_pairs(entry, first, student.num_hidden_layers, teacher.num_hidden_layers):
        own = pipeline_stage(student_layer, student.num_hidden_layers, ranks.pipeline)
        other = pipeline_stage(teacher_layer, teacher.num_hidden_layers, ranks.pipeline)
        remedy = "Pair layers at the same share of the depth, or lower parallel.pipeline."
        found = f"student layer {student_layer} on stage {own} and teacher layer {teacher_layer} on stage {other}"
        expect(own == other, setting, f"both layers on one of the {ranks.pipeline} pipeline stages", found, remedy)


def _check_hidden(
    setting: str, entry: HiddenLossConfig, ranks: Layout, teacher: ModelShape, student: ModelShape
) -> None:
    if entry.kind is HiddenKind.relational:
        remedy = "Relations are within each model: leave the rank out."
        expect(entry.rank is None, f"{setting}.rank", "none with kind=relational", entry.rank, remedy)
        expect(ranks.context == 1, setting, "parallel.context=1 with kind=relational", ranks.context, "Lower it.")
    if entry.rank is not None:
        narrow = min(student.hidden_size, teacher.hidden_size)
        expected = f"at most {narrow}, the narrower model's hidden size"
        expect(entry.rank <= narrow, f"{setting}.rank", expected, entry.rank, "Lower it.")


def _check_attention(
    setting: str,
    entry: AttentionLossConfig,
    settings: DistilConfig,
    ranks: Layout,
    teacher: ModelShape,
    student: ModelShape,
) -> None:
    own, other = student.num_attention_heads, teacher.num_attention_heads
    paired = entry.heads is Heads.mean or own == other
    expect(
        paired, f"{setting}.heads", "as many heads in both models with heads=each", f"{own} and {other}", "Use mean."
    )
    remedy = "Queries and keys exist inside the layer alone: set distil.recompute=false, or compare hidden states."
    expect(not settings.recompute, setting, "distil.recompute=false", "true", remedy)
    expect(ranks.context == 1, setting, "parallel.context=1", ranks.context, "Lower it.")


def _check_sum(settings: DistilConfig) -> None:
    """Somewhere in training both weights could be 0: in steps where both schedules rest at 0."""
    rests = []
    for start, schedule in ((settings.kd_weight, settings.schedules.kd), (settings.ce_weight, settings.schedules.ce)):
        if schedule.end is None:
            rests.append((0, settings.steps) if start == 0 else (settings.steps, 0))
            continue
        last = schedule.first_step + (schedule.steps or settings.steps - 1 - schedule.first_step)
        first_zero = 0 if start == 0 else last if schedule.end == 0 else settings.steps
        last_zero = settings.steps if schedule.end == 0 else schedule.first_step if start == 0 else 0
        rests.append((first_zero, last_zero))
    step = max(first for first, _ in rests)
    good = step >= settings.steps or any(last < step for _, last in rests)
    found = f"both 0 in step {step}"
    expect(good, "distil.schedules", "kd or ce above 0 in every step", found, "Let one end later or begin earlier.")


def _check_schedule(name: str, schedule: ScheduleConfig) -> None:
    if schedule.end is None:
        return
    setting, end = f"distil.schedules.{name}.end", schedule.end
    if name == "temperature":
        expect(end > 0, setting, "a number above 0", end, "Raise it.")
    expect(end >= 0, setting, "0 or more", end, "Raise it.")


def warnings(config: Config) -> Iterator[str]:
    """Of the distil stage."""
    settings = config.distil
    if settings.taid.enabled and not planning.needs_logits(settings):
        yield "distil.taid has no effect with distil.kd_weight=0"
    if settings.schedules.features.end is not None and not settings.hidden and not settings.attention:
        yield "distil.schedules.features has no effect without distil.hidden or distil.attention"
    for name, schedule in vars(settings.schedules).items():
        last = schedule.first_step + (schedule.steps or 1)
        if schedule.end is not None and last > settings.steps:
            yield f"distil.schedules.{name} takes {last} steps and does not end within distil.steps={settings.steps}"
    weights = (settings.kd_weight, settings.ce_weight)
    if settings.alpha != DistilConfig.alpha and weights not in alpha_conventions(settings.alpha).values():
        yield "distil.alpha has no effect: signals= names no option that reads it, or the weights are given themselves"


def alpha_conventions(alpha: float) -> dict[str, tuple[float, float]]:
    """(kd_weight, ce_weight) by the option of conf/signals that reads alpha."""
    rest = round(1 - alpha, 12)
    return {"hinton": (alpha, rest), "convex": (rest, alpha), "additive": (1.0, alpha)}
