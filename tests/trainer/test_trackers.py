"""Trackers: one run over restarts, no step twice, and none of them ends a training."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.report.record import OF_THE_MACHINE
from pipelines.trainer import trackers
from pipelines.trainer.trackers import Trackers, Tracking
from tests.ranks import RankPools


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


class Remembering:
    """A tracker that keeps what it is given, and fails where it is told to."""

    made: list["Remembering"] = []

    def __init__(self, place: Path, tracking: Tracking, name: str, identifier: str | None) -> None:
        if tracking.project == "fails at its start":
            raise ConnectionError("nobody answers\nand more")
        self.place, self.name, self.settings, self.fails_at = place, name, tracking.settings, 0
        self.identifier = identifier or f"id-{len(self.made)}"
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended: list[bool] = []
        self.made.append(self)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if step == self.fails_at:
            raise OSError("no room")
        self.rows.append((step, dict(figures)))

    def close(self, finished: bool) -> None:
        self.ended.append(finished)


Start = Callable[..., Trackers]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A started Trackers of the remembering kind, "one" and "two", in tmp_path/run/distil."""
    monkeypatch.setattr(Remembering, "made", [])
    monkeypatch.setattr(trackers, "_TRACKERS", {"one": Remembering, "two": Remembering})
    directory = tmp_path / "run" / "distil"
    directory.mkdir(parents=True)

    def started(
        step: int = 0, logged: Mapping[str, int] | None = None, names: tuple[str, ...] = ("one",), project: str = "p"
    ) -> Trackers:
        made = Trackers(directory, "distil", Tracking(names, project, {"distil.steps": 3}))
        made.open(step, logged or {})
        return made

    return started


def test_a_run_goes_on_under_its_id_and_gets_no_step_twice(start: Start, tmp_path: Path) -> None:
    first = start()
    for step in (1, 2, 3):
        first.log("train", {"loss": 0.5}, step)
    first.log("validation", {"loss": 0.25}, 2)
    first.close(finished=False)
    assert json.loads((tmp_path / "run/distil/trackers.json").read_text()) == {"one": "id-0"}
    again = start(2, {"train": 3, "validation": 2}, names=("one", "two"))
    for step in (3, 4):
        again.log("train", {"loss": 0.5}, step)
        again.log("validation", {"loss": 0.25}, step)
    again.close(finished=True)
    killed, one, two = Remembering.made
    assert [tracker.identifier for tracker in Remembering.made] == ["id-0", "id-0", "id-2"]
    assert killed.rows[0] == (1, {"train/loss": 0.5}) and killed.rows[-1] == (2, {"validation/loss": 0.25})
    assert one.rows == [(3, {"validation/loss": 0.25}), (4, {"train/loss": 0.5}), (4, {"validation/loss": 0.25})]
    assert two.rows[0] == (3, {"train/loss": 0.5}), "a tracker that is new gets all that is written from now on"
    assert (killed.ended, one.ended, two.ended) == ([False], [True], [True])
    assert one.name == "run-distil" and one.place == tmp_path / "run" and one.settings == {"distil.steps": 3}


def test_a_tracker_that_fails_is_left_out_and_said_so_once(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    both = start(names=("one", "two"))
    one, two = Remembering.made
    one.fails_at = 2
    for step in (1, 2, 3):
        both.log("train", {"loss": 0.5}, step)
    both.close(finished=True)
    assert [step for step, _ in one.rows] == [1] and [step for step, _ in two.rows] == [1, 2, 3]
    assert (one.ended, two.ended) == ([], [True])
    said = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert said == ["distil  one has stopped: OSError: no room. Training goes on; metrics.jsonl has every figure."]


def test_a_tracker_that_does_not_start_is_left_out_and_said_so(
    start: Start, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = start(project="fails at its start")
    made.log("train", {"loss": 0.5}, 1)
    made.close(finished=True)
    assert "one has stopped: ConnectionError: nobody answers. Training goes on" in capsys.readouterr().out
    (tmp_path / "run/distil/trackers.json").write_text("{")
    start()
    assert "one has stopped: UserError" in capsys.readouterr().out, "a damaged file of ids neither ends the run"


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log behind seven bytes, in blocks of 32 KiB from the file's start."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block that no header fits into
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_rows(run: Path) -> dict[tuple[str, int], list[float]]:
    """{(name, step): values} of every file that wandb wrote under a run's directory."""
    from wandb.proto import wandb_internal_pb2

    found: dict[tuple[str, int], list[float]] = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    found.setdefault((name, items["_step"]), []).append(value)
    return found


def mlflow_rows(run: Path, identifier: str) -> dict[tuple[str, int], list[float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    found: dict[tuple[str, int], list[float]] = {}
    for name in client.get_run(identifier).data.metrics:
        for metric in client.get_metric_history(identifier, name):
            found.setdefault((name, metric.step), []).append(metric.value)
    return found


@pytest.mark.slow
def test_the_real_trackers_hold_a_stopped_and_continued_run_once(ranks: RankPools, tmp_path: Path, made: Path) -> None:
    """Through NeMo's trainer on two ranks, offline: stopped in step 6, continued from the checkpoint of step 3."""
    settings: dict[str, Any] = {"steps": 8, "validation_interval": 4, "checkpoint_interval": 3}
    arguments = {"directory": str(tmp_path), "corpus": str(made), "name": "distil", "trackers": ("wandb", "mlflow")}
    case = "tests.trainer.cases_runs:trained"
    ranks(2, case, **arguments, **settings, fault="stop", at=6)
    identifiers = json.loads((tmp_path / "distil/trackers.json").read_text())
    (result, _) = ranks(2, case, **arguments, **settings)
    assert json.loads((tmp_path / "distil/trackers.json").read_text()) == identifiers
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identifiers['wandb']}.wandb"] * 2, "rank 0 alone, once per start"
    expected = {}
    for row in map(json.loads, result["rows"]):
        # A step that was taken twice is told once: a second start's seconds to its first step stand in the file alone.
        numbers = {
            k: v for k, v in row.items() if not isinstance(v, str) and k not in ("step", "seconds_to_first_step")
        }
        expected |= {(f"{row['split']}/{k}", row["step"]): v for k, v in numbers.items()}
    for found in (wandb_rows(tmp_path), mlflow_rows(tmp_path, identifiers["mlflow"])):
        found = {place: values for place, values in found.items() if not place[0].endswith("seconds_to_first_step")}
        assert found.keys() == expected.keys()
        for place, values in found.items():
            assert len(values) == 1, f"{place} twice"
            if not place[0].endswith(OF_THE_MACHINE):  # those differ where a step was taken twice
                assert values[0] == pytest.approx(expected[place], rel=1e-12), place


def test_the_graph_in_tensorboard_has_the_modules_with_their_shapes(start: Start, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch import nn

    model = nn.ModuleDict(
        {"teacher": nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "student": nn.Linear(4, 2, bias=False)}
    )
    made = start(names=())
    made.show(model)
    made.log("train", {"loss": 0.5}, 1)
    made.close(True)
    events = EventAccumulator(str(tmp_path / "run" / "distil" / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    nodes = {node.name: node for node in events.Graph().node}
    assert [(name, node.op, list(node.input)) for name, node in nodes.items()] == [
        ("teacher/0", "Linear", []),
        ("teacher/1", "ReLU", ["teacher/0"]),
        ("student", "Linear", ["teacher/1"]),
    ]
    assert nodes["teacher/0"].attr["weight"].s == b"(3, 4) float32" and "bias" not in nodes["student"].attr
