"""Where a training's figures go beside metrics.jsonl: TensorBoard, always, and the trackers of run.trackers.

Nothing of it needs a network or an account. Weights & Biases writes <run>/wandb, which `wandb sync` sends when one
likes; with WANDB_MODE=online it sends at once. MLflow writes <run>/mlflow.db, which `mlflow ui --backend-store-uri
sqlite:///<run>/mlflow.db` shows; with MLFLOW_TRACKING_URI it is that server's. Rank 0 alone has them.
"""

import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from pipelines import console, files

Figures = Mapping[str, float]
IDENTIFIERS = "trackers.json"


@dataclass(frozen=True)
class Tracking:
    """names: of config.Tracker. project: of the trackers' runs. settings: what is shown beside a run's figures."""

    names: tuple[str, ...] = ()
    project: str = "stillhouse"
    settings: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """One run at a tracker. Its methods raise what the tracker raises."""

    identifier: str

    def log(self, figures: Figures, step: int) -> None: ...

    def close(self, finished: bool) -> None: ...


class Trackers:
    """A stage's runs at all trackers, the same over restarts: the ids lie in <directory>/trackers.json.

    A tracker that fails, at its start or later, is left out from there on and said so in one line; training goes on.
    What is written to TensorBoard fails as any file of the stage.
    """

    def __init__(self, directory: Path, description: str, tracking: Tracking) -> None:
        self.directory, self.description, self.tracking = directory, description, tracking
        self._open: dict[str, Tracker] = {}
        self._logged: dict[str, Mapping[str, int]] = {}

    def open(self, start: int, logged: Mapping[str, int]) -> None:
        """start: the step that training continues from. logged: the last step of each split that an earlier start has
        logged. What was taken back since is purged from TensorBoard; the others keep it and get those steps no second
        time."""
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=start + 1)
        for name in self.tracking.names:
            self._guarded(name, lambda name=name: self._start(name, logged))

    def show(self, model: nn.Module) -> None:
        """The model's modules as TensorBoard's graph."""
        from tensorboard.compat.proto.event_pb2 import Event

        from pipelines.trainer.module_graph import module_graph

        event = Event(graph_def=module_graph(model).SerializeToString())
        self._events._get_file_writer().add_event(event)  # its own way traces a forward pass, which takes all ranks

    def log(self, split: str, figures: Figures, step: int) -> None:
        """As <split>/<name>."""
        named = {f"{split}/{name}": value for name, value in figures.items()}
        for name, value in named.items():
            self._events.add_scalar(name, value, step)
        for name, tracker in list(self._open.items()):
            if step > self._logged[name].get(split, 0):
                self._guarded(name, lambda tracker=tracker: tracker.log(named, step))

    def close(self, finished: bool) -> None:
        """finished: training has come to its end; otherwise something stopped it."""
        self._events.close()
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.close(finished))
        self._open.clear()

    def _start(self, name: str, logged: Mapping[str, int]) -> None:
        path = self.directory / IDENTIFIERS
        known = files.read_object(path) if path.exists() else {}
        run = f"{self.directory.parent.name}-{self.description}"
        tracker = _TRACKERS[name](self.directory.parent.resolve(), self.tracking, run, known.get(name))
        self._open[name], self._logged[name] = tracker, logged if name in known else {}
        files.write_json(path, known | {name: tracker.identifier})
        console.say(f"{self.description}  {name}: run {run}, {tracker.identifier}, of project {self.tracking.project}")

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._open.pop(name, None)
            first_line = (str(error).splitlines() or [""])[0]
            console.say(
                f"{self.description}  {name} has stopped: {type(error).__name__}: {first_line}. Training goes on; "
                "metrics.jsonl has every figure."
            )


class WeightsAndBiases:
    """identifier None: a new run. Offline each start of a process writes a directory of its own, all of one run."""

    def __init__(self, place: Path, tracking: Tracking, name: str, identifier: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing goes out that nobody asked for
        import wandb

        self.identifier = identifier or uuid.uuid4().hex[:8]
        self.run = wandb.init(
            project=tracking.project,
            name=name,
            id=self.identifier,
            resume="allow",
            dir=str(place),
            mode=os.environ.get("WANDB_MODE") or "offline",  # type: ignore[arg-type]
            config=dict(tracking.settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, figures: Figures, step: int) -> None:
        self.run.log(dict(figures), step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """identifier None: a new run, with the settings as its parameters."""

    def __init__(self, place: Path, tracking: Tracking, name: str, identifier: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing goes out that nobody asked for
        # A server that does not answer must not hold up every rank for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(server or f"sqlite:///{place / 'mlflow.db'}")
        if identifier is not None:
            self.client.update_run(identifier, status="RUNNING")
            self.identifier = identifier
            return
        experiment = self.client.get_experiment_by_name(tracking.project)
        artifacts = None if server else (place / "mlflow").as_uri()
        number = experiment.experiment_id if experiment else self.client.create_experiment(tracking.project, artifacts)
        self.identifier = str(self.client.create_run(number, run_name=name).info.run_id)
        parameters = [Param(key, str(value)) for key, value in tracking.settings.items()]
        for first in range(0, len(parameters), 100):  # what it takes at a time
            self.client.log_batch(self.identifier, params=parameters[first : first + 100])

    def log(self, figures: Figures, step: int) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.identifier, metrics=[self._metric(k, float(v), now, step) for k, v in figures.items()]
        )

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.identifier, status="FINISHED" if finished else "FAILED")


_TRACKERS: dict[str, Callable[[Path, Tracking, str, str | None], Tracker]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
