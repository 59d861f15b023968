"""The contract of a run's directory, with processes that die in the middle and disks that are full."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import artifacts, files, lineage, lock
from pipelines.artifacts import State
from pipelines.choices import Quantization
from pipelines.config import Config, Optimizer, Tracker, UserError
from pipelines.stages import FREE, PIPELINE, STAGES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.run.directory, config.run.name = str(tmp_path / "runs"), "one"
    return config


def make(config: Config, stage: str, outputs: dict[str, str]) -> Path:
    """A finished stage with these files."""
    attempt = artifacts.begin(config, stage, print)
    for name, content in outputs.items():
        path = attempt.context.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    attempt.finish({"loss": 1.5})
    return attempt.context.directory


def state(config: Config, stage: str) -> State:
    return artifacts.examine(config, STAGES[stage]).state


def run_python(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_stage_is_complete_only_after_finish(config: Config) -> None:
    assert state(config, "corpus") is State.new
    attempt = artifacts.begin(config, "corpus", print)
    directory = attempt.context.directory
    (directory / "blend.json").write_text("{}")
    assert not artifacts.is_complete(directory)
    attempt.finish({"documents": 3})
    manifest = artifacts.read_manifest(directory)
    assert artifacts.is_complete(directory) and state(config, "corpus") is State.finished
    assert manifest["figures"] == {"documents": 3}
    assert list(manifest["outputs"]) == ["blend.json"]
    assert {"git", "versions", "layout", "seed", "settings", "inputs", "seconds"} <= manifest.keys()
    assert (directory / "config.yaml").is_file() and not (directory / "lock").exists()


def test_an_unfinished_stage_continues_with_what_it_has(config: Config) -> None:
    attempt = artifacts.begin(config, "corpus", print)
    (attempt.context.directory / "half").write_text("x")
    attempt.release()
    assert state(config, "corpus") is State.unfinished
    again = artifacts.begin(config, "corpus", print)
    assert (again.context.directory / "half").read_text() == "x"
    again.release()


def test_a_stage_whose_input_is_missing_or_unfinished_says_what_to_run(config: Config) -> None:
    with pytest.raises(UserError, match=r"expected corpus in .*found nothing. Run stage=corpus first"):
        artifacts.begin(config, "teacher", print)
    attempt = artifacts.begin(config, "corpus", print)
    (attempt.context.directory / "blend.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished. Run stage=corpus first"):
        artifacts.begin(config, "teacher", print)
    attempt.finish({})
    artifacts.begin(config, "teacher", print).release()


def test_a_changed_setting_says_what_changed_and_asks_for_overwrite(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    config.data.test_fraction = 0.1
    with pytest.raises(UserError) as caught:
        artifacts.begin(config, "corpus", print)
    assert "data.test_fraction: 0.02 -> 0.1" in str(caught.value) and "overwrite=true" in str(caught.value)
    assert artifacts.is_complete(artifacts.stage_directory(config, "corpus"))
    config.overwrite = True
    attempt = artifacts.begin(config, "corpus", print)
    assert not (attempt.context.directory / "blend.json").exists()
    assert not artifacts.is_complete(attempt.context.directory)
    attempt.release()


def test_a_setting_that_an_older_version_did_not_have_asks_for_nothing_while_it_is_off(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    attempt = artifacts.begin(config, "teacher", print)
    for setting in ("document_mask", "weight_decay"):
        del attempt.manifest["settings"][f"teacher.{setting}"]
    attempt.finish({})
    with pytest.raises(UserError) as caught:
        artifacts.examine(config, STAGES["teacher"])
    assert "teacher.weight_decay: (not there) -> 0.1" in str(caught.value)
    assert "document_mask" not in str(caught.value)
    config.teacher.document_mask = True
    with pytest.raises(UserError, match=r"teacher.document_mask: \(not there\) -> true"):
        artifacts.examine(config, STAGES["teacher"])


def test_a_changed_input_says_which_file(config: Config) -> None:
    corpus = make(config, "corpus", {"blend.json": "{}", "tokenizer/tokenizer.json": "a"})
    make(config, "teacher", {"hf/config.json": "{}"})
    assert state(config, "teacher") is State.finished
    (corpus / "tokenizer" / "tokenizer.json").write_text("b")
    with pytest.raises(UserError, match=r"input corpus .*tokenizer/tokenizer.json \w{12} -> \w{12}"):
        artifacts.examine(config, STAGES["teacher"])


def test_an_unfinished_stage_with_changed_settings_is_not_continued(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    artifacts.begin(config, "teacher", print).release()
    config.teacher.steps += 1
    with pytest.raises(UserError, match=r"is unfinished .*\n.*teacher.steps: 200 -> 201"):
        artifacts.begin(config, "teacher", print)


def test_layout_logging_and_checkpoint_interval_may_change(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    make(config, "teacher", {"hf/config.json": "{}"})
    config.parallel.processes, config.parallel.tensor = 1, 1
    for name in FREE & vars(config.teacher).keys():
        value = getattr(config.teacher, name)
        others = {bool: lambda v: not v, int: lambda v: v + 1, Optimizer: lambda v: Optimizer.torch}
        setattr(config.teacher, name, others[type(value)](value))
    config.run.trackers, config.run.project = [Tracker.wandb], "other"
    assert {"checkpoint_interval", "log_interval", "micro_batch_size", "profile"} <= FREE & vars(config.teacher).keys()
    assert state(config, "teacher") is State.finished


def test_the_distillation_decides_a_search_that_distils_its_candidates_and_no_other(config: Config) -> None:
    config.prune.target.ratio = 0.6
    before = artifacts.settings(config, STAGES["prune"])
    config.distil.learning_rate, config.distil.validation_batches = 3e-3, 7
    assert artifacts.settings(config, STAGES["prune"]) == before
    config.prune.search.distil_tokens = 1e5
    before = artifacts.settings(config, STAGES["prune"])
    config.distil.checkpoint_interval += 1
    assert artifacts.settings(config, STAGES["prune"]) == before
    config.distil.learning_rate, config.distil.validation_batches = 4e-3, 8
    changed = lineage.changes({"settings": before}, artifacts.settings(config, STAGES["prune"]), {})
    assert changed == ["distil.learning_rate: 0.003 -> 0.004", "distil.validation_batches: 7 -> 8"]


def test_the_windows_of_an_evaluation_decide_an_export_that_scores_quantized_forms_and_no_other(config: Config) -> None:
    without = artifacts.settings(config, STAGES["export"])
    assert not any(name.startswith(("evaluate.", "distil.")) for name in without)
    config.export.quantize = [Quantization.int8]
    known = artifacts.settings(config, STAGES["export"])
    assert known["export.quantize"] == ["int8"]
    for name in ("evaluate.batches", "evaluate.micro_batch_size", "evaluate.split", "distil.precision"):
        assert name in known


def test_every_setting_in_the_stage_table_is_in_the_schema() -> None:
    for name in PIPELINE:
        if STAGES[name].settings:
            assert artifacts.settings(Config(), STAGES[name])
        assert set(STAGES[name].reads + STAGES[name].may_read) <= artifacts.INPUTS.keys()


def test_overwrite_leaves_what_says_itself_what_it_is_of(tmp_path: Path) -> None:
    for name in (
        "scores.safetensors",
        "search.json",
        "speed.json",
        "kept.json",
        "hf/config.json",
        "hf/scores.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    artifacts.move_aside(tmp_path, print)
    assert {path.name for path in tmp_path.rglob("*")} == {"scores.safetensors", "search.json", "speed.json"}


def test_overwrite_moves_training_state_aside_and_says_so(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    make(config, "teacher", {"hf/config.json": "{}", "checkpoints/step_5/weights": "w", "metrics.jsonl": "{}\n"})
    config.teacher.steps, config.overwrite = 7, True
    said: list[str] = []
    attempt = artifacts.begin(config, "teacher", said.append)
    names = {path.name.split(".2")[0] for path in attempt.context.directory.iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "config.yaml", "manifest.json", "lock"}
    moved = next(attempt.context.directory.glob("checkpoints.2*"))
    assert (moved / "step_5" / "weights").read_text() == "w"
    assert any(str(moved) in line for line in said)
    attempt.release()
    config.teacher.steps = 8
    artifacts.begin(config, "teacher", print).release()
    assert (moved / "step_5" / "weights").read_text() == "w"


def test_overwrite_moves_aside_what_a_search_has_distilled(tmp_path: Path) -> None:
    checkpoint = tmp_path / "candidates" / "h8-f8-a2-g2-l2" / "checkpoints" / "step_5" / "weights"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("w")
    artifacts.move_aside(tmp_path, print)
    (moved,) = tmp_path.glob("candidates.2*")
    assert (moved / checkpoint.relative_to(tmp_path / "candidates")).read_text() == "w"


def test_a_directory_that_is_being_emptied_is_complete_no_more(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(config, "corpus", {"blend.json": "{}"})
    config.data.test_fraction, config.overwrite = 0.1, True
    monkeypatch.setattr(artifacts, "move_aside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        artifacts.begin(config, "corpus", print)
    assert (directory / "blend.json").exists() and not artifacts.is_complete(directory)
    assert not (directory / "lock").exists()


def test_a_finished_stage_whose_files_were_altered_is_no_finished_stage(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    files_of_it = {"hf/config.json": "{}", "hf/README.md": "card", "hf/weights": "w", "checkpoints/a": "w"}
    directory = make(config, "teacher", files_of_it)
    for name in ("hf/README.md", "checkpoints/a", "hf/more.json"):
        (directory / name).write_text("another")
    (directory / "hf" / "weights").unlink()
    assert state(config, "teacher") is State.finished, "a text for people, training state, what is new, what is gone"
    (directory / "hf" / "config.json").write_text('{"hidden_size": 49}')
    with pytest.raises(UserError, match=r"not as it wrote them:\n  hf/config.json: [0-9a-f]{12} -> [0-9a-f]{12}\nPut"):
        state(config, "teacher")
    config.overwrite = True
    assert state(config, "teacher") is State.changed


def test_an_altered_measurement_is_not_taken_again(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    directory = make(config, "teacher", {"hf/config.json": "{}", "parts/a.json": "1", "parts/b.json": "2"})
    (directory / "parts" / "a.json").write_text("3")
    config.overwrite = True
    artifacts.begin(config, "teacher", print).release()
    assert [path.name for path in (directory / "parts").iterdir()] == ["b.json"]


def test_checkpoints_are_no_outputs_and_no_inputs(config: Config) -> None:
    make(config, "corpus", {"blend.json": "{}"})
    directory = make(config, "teacher", {"hf/config.json": "{}", "checkpoints/a": "w", "tensorboard/events": "e"})
    assert list(artifacts.read_manifest(directory)["outputs"]) == ["hf/config.json"]


def test_names_of_bookkeeping_are_content_in_a_directory_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "text.jsonl").write_text("x")
    assert list(artifacts.fingerprint(tmp_path, tmp_path / ".hashes")) == ["logs/text.jsonl"]


def test_a_live_writer_is_refused_and_a_dead_one_succeeded(config: Config) -> None:
    code = """
import sys, time
from pipelines import artifacts
from pipelines.config import Config
config = Config()
config.run.directory, config.run.name = sys.argv[1], "one"
artifacts.begin(config, "corpus", print)
print("locked", flush=True)
time.sleep(60)
"""
    other = run_python(code, config.run.directory)
    try:
        assert other.stdout.readline() == "locked\n", other.stderr.read()
        with pytest.raises(UserError, match=f"no other writer, found process {other.pid} on .*kill {other.pid};"):
            artifacts.begin(config, "corpus", print)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert not artifacts.is_complete(artifacts.stage_directory(config, "corpus"))
    assert state(config, "corpus") is State.unfinished
    said: list[str] = []
    attempt = artifacts.begin(config, "corpus", said.append)
    assert f"taking over from process {other.pid}" in said[0]
    attempt.release()


def test_a_process_id_that_came_again_is_no_live_writer(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = {"pid": os.getpid(), "start": 1, "host": lock.socket.gethostname()}
    assert not lock.is_alive(holder, path)
    assert lock.is_alive(holder | {"start": lock._start_time(os.getpid())}, path)


def test_what_the_same_job_has_locked_on_a_node_that_died_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch job that is started again elsewhere, or a job that continues it (pipelines/cluster/job.sh)."""
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 1, "start": 1, "host": "elsewhere", "job": "17"}))
    monkeypatch.setenv(lock.JOB, "18")
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        lock.Lock(path, print)
    monkeypatch.setenv(lock.JOB, "17")
    held = lock.Lock(path, print)
    assert json.loads(path.read_text())["job"] == "17"
    held.release()


def test_a_writer_on_another_host_lives_as_long_as_it_refreshes_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 1, "start": 1, "host": "another-host"}))
    with pytest.raises(UserError, match="process 1 on another-host"):
        lock.Lock(path, print)
    os.utime(path, (0, time.time() - 2 * lock.STALE))
    lock.Lock(path, print).release()
    assert not path.exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"a": object()})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        artifacts.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_directory_is_built_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    with artifacts.new_directory(path) as partial:
        (partial / "x").write_text("1")
        assert not path.exists()
    with pytest.raises(RuntimeError), artifacts.new_directory(path) as partial:
        (partial / "x").write_text("2")
        raise RuntimeError
    assert (path / "x").read_text() == "1"
    with artifacts.new_directory(path) as partial:
        (partial / "y").write_text("3")
    assert os.listdir(path) == ["y"] and os.listdir(tmp_path) == ["hf"]


def test_kill_minus_nine_while_a_directory_is_built_leaves_no_directory(tmp_path: Path) -> None:
    code = """
import sys, time
from pipelines import artifacts
with artifacts.new_directory(sys.argv[1]) as partial:
    (partial / "model.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = run_python(code, tmp_path / "hf")
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "hf").exists()
    with artifacts.new_directory(tmp_path / "hf") as partial:
        assert os.listdir(partial) == []


def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artifacts.write_atomic(path, "old")
    code = """
import signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pipelines import artifacts, files
try:
    artifacts.write_atomic(sys.argv[1], b"x" * 100_000)
except OSError as error:
    print(files.is_disk_error(error))
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    out, error = run_python(
        code, path, preexec_fn=limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ).communicate()
    assert out == "True\n", error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, sidecars = tmp_path / "large", tmp_path / ".hashes"
    large.write_bytes(b"x" * (files.SMALL + 1))
    first = artifacts.file_hash(large, sidecars)
    sidecar = next(sidecars.iterdir())
    assert json.loads(sidecar.read_text())["size"] == files.SMALL + 1
    sidecar.write_text(sidecar.read_text().replace(first, "0" * 64))
    assert artifacts.file_hash(large, sidecars) == "0" * 64
    large.write_bytes(b"y" * (files.SMALL + 1))
    assert artifacts.file_hash(large, sidecars) not in (first, "0" * 64)


def test_a_given_corpus_and_model_are_read_where_they_are(config: Config, tmp_path: Path) -> None:
    config.data.corpus = str(tmp_path / "corpus")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config.model.path = str(model)
    assert artifacts.corpus_directory(config) == tmp_path / "corpus"
    assert artifacts.teacher_directory(config) == model
    config.teacher.mode = type(config.teacher.mode).correct
    assert artifacts.teacher_directory(config) == tmp_path / "runs" / "one" / "teacher" / "hf"
    config.student.path = "elsewhere"
    assert artifacts.student_start_directory(config) == Path("elsewhere")
