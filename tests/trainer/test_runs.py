"""Training runs that are cut off, continued, laid out differently, or go wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.report.record import OF_THE_MACHINE
from tests.ranks import RankPool, RankPools

CASE = "tests.trainer.cases_runs:trained"
SHORT = {"steps": 10, "validation_interval": 4, "checkpoint_interval": 3, "keep_checkpoints": 2}

pytestmark = pytest.mark.slow
Run = Callable[..., list[dict[str, Any]]]
Whole = tuple[Path, dict[str, Any]]


@pytest.fixture
def run(ranks: RankPools, tmp_path: Path, made: Path) -> Run:
    """A run of that name in tmp_path, on two ranks where `world` says nothing else; what each rank left."""
    return lambda name, world=2, **settings: ranks(
        world, CASE, directory=str(tmp_path), corpus=str(made), name=name, **(SHORT | settings)
    )


@pytest.fixture(scope="module")
def whole(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory, made: Path) -> Whole:
    """The directory of a run at DP 2 that nothing cut off, and what it left."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    (first, _) = ranks(2, CASE, directory=str(directory), corpus=str(made), name="whole", **SHORT)
    return directory, first


def rows(result: dict[str, Any]) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock decides, or the processes' memory."""
    parsed = [json.loads(row) for row in result["rows"]]
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in parsed]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not isinstance(value, str)}


def same_rows(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a step has consumed the same rows of tokens, on whatever ranks; a validation tells nothing of that."""
    return bool(row.get("data_hash") == expected.get("data_hash"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(directory: Path, pattern: str) -> Path:
    return max(directory.rglob(pattern), key=lambda file: file.stat().st_size)


def test_a_run_continues_from_a_checkpoint_between_two_validations(run: Run, whole: Whole, tmp_path: Path) -> None:
    _, uncut = whole
    (tmp_path / "cut" / "checkpoints" / "partial-step-0000007").mkdir(parents=True)
    run("cut", fault="stop", at=6)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "split": "tr')  # a row that a kill cut in two
    (cut, _) = run("cut")
    assert rows(cut) == rows(uncut)
    assert cut["figures"] == uncut["figures"]
    assert cut["checkpoints"] == uncut["checkpoints"] == ["step-0000009", "step-0000010"]
    assert uncut["forks"] == 0, "a rank has threads, whose locks a forked process would wait for"


def test_ranks_that_get_sigterm_decide_nothing_and_continue(run: Run, whole: Whole) -> None:
    """As the launchers send it to all of them; tests/test_main.py has the verdict that is not left."""
    for result in run("ended", fault="term", at=5):
        assert result["message"] == "a process was ended by SIGTERM; the same command continues."
        assert max(result["states"]) == 5, "behind its step"
    (continued, _) = run("ended")
    assert rows(continued) == rows(whole[1])


def test_the_figures_of_a_run_are_those_of_its_last_step(ranks: RankPools, whole: Whole, made: Path) -> None:
    directory, first = whole
    validations = [row for row in rows(first) if row["split"] == "validation"]
    assert [row["step"] for row in validations] == [4, 8, 10]
    assert {name: validations[-1][name] for name in first["figures"]} == first["figures"]
    # As after a kill between the last checkpoint and the end of the stage.
    (again, _) = ranks(2, CASE, directory=str(directory), corpus=str(made), name="whole", **SHORT)
    assert again | {"states": {}, "costs": {}} == first | {"states": {}, "costs": {}}


def test_a_run_in_bf16_killed_with_nine_continues_bit_by_bit(
    ranks: RankPools, run: Run, tmp_path: Path, made: Path
) -> None:
    """In fp32: tests/test_pipeline.py."""
    layout = {"tensor": 2, "precision": "bf16"}
    (whole, _) = run("whole", **layout)
    doomed = RankPool(2)
    with pytest.raises(RuntimeError, match="died"):
        arguments = {"directory": str(tmp_path), "corpus": str(made), "name": "killed", "fault": "kill", "at": 6}
        doomed(CASE, arguments | layout | SHORT, timeout=300)
    (continued, _) = run("killed", **layout)
    assert rows(continued) == rows(whole)
    assert all(math.isfinite(row["loss"]) for row in rows(whole))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layout_gives_the_same_losses(run: Run, precision: str) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "dp2": {},
        "dp2 with the distributed optimizer": {"distributed_optimizer": True},
        "tp2": {"tensor": 2},
        "tp2 with sequence parallelism": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
    }
    if precision == "fp32":
        layouts |= {
            "one process": {"world": 1},
            "tp2 and dp2": {"world": 4, "tensor": 2, "distributed_optimizer": True},
        }
    found = {name: rows(run(name, precision=precision, **layout)[0]) for name, layout in layouts.items()}
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for name, curve in found.items():
        for row, expected in zip(curve, found["dp2"], strict=True):
            names = row.keys() - {"split"}
            assert row["split"] == expected["split"] and names == expected.keys() - {"split"}
            if precision == "bf16":  # a token near a bound may lie in another bin or band
                names = {name for name in names if not name.endswith("calibration_error") and "entropy" not in name}
            found_, wanted = ({key: side[key] for key in names} for side in (row, expected))
            assert same_rows(found_, wanted) and numbers(found_) == pytest.approx(numbers(wanted), rel=tolerance), name


def test_every_validation_tells_what_it_watched_and_what_the_machine_did(run: Run) -> None:
    (result, _) = run("watched", tensor=2, validation_batches=2)
    parsed = [json.loads(row) for row in result["rows"]]
    by_split = {split: [row for row in parsed if row["split"] == split] for split in ("train", "validation")}
    watched = {"overlap", "teacher_entropy", "student_calibration_error", "teacher_calibration_error"}
    for row in by_split["validation"]:
        assert watched <= row.keys() and any(name.startswith("kd_entropy_") for name in row)
        assert 0 < row["overlap"] < 1 and 0 < row["student_calibration_error"] < 1
        assert row["peak_bytes"] > 50 << 20 and row["tokens"] == 2 * 8 * 32
        before = [step for step in by_split["train"] if step["step"] == row["step"]]
        assert [row["gradient_norm"]] == [step["gradient_norm"] for step in before]
    for row in by_split["train"]:
        assert not watched & row.keys() and "peak_bytes" not in row
        assert row["memory_bytes"] > 50 << 20 and row["step_seconds"] * row["tokens_per_second"] == pytest.approx(
            8 * 32
        )
    for row in parsed:
        assert row["flops_per_second"] == pytest.approx(1000 * row["tokens_per_second"])
        assert "percent_of_plan" not in row, "nothing is made up where no peak is known"


def test_a_profile_is_a_trace_of_three_steps_with_named_ranges(run: Run, tmp_path: Path) -> None:
    (plain, _), (result, _) = run("plain", tensor=2), run("profiled", tensor=2, profile=True)
    assert rows(result) == rows(plain), "it only watches"
    (file,) = (tmp_path / "profiled" / "tensorboard").glob("*.pt.trace.json")
    assert file.name.startswith("rank0.")
    events = json.loads(file.read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name for name in ranges if name.startswith("ProfilerStep")} == {
        f"ProfilerStep#{step}" for step in (5, 6, 7)
    }
    micro_batches = 3 * 8 // 2
    for name in ("teacher forward", "student forward", "loss"):
        assert ranges.count(name) >= micro_batches, "a validation lies between"
    assert any(event["name"] == "[memory]" for event in events)
    assert not list((tmp_path / "plain").rglob("*.trace.json"))


def test_a_run_continues_at_another_layout(run: Run, whole: Whole) -> None:
    for name, layout in (("tp2", {"tensor": 2}), ("pp2", {"pipeline": 2})):
        run(name, distributed_optimizer=True, fault="stop", at=8)  # at DP 2
        continued = run(name, distributed_optimizer=True, **layout)[0]
        for row, expected in zip(rows(continued), rows(whole[1]), strict=True):
            assert same_rows(row, expected) and numbers(row) == pytest.approx(numbers(expected), rel=1e-5), name


def test_without_clipping_the_norm_is_known_all_the_same(run: Run) -> None:
    unclipped = {tensor: rows(run(f"0-{tensor}", gradient_clip=0.0, tensor=tensor)[0]) for tensor in (1, 2)}
    never_clipped = rows(run("1e9", gradient_clip=1e9)[0])
    assert unclipped[1] == never_clipped
    norms = {
        tensor: [row["gradient_norm"] for row in found if row["split"] == "train"]
        for tensor, found in unclipped.items()
    }
    assert len(norms[1]) == 10 and min(norms[1]) > 0
    assert norms[2] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("fault", "what", "step"),
    [("gradient", "gradient norm", 5), ("weight before the step", "loss", 5), ("weight after the step", "weight", 6)],
)
def test_a_number_that_is_not_finite_on_one_rank_stops_every_rank(
    run: Run, tensor: int, fault: str, what: str, step: int
) -> None:
    results = run("spoiled", tensor=tensor, fault=fault, at=step)
    assert len({result["message"] for result in results}) == 1
    assert what in results[0]["message"] and f"at step {step}" in results[0]["message"]
    assert results[0]["checkpoints"] == ["step-0000003"]
    if fault == "gradient":
        assert all(result["finite"] for result in results)  # the step was not taken


@pytest.mark.parametrize("layout", [{"distributed_optimizer": True}, {"tensor": 2}], ids=["dp2", "tp2"])
def test_a_step_that_is_not_finite_is_left_out_and_changes_nothing(run: Run, layout: dict[str, Any]) -> None:
    settings = {"skip_steps": 2, **layout}
    spoiled = run("spoiled", faults=[("gradient", 5)], **settings)
    (good, _) = run("good", **settings)
    for result in spoiled:
        assert result["message"] == "" and result["finite"]
        assert result["states"][5] == result["states"][4] != result["states"][6]
    train = {row["step"]: row for row in rows(spoiled[0]) if row["split"] == "train"}
    assert sorted(train) == list(range(1, 11)), "it counts as a step"
    assert train[5]["skipped"] == "a gradient norm that is not finite" and "gradient_norm" not in train[5]
    assert [train[step]["skipped_steps"] for step in (4, 5, 10)] == [0, 1, 1]
    before = [row for row in rows(good) if row["step"] < 5]
    assert rows(spoiled[0])[: len(before)] == before
    assert not any("skipped" in row for row in rows(good))
    run("cut", faults=[("gradient", 5), ("stop", 8)], **settings)
    (continued, _) = run("cut", **settings)
    assert rows(continued) == rows(spoiled[0])


def test_more_steps_than_may_be_left_out_end_the_run(run: Run) -> None:
    """Counted over a resume too."""
    run("cut", faults=[("gradient", 4), ("stop", 8)], skip_steps=2)
    results = run("cut", faults=[("gradient", 7), ("gradient", 9)], skip_steps=2)
    assert len({result["message"] for result in results}) == 1
    told = (
        "expected at most skip_steps=2 steps to be left out, found step 9 besides: a gradient norm that is not finite"
    )
    assert told in results[0]["message"] and results[0]["checkpoints"] == ["step-0000003", "step-0000006"]
    (continued, _) = run("cut", skip_steps=3)
    assert continued["checkpoints"][-1] == "step-0000010"


def test_a_spike_of_the_gradient_is_left_out(run: Run) -> None:
    settings = {"steps": 24, "spike": 5.0, "warmup_steps": 0}
    (spiked, _) = run("spiked", faults=[("spike", 10), ("spike", 20)], skip_steps=1, **settings)
    train = {row["step"]: row for row in rows(spiked) if row["split"] == "train"}
    assert [step for step, row in train.items() if "skipped" in row] == [20], "none before sixteen steps are known"
    assert spiked["states"][20] == spiked["states"][19] and train[20]["gradient_norm"] > 5 * train[19]["gradient_norm"]
    (stopped, _) = run("stopped", faults=[("spike", 20)], **settings)
    assert "above spike=5 times the median" in stopped["message"]


def test_a_checkpoint_tells_the_loss_of_its_validation(run: Run, tmp_path: Path) -> None:
    """By which the best one stays: tests/trainer/test_kept_checkpoint.py."""
    settings = {"checkpoint_interval": 2, "keep_checkpoints": 2, "keep_best": 3, "validation_interval": 4}
    (found, _) = run("best", **settings)
    losses = {row["step"]: row["loss"] for row in rows(found) if row["split"] == "validation"}
    assert found["checkpoints"] == [f"step-{step:07d}" for step in (4, 8, 10)], "validated, and 8 and 10 are the last"
    for step in (4, 8, 10):
        about = json.loads((tmp_path / "best" / "checkpoints" / f"step-{step:07d}" / "about.json").read_text())
        assert about == {"step": step, "validation_loss": losses[step]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kept_checkpoint_is_exported_at_any_layout(
    ranks: RankPools, run: Run, tmp_path: Path, made: Path, precision: str
) -> None:
    run("kept", distributed_optimizer=True, precision=precision)  # at DP 2
    for tensor, step, same in ((2, 10, True), (1, 9, False)):
        arguments = {"directory": str(tmp_path), "corpus": str(made), "name": "kept", "step": step, "tensor": tensor}
        (found, _) = ranks(2, "tests.trainer.cases_runs:exported", **arguments)
        assert len(found) == 3 + 2 * 9 and all(equal == same for name, equal in found.items() if "norm" not in name)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_what_saving_takes_and_what_a_step_consumed_is_told(run: Run, whole: Whole) -> None:
    train = [json.loads(row) for row in whole[1]["rows"] if '"train"' in row]
    assert all(0 <= row["checkpoint_seconds"] < row["time"] for row in train)
    assert train[3]["checkpoint_seconds"] > train[2]["checkpoint_seconds"] == 0, "saved after step 3"
    assert [row["step"] for row in train if "seconds_to_first_step" in row] == [1]
    assert len({row["data_hash"] for row in train}) == 10, "every step has its own rows"
    costs = whole[1]["costs"]
    assert (
        costs["checkpoint_seconds"] > train[-1]["checkpoint_seconds"] - 0.01 and 0 < costs["checkpoint_percent"] < 100
    )
    run("cut", fault="stop", at=8, log_interval=2)
    (continued, _) = run("cut", log_interval=2)
    later = [json.loads(row) for row in continued["rows"] if '"train"' in row]
    assert [row["step"] for row in later if "seconds_to_first_step" in row] == [2, 8], "the first rows of both starts"
    saved = [row["checkpoint_seconds"] for row in later]
    assert saved == sorted(saved), "over resumes"


@pytest.mark.parametrize("step", [4, 5, 10])
def test_a_stop_that_one_rank_was_asked_for_is_agreed_on_and_saved(
    run: Run, whole: Whole, tmp_path: Path, step: int
) -> None:
    """At a step with a validation, at one without either, and at the last, which ends the run by itself."""
    results = run("asked", fault="asked", at=step, keep_checkpoints=9)
    checkpoint = tmp_path / "asked" / "checkpoints" / f"step-{step:07d}"
    told = f"stopped as asked at step {step} of 10: {checkpoint} is whole" if step < 10 else ""
    assert all(result["message"].startswith(told) and bool(result["message"]) == bool(told) for result in results)
    names = ["step-0000003"] if step < 10 else ["step-0000003", "step-0000006", "step-0000009"]
    assert results[0]["checkpoints"] == [*names, checkpoint.name]
    (continued, _) = run("asked")
    assert rows(continued) == rows(whole[1]) and continued["figures"] == whole[1]["figures"]


def test_a_checkpoint_with_one_flipped_bit_is_moved_aside(run: Run, whole: Whole, tmp_path: Path) -> None:
    run("cut", fault="stop", at=8)
    checkpoints = tmp_path / "cut" / "checkpoints"
    flip_a_bit(largest(checkpoints / "step-0000006", "*.distcp"))
    (continued, _) = run("cut")
    assert rows(continued) == rows(whole[1])
    assert continued["checkpoints"] == ["damaged-step-0000006", "step-0000009", "step-0000010"]


def test_a_run_with_none_but_damaged_checkpoints_does_not_begin_again(
    ranks: RankPools, run: Run, tmp_path: Path
) -> None:
    run("cut", fault="stop", at=8)
    checkpoints = tmp_path / "cut" / "checkpoints"
    flip_a_bit(largest(checkpoints / "step-0000006", "*.distcp"))
    next((checkpoints / "step-0000003").rglob("common.pt")).unlink()
    for _ in range(2):  # the second time too, when both are aside already
        for message in ranks(2, "tests.trainer.cases_runs:newest_checkpoint", directory=str(checkpoints)):
            assert "damaged-step-0000003, damaged-step-0000006" in message
            assert "begin again at step 0" in message
    flip_a_bit(largest(checkpoints / "damaged-step-0000006", "*.distcp"))  # as from a copy
    (checkpoints / "damaged-step-0000006").rename(checkpoints / "step-0000006")
    found = ranks(2, "tests.trainer.cases_runs:newest_checkpoint", directory=str(checkpoints))
    assert found == ["step-0000006"] * 2


@pytest.mark.parametrize("recorded", [True, False])
def test_an_index_of_samples_that_was_cut_short_is_rebuilt(
    run: Run, whole: Whole, tmp_path: Path, recorded: bool
) -> None:
    run("cut", fault="stop", at=8)
    index = tmp_path / "cut" / "data_index"
    shuffled = largest(index, "*train-shuffle_index.npy")
    shuffled.write_bytes(shuffled.read_bytes()[:-8])
    if not recorded:  # a kill before the index was whole
        (index / "whole.json").unlink()
    (continued, _) = run("cut")
    assert rows(continued) == rows(whole[1])
