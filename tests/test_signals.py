"""Presets of conf/signals, the conventions of alpha, and which layers are paired."""

from typing import Any

import pytest

from pipelines.compose import compose, group_options
from pipelines.signals import (
    AttentionLossConfig,
    HiddenKind,
    HiddenLossConfig,
    feature_losses,
    in_words,
    layer_pairs,
    pipeline_stage,
)
from pipelines.validation import validate
from pipelines.validation.signals import alpha_conventions
from tests.test_config import BASE, refusal

pytestmark = pytest.mark.usefixtures("machine_without_gpu")


@pytest.mark.parametrize("option", group_options("signals"))
def test_every_preset_validates_without_a_warning_on_any_recipe(option: str) -> None:
    for overrides in ([*BASE, f"signals={option}"], ["experiment=quickstart", f"signals={option}"]):
        assert validate(compose(overrides), ["distil"]) == []
    recipe = compose(["experiment=llama31_8b_to_4b_width", f"signals={option}"])
    assert recipe.distil.kd_weight > 0


def test_the_presets_are_what_their_names_say() -> None:
    def distil(option: str, *overrides: str) -> Any:
        return compose([f"signals={option}", *overrides]).distil

    minitron = distil("minitron")
    assert (minitron.kd_weight, minitron.ce_weight, minitron.temperature) == (1.0, 0.0, 1.0)
    assert not minitron.hidden and not minitron.attention and not minitron.taid.enabled
    hinton = distil("hinton")
    assert hinton.temperature > 1 and hinton.temperature_squared
    distilbert = distil("distilbert")
    (cosine,) = distilbert.hidden
    assert (cosine.kind, cosine.student_layer, cosine.teacher_layer) == (HiddenKind.cosine, -1, -1)
    weights = (distilbert.kd_weight, distilbert.ce_weight, cosine.weight)
    assert [weight / cosine.weight for weight in weights] == [5, 2, 1]
    tinybert = distil("tinybert")
    losses = feature_losses(tinybert.hidden, tinybert.attention, student_layers=2, teacher_layers=6)
    assert [loss.name for loss in losses] == [
        *("hidden_mse_0_0", "hidden_mse_1_3", "hidden_mse_2_6"),
        *("attention_scores_1_3", "attention_scores_2_6"),
    ]
    assert sum(loss.weight for loss in losses) == pytest.approx(2)
    taid = distil("taid").taid
    assert (taid.enabled, taid.start, taid.end, taid.momentum, taid.alpha) == (True, 0.4, 1.0, 0.99, 5e-4)


@pytest.mark.parametrize(
    ("convention", "weights"),
    [
        ("hinton", (0.7, 0.3)),  # (1 - a) * CE + a * T^2 * KL
        ("convex", (0.3, 0.7)),  # a * CE + (1 - a) * KL
        ("additive", (1.0, 0.7)),  # KL + a * CE
    ],
)
def test_the_conventions_of_alpha(convention: str, weights: tuple[float, float]) -> None:
    settings = compose([*BASE, f"signals={convention}", "distil.alpha=0.7"]).distil
    assert (settings.kd_weight, settings.ce_weight) == weights == alpha_conventions(0.7)[convention]


def test_the_loss_is_told_in_words() -> None:
    given = compose([*BASE, "signals=tinybert", "distil.schedules.kd.end=0.5", "distil.taid.enabled=true"]).distil
    assert in_words(given.hidden, given.attention, given.schedules, given.taid) == (
        " + 1.0 * mse(hidden, mean of all layers) + 1.0 * scores(attention, mean of the heads, mean of all layers)"
        "; teacher = (1 - t) * student + t * teacher in logits, t from 0.4 to 1.0 (TAID); kd to 0.5"
    )
    given = compose([*BASE, "distil.hidden=[{student_layer: 2, teacher_layer: -1, kind: cosine, rank: 8}]"]).distil
    words = in_words(given.hidden, given.attention, given.schedules, given.taid)
    assert words == " + 1.0 * cosine(hidden projected at rank 8, layers 2 and -1)"


def test_weights_given_by_name_win_over_alpha_and_it_is_said() -> None:
    config = compose([*BASE, "signals=hinton", "distil.alpha=0.7", "distil.kd_weight=0.9"])
    assert config.distil.kd_weight == 0.9
    assert any("distil.alpha has no effect" in warning for warning in validate(config, ["distil"]))
    config = compose([*BASE, "signals=minitron", "distil.alpha=0.3"])
    assert any("distil.alpha has no effect" in warning for warning in validate(config, ["distil"]))
    assert "0 or more" in refusal("distil", *BASE, "signals=hinton", "distil.alpha=1.5")


def test_layers_are_paired_evenly_from_the_front_and_from_the_back() -> None:
    uniform = HiddenLossConfig()
    assert list(layer_pairs(uniform, 0, 4, 12)) == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
    assert list(layer_pairs(uniform, 1, 3, 4)) == [(1, 1), (2, 3), (3, 4)]
    assert list(layer_pairs(uniform, 1, 16, 32)) == [(m, 2 * m) for m in range(1, 17)]
    assert list(layer_pairs(HiddenLossConfig(-1, -2), 0, 4, 12)) == [(4, 11)]
    assert list(layer_pairs(HiddenLossConfig(0, 3), 0, 4, 12)) == [(0, 3)]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_layers_paired_evenly_share_a_pipeline_stage(stages: int) -> None:
    for student, teacher in ((16, 32), (24, 32), (8, 8), (8, 24), (16, 40)):
        for own, other in layer_pairs(HiddenLossConfig(), 0, student, teacher):
            assert pipeline_stage(own, student, stages) == pipeline_stage(other, teacher, stages)


def test_an_entry_s_weight_is_shared_by_its_pairs() -> None:
    losses = feature_losses(
        [HiddenLossConfig(weight=3.0), HiddenLossConfig(1, 2, kind=HiddenKind.cosine, weight=0.5, rank=4)],
        [AttentionLossConfig(weight=2.0)],
        student_layers=2,
        teacher_layers=4,
    )
    assert [loss.weight for loss in losses] == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert (losses[3].rank, losses[3].heads, losses[4].heads) == (4, None, "mean")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["distil.hidden=[{student_layer: 7, teacher_layer: 1}]"], ["hidden[0].student_layer", "from 0 to 6", "7"]),
        (["distil.hidden=[{student_layer: 1, teacher_layer: -7}]"], ["hidden[0].teacher_layer", "-1 is the last"]),
        (["distil.hidden=[{student_layer: 1}]"], ["distil.hidden[0]", "Give both", "1 and None"]),
        (["distil.attention=[{student_layer: 0, teacher_layer: 1}]"], ["attention[0].student_layer", "from 1 to 6"]),
        (["distil.hidden=[{kind: relational, rank: 4}]"], ["hidden[0].rank", "none with kind=relational"]),
        (["distil.hidden=[{rank: 300}]"], ["hidden[0].rank", "at most 256"]),
        (["distil.hidden=[{rank: 0}]"], ["hidden[0].rank", "1 or more"]),
        (["distil.hidden=[{weight: 0}]"], ["hidden[0].weight", "above 0"]),
        (["distil.hidden=[{kind: mse}, {student_layer: 2, teacher_layer: 2}]"], ["once", "hidden_mse_2_2"]),
        (["distil.attention=[{kind: kl}]", "distil.recompute=true"], ["attention[0]", "distil.recompute=false"]),
        (
            ["distil.attention=[{heads: each}]", "student.num_attention_heads=4"],
            ["attention[0].heads", "4 and 8", "Use mean"],
        ),
        (
            ["parallel=pp2", "distil.hidden=[{student_layer: 3, teacher_layer: 4}]"],
            ["hidden[0]", "student layer 3 on stage 0 and teacher layer 4 on stage 1"],
        ),
        (["distil.taid.start=0.9", "distil.taid.end=0.5"], ["distil.taid", "start <= end", "0.9 and 0.5"]),
        (["distil.taid.momentum=1"], ["distil.taid.momentum", "below 1"]),
        (["distil.schedules.temperature.end=0"], ["schedules.temperature.end", "above 0"]),
        (["distil.schedules.kd.end=-1"], ["schedules.kd.end", "0 or more"]),
        (["distil.schedules.kd.end=0", "distil.ce_weight=0", "distil.kd_weight=1"], ["above 0 in every step", "399"]),
        (
            [*("distil.kd_weight=1", "distil.schedules.kd.end=0", "distil.schedules.kd.steps=100")]
            + [*("distil.ce_weight=0", "distil.schedules.ce.end=1", "distil.schedules.ce.first_step=100")],
            ["above 0 in every step", "both 0 in step 100"],
        ),
        (["distil.schedules.kd.steps=0"], ["schedules.kd.steps", "1 or more"]),
    ],
)
def test_signals_that_cannot_be_computed_are_refused(overrides: list[str], parts: list[str]) -> None:
    message = refusal("distil", *BASE, *overrides)
    assert "expected" in message and "found" in message
    assert all(part in message for part in parts), message


def test_one_weight_may_take_over_from_the_other() -> None:
    over = ["distil.kd_weight=1", "distil.schedules.kd.end=0", "distil.ce_weight=0", "distil.schedules.ce.end=1"]
    assert validate(compose([*BASE, *over, "signals=minitron"]), ["distil"]) == []
    late = [*over, "distil.schedules.kd.steps=100", "distil.schedules.ce.first_step=99"]
    assert validate(compose([*BASE, *late, "signals=minitron"]), ["distil"]) == []


def test_a_weight_and_a_temperature_that_come_later_have_an_effect() -> None:
    later = ["distil.kd_weight=0", "distil.ce_weight=1", "distil.schedules.kd.end=1", "distil.temperature=2"]
    assert validate(compose([*BASE, *later]), ["distil"]) == []
    rising = ["distil.temperature_squared=false", "distil.schedules.temperature.end=2"]
    assert validate(compose([*BASE, *rising]), ["distil"]) == []


def test_evenly_paired_layers_are_taken_under_pipeline_parallelism() -> None:
    assert validate(compose([*BASE, "parallel=pp2", "signals=tinybert"]), ["distil"]) == []


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["distil.schedules.features.end=0"], "distil.schedules.features has no effect"),
        (["distil.schedules.kd.end=0.5", "distil.schedules.kd.steps=999"], "takes 999 steps"),
        (["signals=taid", "distil.kd_weight=0", "distil.ce_weight=1"], "distil.taid has no effect"),
    ],
)
def test_signals_without_effect_are_told(overrides: list[str], part: str) -> None:
    assert any(part in warning for warning in validate(compose([*BASE, *overrides]), ["distil"]))
