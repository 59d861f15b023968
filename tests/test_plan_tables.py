"""Communication, disk and layouts of a plan, counted by hand on small shapes and held to the recipe's known sizes."""

import math
from dataclasses import replace

import pytest

from pipelines import gpus, layout_table, nvidia_smi, planning, storage, traffic
from pipelines.choices import Quantization
from pipelines.compose import compose
from pipelines.config import Config, Layout, UserError
from pipelines.families import ModelShape
from pipelines.plan_text import as_text
from pipelines.signals import HiddenKind, HiddenLossConfig
from pipelines.stages.plan import plan
from pipelines.validation import memory, validate

SMALL = ModelShape(100, 32, 48, 4, 4, 2, 12)
BATCH = [
    "distil.micro_batch_size=1",
    "distil.global_batch_size=8",
    "distil.sequence_length=64",
    "distil.precision=bf16",
]


def sent(ranks: Layout, *overrides: str) -> dict[str, int]:
    training = compose([*BATCH, *overrides]).distil
    found: dict[str, int] = traffic.communication(SMALL, SMALL, ranks, training)["bytes_per_device"]
    return found


def test_gradients_are_reduced_once_per_step_and_weights_gathered() -> None:
    data, count = Layout(4, 1, 1, 1, 4, "cuda", False), SMALL.parameters()
    assert sent(data) == {"tensor": 0, "context": 0, "pipeline": 0, "data": 2 * 3 * count}, "2 * 3/4 of 4 bytes"
    scattered = sent(data, "distil.distributed_optimizer=true")["data"]
    assert scattered == round(3 / 4 * 4 * count) + round(3 / 4 * 2 * count)
    shared = sent(Layout(4, 1, 1, 4, 1, "cuda", False))
    assert shared["data"] == 6 * count, "context-parallel ranks hold the same weights"


def test_keys_and_values_go_round_the_ring() -> None:
    found = sent(Layout(2, 1, 1, 2, 1, "cuda", False))["context"]
    one_way = 4 * 8 * 32 * 2 * 24 * 2  # layers, micro batches, tokens of a rank, keys and values, bytes
    assert found == one_way * (1 + 1 + 2), "teacher; student forward, and backward with gradients"


def test_a_middle_stage_sends_both_ways_and_a_tied_embedding_is_reduced() -> None:
    states = 8 * 64 * 2 * 2 * 32  # tokens, two models, bytes, hidden
    assert sent(Layout(2, 1, 2, 1, 1, "cuda", False))["pipeline"] == states
    assert sent(Layout(4, 1, 4, 1, 1, "cuda", False))["pipeline"] == 2 * states
    tied = SMALL.replace(tie_word_embeddings=True)
    found = traffic.communication(tied, tied, Layout(2, 1, 2, 1, 1, "cuda", False), compose(BATCH).distil)
    assert found["bytes_per_device"]["pipeline"] == states + 4 * 100 * 32


def test_without_a_teacher_nothing_of_it_is_sent() -> None:
    ranks, training = (
        Layout(2, 2, 1, 1, 1, "cuda", False),
        compose([*BATCH, "distil.kd_weight=0", "distil.ce_weight=1"]).distil,
    )
    parts = traffic.communication(SMALL, SMALL, ranks, training)["transfers"]
    assert parts and not [part for part in parts if "teacher" in part["what"]]


def test_a_checkpoint_holds_weights_and_optimizer() -> None:
    config, count = compose(["distil.keep_checkpoints=3", "teacher=take", "model.path=null"]), SMALL.parameters()
    assert storage.checkpoint_bytes(count, config.distil) == 12 * count, "fp32: weights and two moments"
    assert storage.checkpoint_bytes(count, replace(config.distil, distributed_optimizer=True)) == 16 * count
    assert storage.checkpoint_bytes(count, compose(["distil.precision=bf16"]).distil) == 14 * count
    config.distil.hidden = [HiddenLossConfig(student_layer=1, teacher_layer=1, kind=HiddenKind.mse, rank=4)]
    found = storage.run_bytes(config, SMALL, SMALL)
    assert found["checkpoint"] == 12 * (count + 4 * 64)
    assert found["checkpoints"] == 4 * found["checkpoint"], "three that are kept, one that is written"
    assert found["models"] == {"teacher": 0, "prune": 4 * count, "distil": 4 * count, "export": 4 * count}
    assert found["total"] == found["checkpoints"] + 12 * count + found["corpus"]
    assert found["corpus"] == 2 * found["corpus_tokens"]
    config.export.quantize, config.export.quantize_teacher = [Quantization.int8, Quantization.int4], True
    linear = sum(math.prod(size) for name, size in SMALL.tensor_shapes().items() if name.endswith("proj.weight"))
    one = {bits: linear * bits // 8 + 4 * (count - linear) for bits in (8, 4)}
    found = storage.run_bytes(config, SMALL, SMALL)
    assert found["models"]["export"] == 4 * count + 2 * (one[8] + one[4])


def test_the_corpus_has_enough_for_training_and_for_calibration() -> None:
    def tokens(*overrides: str) -> int:
        config = compose(["teacher=take", "model.path=null", "prune.calibration_samples=10", *overrides])
        return int(storage.run_bytes(config, SMALL, SMALL)["corpus_tokens"])

    config = compose([])
    read = config.distil.steps * config.distil.global_batch_size * config.distil.sequence_length
    assert tokens() == round(read / 0.94), "train is what the other splits leave"
    scored = 10_000 * config.prune.sequence_length
    assert tokens("prune.calibration_samples=10000", "student.hidden_size=32") == round(scored / 0.02)
    same = [f"student.{name}=null" for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
    assert tokens("prune.calibration_samples=10000", *same) == round(read / 0.94), "nothing is scored"


def recipe(*overrides: str) -> Config:
    return compose(["experiment=llama31_8b_to_4b_width", "parallel.processes=8", *overrides])


def test_the_recipes_disk() -> None:
    found = plan(recipe())["disk"]
    assert found["checkpoint"] == 14 * 4_512_746_496
    assert found["host_held"] == found["checkpoint"] / 8, "shared evenly by all ranks"
    assert found["host_peak"] - found["host_held"] == pytest.approx(12 * 4_512_746_496 / 8, rel=1e-3), "norms are whole"
    assert plan(recipe("distil.save_asynchronous=false"))["disk"]["host_held"] == 0
    alike = plan(recipe("distil.distributed_optimizer=false"))["disk"]
    assert alike["host_peak"] == alike["host_held"], "nothing is gathered"
    assert found["corpus_tokens"] == pytest.approx(94e9 / 0.9979, rel=1e-3)
    assert found["corpus"] == 4 * found["corpus_tokens"], "128,256 ids take four bytes"


def test_a_teacher_that_is_trained_may_need_more_of_the_host() -> None:
    larger = SMALL.replace(intermediate_size=4096)
    both = compose(["experiment=quickstart", "parallel=tp1"])
    taken = compose(["experiment=quickstart", "parallel=tp1", "teacher=take", "model.path=null"])
    alone, with_teacher = (storage.run_bytes(config, larger, SMALL)["host_peak"] for config in (taken, both))
    assert alone == storage.checkpoint_bytes(SMALL.parameters(), taken.distil)
    assert with_teacher == storage.checkpoint_bytes(larger.parameters(), both.teacher)


def test_layouts_that_fit_come_best_first_and_divide_everything() -> None:
    found = plan(recipe("plan.layouts=true"))["layouts"]
    rows = found["layouts"]
    speeds = [row["tokens_per_second_per_device"] for row in rows]
    assert rows and speeds == sorted(speeds, reverse=True)
    assert found["usable_bytes"] == 0.9 * 80e9
    for row in rows:
        ranks = row["layout"]
        assert ranks["tensor"] * ranks["pipeline"] * ranks["context"] * ranks["data"] == 8
        assert 32 % ranks["pipeline"] == 0 and 1152 % ranks["data"] == 0
        assert row["bytes_per_device"] <= found["usable_bytes"]
        settings = [f"parallel.{name}={ranks[name]}" for name in ("tensor", "pipeline", "context", "sequence_parallel")]
        alone = planning.plan(recipe(*settings, f"distil.recompute={row['recompute']}"))
        assert alone["bytes_per_device"]["total"] == row["bytes_per_device"], "the plan of that layout says the same"
    assert found["fit"] <= found["divide"]
    assert any(row["layout"]["context"] > 1 for row in rows)


@pytest.mark.parametrize(
    "overrides",
    [
        ("distil.precision=fp32",),
        ("distil.document_mask=true",),
        ("distil.hidden=[{student_layer: -1, teacher_layer: -1, kind: relational}]",),
    ],
)
def test_sequences_are_cut_in_no_layout_where_they_cannot_be(overrides: tuple[str, ...]) -> None:
    rows = plan(recipe("plan.layouts=true", *overrides))["layouts"]["layouts"]
    assert rows and all(row["layout"]["context"] == 1 for row in rows)


def test_small_memory_leaves_few_layouts_and_says_what_would_be_needed() -> None:
    few = plan(recipe("plan.layouts=true", "plan.gpu='A100 40GB'"))
    many = plan(recipe("plan.layouts=true", "plan.gpu=H200"))["layouts"]
    assert 0 < few["layouts"]["fit"] < many["fit"]
    none = plan(recipe("plan.layouts=true", "parallel.processes=1", "parallel.tensor=1", "plan.gpu=L40S"))
    (own,) = none["layouts"]["layouts"]
    assert own["own"] and not own["fits"] and none["layouts"]["fit"] == 0 and "does not fit" in as_text(none)
    least = none["layouts"]["least_bytes"]
    assert least > 48e9 and f"none: the smallest takes {least / 1e9:,.1f} GB per device" in as_text(none)


def test_the_table_is_read_as_text() -> None:
    text = as_text(plan(recipe("plan.layouts=true")))
    assert "layouts of 8 x H100 fit (80 GB, of which 90% counted), best first:" in text
    assert "at 450 GB/s inside a machine and 50 GB/s per device between machines" in text
    assert "without recompute" in text and "communication per step" in text and "disk for the run" in text


def test_a_slower_network_prefers_layouts_that_send_less() -> None:
    options = ["parallel.processes=32", "plan.layouts=true", "plan.network_bytes_per_second="]
    fast, slow = (plan(recipe(*options[:2], options[2] + speed))["layouts"]["layouts"][0] for speed in ("1e12", "1e9"))
    assert slow["layout"] != fast["layout"]


def test_the_experiments_own_layout_is_in_the_table_with_the_hours_of_its_plan() -> None:
    for overrides in (["parallel.processes=256"], ["parallel.tensor=1", "parallel.sequence_parallel=false"]):
        found = plan(recipe("plan.layouts=true", *overrides))
        rows = found["layouts"]["layouts"]
        (own,) = (row for row in rows if row["own"])
        assert own["layout"] == found["layout"] and own["recompute"]
        assert own["hours"] == pytest.approx(found["prediction"]["hours"], rel=1e-3)
        speed = found["prediction"]["tokens_per_second_per_device"]
        assert own["tokens_per_second_per_device"] == pytest.approx(speed, rel=1e-3)
        assert len(rows) <= layout_table.SHOWN + 1 and f"{own['place']} own" in as_text(found)
    assert own["place"] > 1 and rows[0]["hours"] < own["hours"], "others are faster"


def test_a_layout_that_does_not_divide_is_told_beside_those_that_do() -> None:
    config = recipe("plan.layouts=true", "parallel.processes=4")
    assert validate(config, ["plan"]) == []
    found = plan(config)
    refused, rows = found["layouts"]["refused"], found["layouts"]["layouts"]
    assert "found 8 * 1 * 1 = 8 with 4 processes" in refused and refused in as_text(found)
    assert found["layout"] == rows[0]["layout"] and found["prediction"]["hours"] == rows[0]["hours"]
    assert not any(row["own"] for row in rows) and "1: the first layout is taken to reach 40%" in as_text(found)
    for other in (["parallel.tensor=16", "parallel.processes=16"], ["distil.global_batch_size=3", "parallel.tensor=2"]):
        assert plan(recipe("plan.layouts=true", *other))["layouts"]["refused"], "KV groups, and the batch"


@pytest.mark.parametrize("overrides", [["distil.global_batch_size=3", "distil.micro_batch_size=2"], ["plan.gpu=X"]])
def test_what_no_layout_mends_is_refused_as_ever(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=overrides[0].partition("=")[0]):
        validate(recipe("plan.layouts=true", "parallel.processes=4", *overrides), ["plan"])


def test_where_no_layout_fits_both_are_said() -> None:
    with pytest.raises(UserError, match="8 with 1 processes.* No other layout of 1 x L40S fits either"):
        plan(recipe("plan.layouts=true", "parallel.processes=1", "plan.gpu=L40S"))


def test_a_plan_for_gpus_needs_none(machine_without_gpu: None) -> None:
    config = recipe("parallel.device=cuda")
    assert validate(config, ["plan"]) == [] and plan(config)["layout"]["device"] == "cuda"
    with pytest.raises(UserError, match="expected an NVIDIA GPU, found none"):
        validate(recipe("parallel.device=cuda", "model.path=null"), ["verify"])


@pytest.mark.parametrize(("share", "good"), [("1", True), ("0.4", True), ("1.01", False), ("0", False)])
def test_a_gpu_reaches_its_whole_peak_at_most(share: str, good: bool) -> None:
    config = recipe(f"plan.share_of_peak={share}")
    if good:
        assert validate(config, ["plan"]) == []
        return
    with pytest.raises(UserError, match="plan.share_of_peak: expected a number above 0 and at most 1, found"):
        validate(config, ["plan"])


def test_the_share_of_the_peak_is_a_setting() -> None:
    usual, lower = (plan(recipe(f"plan.share_of_peak={share}")) for share in (0.4, 0.2))
    assert lower["prediction"]["hours"] == pytest.approx(2 * usual["prediction"]["hours"], rel=1e-3)
    assert lower["prediction"]["share_of_peak"] == 0.2


def test_every_gpu_has_memory_and_links() -> None:
    assert gpus.BF16_PEAKS.keys() == gpus.MEMORY.keys() == gpus.LINKS.keys() == gpus.BANDWIDTHS.keys()
    assert gpus.named_gpu("NVIDIA A100-SXM4-40GB") == "A100 40GB"
    assert gpus.named_gpu("NVIDIA A100-SXM4-80GB") == "A100"
    assert layout_table.SHOWN >= 10


def test_a_layout_that_does_not_fit_is_a_warning_of_the_plan() -> None:
    big = ["parallel.processes=1", "parallel.tensor=1", "parallel.sequence_parallel=false"]
    (warning,) = validate(recipe(*big), ["plan"])
    assert "do not fit the 80 GB of a H100" in warning and "plan.layouts=true" in warning
    assert validate(recipe(), ["plan"]) == []


def on_gpus(monkeypatch: pytest.MonkeyPatch, mebibytes: int) -> None:
    """A machine with eight GPUs of so much memory."""
    gpu = f"<gpu><fb_memory_usage><total>{mebibytes} MiB</total></fb_memory_usage></gpu>"
    xml = f"<nvidia_smi_log>{8 * gpu}</nvidia_smi_log>"
    monkeypatch.setattr(nvidia_smi, "read", lambda: nvidia_smi.parse(xml))


def test_a_training_that_does_not_fit_into_this_machines_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("parallel.tensor=1", "parallel.sequence_parallel=false", "distil.micro_batch_size=4")
    ranks = planning.planned_layout(config)
    teacher, student = planning.teacher_shape(config), planning.student_shape(config)
    on_gpus(monkeypatch, 81_559)
    memory.check(config, ["prune", "evaluate"], ranks, teacher, student)
    memory.check(config, ["distil"], replace(ranks, device="cpu"), teacher, student)
    memory.check(config, ["distil"], ranks, teacher, student)
    on_gpus(monkeypatch, 24_564)
    with pytest.raises(UserError) as caught:
        memory.check(config, ["distil"], ranks, teacher, student)
    message = str(caught.value)
    assert "expected distil to fit into the 25,757,220,864 bytes of a GPU of this machine" in message
    assert "teacher weights 16,060,522,496" in message and "plan.layouts=true" in message
    whole = planning.plan(config)["bytes_per_device"]["total"]
    assert f"found {whole:,} by plan" in message


def test_a_corrected_teacher_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("teacher=correct", "model.path=null")
    ranks, shapes = planning.planned_layout(config), (planning.teacher_shape(config), planning.student_shape(config))
    on_gpus(monkeypatch, 16_384)
    memory.check(config, ["distil"], ranks, *shapes)
    with pytest.raises(UserError, match="expected teacher to fit"):
        memory.check(config, ["teacher", "distil"], ranks, *shapes)


def test_without_an_answer_of_the_driver_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered() -> None:
        raise nvidia_smi.Unanswered("none")

    monkeypatch.setattr(nvidia_smi, "read", unanswered)
    config = recipe("parallel.tensor=1")
    shapes = planning.teacher_shape(config), planning.student_shape(config)
    memory.check(config, ["distil"], planning.planned_layout(config), *shapes)
