"""One model's score in one task by lm-evaluation-harness (EleutherAI, arXiv 2405.14782), which is imported here alone.

A task is one of the harness's own, by name; a task file (.yaml); or a file of questions (.jsonl, questions.py).
"""

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import UserError
from pipelines.questions import Question, read_questions

PREFERRED = ("acc_norm", "acc")  # of a task's metrics
SEED = 1234  # of the harness for the examples before a question


@dataclass(frozen=True)
class Task:
    """name: in the results. source: a name of the harness's registry or a path. shots, metric: None: the task's own."""

    name: str
    source: str
    shots: int | None = None
    metric: str | None = None

    @property
    def is_file(self) -> bool:
        return self.source.endswith((".yaml", ".yml", ".jsonl"))


def version() -> str:
    """ "lm-eval <version>". Raises UserError where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks: expected lm-evaluation-harness, found none. Install it: pip install "
            "--constraint containers/constraints.txt '.[tasks]', or pip install 'lm-eval[hf]'."
        )
    return f"lm-eval {importlib.metadata.version('lm_eval')}"


@functools.cache
def _registry() -> Any:
    """The harness's own tasks. Once per process: thousands of files are read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def described(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """{"task", "kind": "task" | "group", "tasks": how many, "data": repositories of data sets, "shots"} of each task of
    the registry, without its data. Raises UserError for a name that it does not know, shots that a task does not take
    and a metric that it does not have."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = []
    for task in tasks:
        _refuse_unknown(task)
        leaves = _leaves_of(task.source)
        settings = [load_yaml(_registry().task_index[leaf].yaml_path, resolve_func=False) for leaf in leaves]
        for each in settings:
            _refuse_shots(task, each.get("num_fewshot"))
            metrics = {str(entry["metric"]) for entry in each.get("metric_list") or []}
            if task.metric and metrics and task.metric.partition(",")[0] not in metrics:
                raise UserError(
                    f"evaluate.tasks.metrics.{task.name}: expected one of {', '.join(sorted(metrics))}, found "
                    f"{task.metric!r}. Correct it."
                )
        data = sorted({str(each["dataset_path"]) for each in settings if each.get("dataset_path")})
        kind = "group" if task.source in _registry().all_groups else "task"
        found.append({"task": task.name, "kind": kind, "tasks": len(leaves), "data": data, "shots": task.shots})
    return found


def _leaves_of(name: str) -> list[str]:
    """The tasks of the registry that a name of it stands for."""
    entry = _registry().task_index[name]
    members = (entry.cfg or {}).get("task") if name in _registry().all_groups else None
    below = members if isinstance(members, list) else sorted(entry.tags) if name in _registry().all_tags else []
    names = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in below]
    return [leaf for each in names for leaf in _leaves_of(str(each))] or [name]


def _refuse_unknown(task: Task) -> None:
    known = _registry().all_tasks
    if task.source not in known:
        near = difflib.get_close_matches(task.source, known, n=5)
        raise UserError(
            f"evaluate.tasks.names: expected a task of the harness, found {task.source!r}"
            + (f"; there are {', '.join(near)}." if near else ".")
            + " lm_eval ls tasks lists them; a file is named by its path with .yaml or .jsonl."
        )


def _refuse_shots(task: Task, own: int | None) -> None:
    if task.shots and own == 0:
        raise UserError(
            f"evaluate.tasks.shots.{task.name}={task.shots}: expected 0, since the task has no examples of its own "
            "before a question. Set it to 0."
        )


def download(names: Sequence[str], cache: Path) -> dict[str, list[str]]:
    """{task: repositories} of tasks of the registry, whose data sets lie in `cache` afterwards, as `score` reads them.

    Raises UserError for a name that the registry does not know, and where the hub gives no data.
    """
    tasks = [Task(name, name) for name in names]
    found = {row["task"]: row["data"] for row in described(tasks)}
    cache.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        try:
            with quiet(), _cache(task, cache):
                _load(task)
        except Exception as error:  # of any kind: data sets come from many places
            raise UserError(
                f"fetch.tasks: expected the data of {task.name} ({', '.join(found[task.name])}) from the hub, found "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. Run stage=fetch where there is "
                "network, such as a login node; the same command continues."
            ) from None
    return found


def score(
    model: Any, tokenizer: Any, task: Task, limit: int | None, micro_batch_size: int, fetched: Path | None = None
) -> dict[str, Any]:
    """{"metric", "value", "stderr" (None where the harness gives none), "shots", "samples", "all": {metric: value},
    "scores": the counted metric of each sample where its mean is the value, else None}.

    model, tokenizer: of transformers. limit: the first so many questions; None: all. fetched: where `download` has put
    data sets; without it, or where there is nothing, the usual cache of the library datasets.

    Raises UserError for whatever the harness cannot do with the task.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with quiet(), _cache(task, fetched):
            asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=micro_batch_size)
            loaded = _load(task)
            results = evaluate(asked, loaded, limit=limit, bootstrap_iters=1000, log_samples=True)
    except UserError:
        raise
    except Exception as error:  # of any kind: task files bring their own code and data
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise UserError(_explained(task, error)) from error
    return _picked(task, _top(task, loaded), results)


def _load(task: Task) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    if not task.is_file:
        _refuse_unknown(task)
    manager = TaskManager(include_defaults=False) if task.is_file else _registry()
    if task.source.endswith(".jsonl"):
        loaded = manager.load([_of_questions(task)])
    elif task.is_file and not Path(task.source).is_file():
        raise UserError(f"evaluate.tasks.names: expected the task file {task.source}, found none. Check the path.")
    else:
        if task.is_file:
            _refuse_no_data(task)
        loaded = manager.load([task.source])
    for found in loaded["tasks"].values():
        own = found.get_config("num_fewshot")
        _refuse_shots(task, own)
        if task.shots is not None or own is None:
            found.set_config(key="num_fewshot", value=task.shots or 0)
        found.set_fewshot_seed(seed=SEED)
    return dict(loaded)


def _refuse_no_data(task: Task) -> None:
    """A reader of files that is given none takes every file below the working directory for its data."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS
    from lm_eval.tasks._yaml_loader import load_yaml

    found = load_yaml(task.source, resolve_func=False)
    below = found["task"] if isinstance(found.get("task"), list) else []
    for each in (found, *(entry for entry in below if isinstance(entry, dict))):
        reader, given = each.get("dataset_path"), each.get("dataset_kwargs") or {}
        if reader in READERS and "custom_dataset" not in each and not {"data_files", "data_dir"} & set(given):
            raise UserError(
                f"{task.name}: expected data_files or data_dir under dataset_kwargs, since dataset_path is {reader}, "
                f"found neither. Name the task's files in {task.source}."
            )


def _top(task: Task, loaded: dict[str, Any]) -> str:
    """What the harness calls the task or the group that was asked for."""
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    if task.source in groups:
        return task.source
    if not groups and len(tasks) == 1:
        return str(next(iter(tasks)))
    outer = [name for name in groups if not any(name in group.child_names for group in groups.values())]
    if len(outer) == 1:
        return str(outer[0])
    raise UserError(
        f"evaluate.tasks.names: expected a task or a group, found that {task.source} stands for {len(tasks)} tasks "
        f"without a score of all: {', '.join(sorted(tasks)[:8])}. Name those that are wanted."
    )


def _of_questions(task: Task) -> dict[str, Any]:
    """A task of the harness that makes of each question the requests that questions.py makes of it."""
    import datasets

    questions = read_questions(task.source, "evaluate.tasks.names")
    by_context = [len(set(question.contexts)) > 1 for question in questions]
    if any(by_context) and not all(by_context):
        place = by_context.index(not by_context[0])
        raise UserError(
            f"{task.source}, line {questions[place].line}: expected questions of one kind, found choices of contexts, "
            "as Winogrande's, among choices of continuations. Put them into two files."
        )
    spaced = all(text.startswith(" ") for question in questions for text in question.continuations)
    held = datasets.Dataset.from_list([_row(question, by_context[0], spaced) for question in questions])
    return {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": held},
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " " if spaced else "",  # what acc_norm does not count
        "doc_to_text": "gold" if by_context[0] else "context",
        "doc_to_choice": "choices",
        "doc_to_target": "continuation" if by_context[0] else "gold",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in PREFERRED[::-1]],
    }


def _row(question: Question, by_context: bool, spaced: bool) -> dict[str, Any]:
    continuations = [text[spaced:] for text in question.continuations]
    return {
        "context": question.contexts[0],
        "continuation": continuations[0],
        "choices": list(question.contexts) if by_context else continuations,
        "gold": question.gold,
    }


def _picked(task: Task, name: str, results: Any) -> dict[str, Any]:
    figures = {key: value for key, value in results["results"][name].items() if "," in key}
    values = {_plain(key): value for key, value in figures.items() if "_stderr," not in key}
    values = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    if not values:
        raise UserError(f"{task.name}: expected a score from the harness, found none. Name its tasks, not the group.")
    metric = task.metric or next((known for known in PREFERRED if known in values), next(iter(values)))
    if metric not in values:
        raise UserError(
            f"evaluate.tasks.metrics.{task.name}: expected one of {', '.join(values)}, found {metric!r}. Correct it."
        )
    key, _, chosen = metric.partition(",")
    error = figures.get(f"{key}_stderr,{chosen or 'none'}")
    leaves = _leaves(name, results)
    samples = [row for leaf in leaves for row in results["samples"][leaf] if row["filter"] == (chosen or "none")]
    _refuse_what_is_not_finite(task, samples, values[metric])
    scores = [float(row[key]) for row in samples if isinstance(row.get(key), int | float)]
    whole = len(scores) == len(samples) and math.isclose(math.fsum(scores) / len(scores), values[metric], abs_tol=1e-9)
    shots = {results["n-shot"][leaf] for leaf in leaves}
    return {
        "metric": metric,
        "value": values[metric],
        "stderr": float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
        "shots": shots.pop() if len(shots) == 1 else None,
        "samples": len(samples),
        "all": values,
        "scores": scores if whole else None,
    }


def _plain(key: str) -> str:
    return key.removesuffix(",none")


def _leaves(name: str, results: Any) -> list[str]:
    """The tasks below a group; the task itself."""
    children = results["group_subtasks"].get(name) or []
    return [leaf for child in children for leaf in _leaves(child, results)] or [name]


def _refuse_what_is_not_finite(task: Task, samples: list[dict[str, Any]], value: float) -> None:
    """A NaN among log-likelihoods makes a wrong choice and no error."""
    for row in samples:
        for response in row["filtered_resps"]:
            first = response[0] if isinstance(response, list | tuple) and response else response
            if isinstance(first, float) and not math.isfinite(first):
                raise UserError(
                    f"{task.name}: expected finite log-likelihoods, found {first} at question {row['doc_id']}. Check "
                    "the model's weights; with bf16 try fp32."
                )
    if not math.isfinite(value):
        raise UserError(f"{task.name}: expected a finite score, found {value}. Check the model's weights.")


def _explained(task: Task, error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    offline = any(word in text.lower() for word in ("offline", "couldn't reach", "couldn't find", "connection"))
    if not task.is_file and offline:
        return (
            f"{task.name}: expected its data set on this machine, found: {text}. Where there is network run "
            f"stage=fetch 'fetch.tasks=[{task.source}]', and give the same fetch.directory here."
        )
    what = "a task file that the harness runs" if task.is_file else "a task that the harness runs"
    return f"{task.name}: expected {what}, found {type(error).__name__}: {text}. Correct it or leave it out."


@contextlib.contextmanager
def _cache(task: Task, fetched: Path | None) -> Iterator[None]:
    """Data sets of the registry's tasks come from `fetched`; what is made of a task file's data goes with it."""
    import datasets

    usual = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="tasks-") as temporary:
        if task.is_file:
            datasets.config.HF_DATASETS_CACHE = Path(temporary)
        elif fetched is not None and fetched.is_dir():
            datasets.config.HF_DATASETS_CACHE = fetched
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = usual


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness's bars and warnings are many; what matters is raised or in its results."""
    import logging

    before = logging.root.manager.disable
    os.environ["DISABLE_MULTIPROC"] = "1"  # a rank's threads and sockets outlive no fork
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
