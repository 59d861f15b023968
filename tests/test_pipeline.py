"""The whole pipeline through its real entry: from text to a report, killed and resumed, at other layouts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines.processes import descendants
from pipelines.report.record import OF_THE_MACHINE
from pipelines.stages import PIPELINE
from pipelines.stopping import EXIT_STOPPED, VERDICT

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "experiment=quickstart",
    "data.sources=[{kind: standard_library, limit_bytes: 1500000}]",
    "model.shape.vocab_size=600",
    "model.shape.hidden_size=64",
    "model.shape.intermediate_size=128",
    "model.shape.num_hidden_layers=2",
    "model.shape.num_attention_heads=4",
    "model.shape.num_key_value_heads=2",
    "model.shape.head_dim=16",
    "student.hidden_size=48",
    "student.intermediate_size=80",
    *(
        f"{stage}.{setting}"
        for stage in ("teacher", "distil")
        for setting in (
            "sequence_length=32",
            "micro_batch_size=2",
            "global_batch_size=8",
            "warmup_steps=2",
            "validation_interval=5",
            "validation_batches=2",
            "checkpoint_interval=5",
        )
    ),
    "teacher.steps=60",
    "teacher.learning_rate=1e-2",
    "distil.steps=15",
    "distil.kd_weight=1",
    "distil.ce_weight=0",
    "prune.sequence_length=32",
    "prune.calibration_samples=32",
    "evaluate.sequence_length=32",
    "evaluate.batches=4",
    "evaluate.efficiency.batch_sizes=[1]",
    "evaluate.efficiency.prompt_tokens=[16]",
    "evaluate.efficiency.new_tokens=4",
    "evaluate.efficiency.rounds=1",
    "evaluate.tasks.questions=10",
    "evaluate.domains.0.tokens=4000",
    "evaluate.generation.count=2",
    "evaluate.generation.new_tokens=8",
    "evaluate.behaviour.new_tokens=4",
    "export.nemo=true",
    "gates=[]",  # so few steps keep no bound
    "export.new_tokens=4",
]
QUALITY_ALONE = [
    "evaluate.tasks.names=[]",
    "evaluate.domains=[]",
    "evaluate.generation.count=0",
    "evaluate.behaviour.prompts=null",
]
SECRETS = {"HF_TOKEN": "hf_" + "qR7" * 12, "WANDB_API_KEY": "0f" * 20, "AWS_SECRET_ACCESS_KEY": "not-to-be-written"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | SECRETS
WITHOUT_NETWORK = [sys.executable, str(ROOT / "tests" / "offline" / "without_network.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TORCHRUN += ["--nproc-per-node=2"]

pytestmark = pytest.mark.slow


def start(directory: Path, *overrides: str, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, "-m", "pipelines", *SMALL, f"run.directory={directory}", *overrides],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
    )


def run(directory: Path, *overrides: str, launcher: Sequence[str] = (sys.executable,)) -> str:
    return output_of(start(directory, *overrides, launcher=launcher), directory)


def output_of(process: subprocess.Popen[str], directory: Path) -> str:
    """What a run printed that ended well. One that hangs is ended, and the stacks of its threads, which its logs have
    then, are told."""
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        for pid in descendants(process.pid)[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        process.kill()
        output, _ = process.communicate(timeout=60)
        logs = "\n".join(f"{log}:\n{log.read_text()[-20_000:]}" for log in sorted(directory.rglob("logs/*.log")))
        pytest.fail(f"no end after ten minutes:\n{output}\n{logs}")
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run.directory, output) of one uninterrupted run of every stage at TP 2, without network."""
    directory = tmp_path_factory.mktemp("runs")
    alone = [*WITHOUT_NETWORK, str(directory / "refused"), sys.executable]
    return directory, run(directory, "stage=all", "run.name=whole", launcher=alone)


def borrow(directory: Path) -> list[str]:
    """Distil alone, from the finished run's corpus, teacher and pruned student."""
    whole = directory / "whole"
    return [
        "stage=distil",
        f"data.corpus={whole / 'corpus'}",
        "teacher.mode=take",
        f"model.path={whole / 'teacher' / 'hf'}",
        f"student.path={whole / 'prune' / 'hf'}",
    ]


def rows(directory: Path, name: str) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the machine."""
    lines = (directory / name / "distil" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE} for line in lines]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def kill_after_checkpoint(directory: Path, name: str, *overrides: str) -> None:
    """Start distil and end all of its processes with SIGKILL once two checkpoints are there and step 7 is logged."""
    process = start(directory, f"run.name={name}", *overrides)
    metrics, checkpoints = (directory / name / "distil" / found for found in ("metrics.jsonl", "checkpoints"))
    wait_for(lambda: len(list(checkpoints.glob("step-*"))) > 1 and '"step": 7' in metrics.read_text(), process)
    for pid in reversed(descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (directory / name / "distil" / "complete").exists()
    assert not (directory / name / "distil" / "hf").exists()


def test_text_becomes_a_student_and_a_report(finished: tuple[Path, str]) -> None:
    directory, output = finished
    results = json.loads((directory / "whole" / "report" / "results.json").read_text())["models"]
    assert set(results) == {"teacher", "pruned", "student"}
    for name, figures in results.items():
        for key in ("parameters", "loss", "perplexity", "bits_per_byte", "kl", "agreement", "tokens_per_second"):
            assert isinstance(figures[key], int | float), (name, key)
    assert results["teacher"]["loss"] < 5.5  # random: log(600) = 6.4
    assert "distil  training reads 3,840 tokens, 0.00" in output and "each validation reads 512 tokens, 0.0" in output
    assert results["student"]["kl"] < results["pruned"]["kl"]
    assert results["pruned"]["parameters"] == results["student"]["parameters"] < results["teacher"]["parameters"]
    for line in ("tokens/s", "loss = 1.0 * T^2 * KL(teacher || student, T=1.0) + 0.0 * CE", "teacher's own loss"):
        assert line in output
    assert str(directory / "whole" / "report" / "index.html") in output
    assert str(directory / "whole" / "export" / "hf") in output
    for noise in ("[NeMo", "Warning", "INFO", "LOCAL_RANK", "Trainer"):
        assert noise not in output, noise
    for stage in ("corpus", "teacher", "prune", "distil", "evaluate", "export", "report"):
        assert (directory / "whole" / stage / "complete").is_file()


def test_what_a_distillation_took_stands_beside_its_plan(finished: tuple[Path, str]) -> None:
    directory, output = finished[0] / "whole", finished[1]
    figures = json.loads((directory / "distil" / "manifest.json").read_text())["figures"]
    plan = {entry["what"]: entry for entry in figures["plan"]}
    checkpoint = plan["a checkpoint"]
    assert checkpoint["planned"] < checkpoint["measured"] < checkpoint["planned"] + 2e6, (
        "tensors, and a little metadata"
    )
    assert plan["memory of a device"]["measured"] > 0 and plan["training speed"]["measured"] > 0
    assert "distil  memory of a device" in output and "distil  a checkpoint" in output
    assert "of the plan" in (directory / "report" / "index.html").read_text()


def test_a_whole_run_asks_nothing_of_the_network(finished: tuple[Path, str]) -> None:
    """It ended well without one; nor did anything of it try, and wait, and go on."""
    attempts = finished[0] / "refused"
    assert not attempts.exists(), attempts.read_text()
    probe = [*WITHOUT_NETWORK, str(attempts), sys.executable, "-c"]
    code = "import urllib.request as r; r.urlopen('http://192.0.2.1/')"
    done = subprocess.run([*probe, code], capture_output=True, text=True)
    refused = attempts.read_text()
    attempts.unlink()
    assert done.returncode and "no network" in done.stderr and "192.0.2.1" in refused


def test_no_secret_of_the_environment_is_written(finished: tuple[Path, str]) -> None:
    directory, output = finished
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {"manifest.json", "config.yaml", "distil.log", "results.json"} <= {path.name for path in files}
    for name, secret in SECRETS.items():
        assert secret not in output
        assert [path for path in files if secret.encode() in path.read_bytes()] == [], name


def test_a_finished_stage_is_left_alone_and_a_changed_setting_is_named(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    hf = directory / "whole" / "distil" / "hf" / "model.safetensors"
    before = hf.stat().st_mtime_ns
    run(directory, "stage=distil", "run.name=whole", "parallel=dp2")  # another layout is no other result
    process = start(directory, "stage=distil", "run.name=whole", "distil.temperature=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "distil.temperature: 1.0 -> 2.0" in output and "overwrite=true" in output
    assert hf.stat().st_mtime_ns == before


def test_a_run_that_is_killed_and_then_stopped_continues_with_the_same_numbers(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, its newest checkpoint damaged, continued, asked to stop, continued to the end, exported meanwhile."""
    directory, _ = finished
    overrides = ["distil.checkpoint_interval=3", "distil.keep_checkpoints=9", *borrow(directory)]
    kill_after_checkpoint(directory, "killed", *overrides)
    newest = sorted((directory / "killed" / "distil" / "checkpoints").glob("step-*"))[-1]
    largest = max(newest.rglob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 100)
    monkeypatch.setitem(ENVIRONMENT, VERDICT, str(directory / "verdict.json"))
    process = start(directory, "run.name=killed", *overrides)
    damaged = newest.with_name(f"damaged-{newest.name}")
    wait_for(lambda: damaged.exists() and newest.exists(), process)  # which is written again
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, output
    assert f"leaves out {newest}" in output and "continues from" in output and "step-0000003" in output
    last = sorted((directory / "killed" / "distil" / "checkpoints").glob("step-*"))[-1]
    assert f"stopped as asked at step {int(last.name[5:])} of 15: {last} is whole" in output
    verdict = json.loads((directory / "verdict.json").read_text())
    assert (verdict["code"], verdict["stage"]) == (EXIT_STOPPED, "distil") and str(last) in verdict["message"]
    assert not (directory / "killed" / "distil" / "lock").exists(), "rank 0 has ended by itself"
    process = start(directory, "run.name=killed", *overrides)
    step = ("stage=export", "export.nemo=false", f"export.step={int(last.name[5:])}")
    exported = run(directory, "run.name=killed", *borrow(directory)[1:], *step)
    assert f"reading {last}" in exported
    assert (directory / "killed" / f"export-{last.name}" / "complete").exists()
    assert {path.name for path in (directory / "killed" / f"export-{last.name}").iterdir()} & {"trained"} == set()
    assert f"continues from {last}" in output_of(process, directory)
    assert rows(directory, "killed") == rows(directory, "whole")
    weights = Path("distil") / "hf" / "model.safetensors"
    assert (directory / "killed" / weights).read_bytes() == (directory / "whole" / weights).read_bytes()


def test_a_short_soak_ends_as_the_run_without_faults(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Its long form is a command: docs/faults.md."""
    soak = [sys.executable, "launchers/soak.py", "--directory", str(tmp_path), "--base", str(finished[0] / "whole")]
    done = subprocess.run(
        [*soak, "--rounds", "1", "--kinds", "save"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| save | 1 | 1 |" in done.stdout and "bit by bit" in done.stdout
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [one["kind"] for one in found["rounds"]] == ["save", "none"] and found["differences"] == []


def test_a_run_in_steps_continues_where_it_was_killed(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Killed in its second step, one torchrun per stage, and continued in a single torchrun for all."""
    whole, steps = finished[0] / "whole", tmp_path / "steps"
    overrides = [
        *("run.name=steps", "stage=[prune,distil,report]", f"data.corpus={whole / 'corpus'}", "teacher.mode=take"),
        *(f"model.path={whole / 'teacher' / 'hf'}", "student.hidden_size=null", "student.intermediate_size=null"),
        "iterate.students=[{hidden_size: 56, steps: 6}, {hidden_size: 48, num_attention_heads: 2, steps: 7}]",
    ]
    process, deadline = start(tmp_path, *overrides), time.monotonic() + 600
    while not (steps / "step1" / "distil" / "complete").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    for pid in reversed(descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (steps / "distil" / "complete").exists()
    before = (steps / "step1" / "distil" / "manifest.json").read_bytes()
    output = output_of(start(tmp_path, *overrides, launcher=TORCHRUN), tmp_path)
    for stage in ("prune", "distil"):
        assert f"{stage}: finished already in {steps / 'step1' / stage}" in output
    assert (steps / "step1" / "distil" / "manifest.json").read_bytes() == before
    results = json.loads((steps / "report" / "results.json").read_text())
    first, second = results["steps"]
    teacher, student = str(whole / "teacher" / "hf"), str(steps / "step1" / "distil" / "hf")
    assert (first["start"], second["start"]) == (teacher, student)
    assert first["teacher"] == second["teacher"] == teacher
    assert first["parameters"] > second["parameters"] and (first["steps"], second["steps"]) == (6, 7)
    assert all(row["ce"] > 0 and row["kd"] > 0 for row in (first, second))
    parents = {entry["stage"]: entry["inputs"]["teacher"] for entry in results["lineage"]}
    assert parents["prune"]["path"] == student and len(parents["prune"]["sha256"]) == 64
    assert list(parents) == ["step1/prune", "step1/distil", "prune", "distil"]
    config = json.loads((steps / "distil" / "hf" / "config.json").read_text())
    assert [config[name] for name in ("hidden_size", "num_attention_heads", "head_dim")] == [48, 2, 16]


def run_in_one_torchrun(directory: Path, name: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Every stage in the same two processes, as torchrun or srun start them: a few steps. Returns the models' figures.

    The other tests start one torchrun per stage; this is also the quicker way.
    """
    short = ["teacher.steps=40", "distil.steps=10", "distil.learning_rate=3e-3", "stage=all", f"run.name={name}"]
    process = start(directory, *short, *QUALITY_ALONE, *overrides, launcher=TORCHRUN)
    output_of(process, directory)
    for stage in PIPELINE:
        assert (directory / name / stage / "complete").is_file()
    results = json.loads((directory / name / "report" / "results.json").read_text())
    assert results["pending"] == []
    models: dict[str, dict[str, Any]] = results["models"]
    assert models["student"]["kl"] < models["pruned"]["kl"] < 1
    assert models["student"]["loss"] < models["pruned"]["loss"]
    return models


def tensors(directory: Path) -> dict[str, Any]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def test_a_tied_model_in_bf16_over_two_pipeline_stages(tmp_path: Path) -> None:
    settings = ["model.shape.tie_word_embeddings=true", "distil.precision=bf16", "teacher.precision=bf16"]
    models = run_in_one_torchrun(tmp_path, "pp2", "parallel=pp2", *settings)
    for place in ("teacher", "prune", "distil", "export"):
        found = tensors(tmp_path / "pp2" / place / "hf")
        assert "lm_head.weight" not in found and {str(t.dtype) for t in found.values()} == {"torch.bfloat16"}
    config = json.loads((tmp_path / "pp2" / "export" / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["torch_dtype"] == "bfloat16"
    assert models["student"]["parameters"] == sum(t.numel() for t in found.values())


def test_a_corrected_mistral_teacher_over_two_replicas(finished: tuple[Path, str], tmp_path: Path) -> None:
    from pipelines.families import ModelShape
    from pipelines.model.random_model import write_random_model

    given = tmp_path / "given"
    shape = ModelShape(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4096,
        architecture="MistralForCausalLM",
    )
    write_random_model(given, shape, seed=1, tokenizer=finished[0] / "whole" / "corpus" / "tokenizer")
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 5]}
    (given / "generation_config.json").write_text(json.dumps(generation))
    run_in_one_torchrun(
        tmp_path,
        "dp2",
        "parallel=dp2",
        "teacher.mode=correct",
        f"model.path={given}",
        "teacher.distributed_optimizer=true",
        "distil.distributed_optimizer=true",
        "distil.temperature=4",
    )
    for place in ("teacher", "prune", "distil", "export"):
        config = json.loads((tmp_path / "dp2" / place / "hf" / "config.json").read_text())
        assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 4096
        written = json.loads((tmp_path / "dp2" / place / "hf" / "generation_config.json").read_text())
        assert written == generation, place
    corpus, tokenizer = tmp_path / "dp2" / "corpus" / "tokenizer", "tokenizer.json"
    assert (corpus / tokenizer).read_bytes() == (given / tokenizer).read_bytes()
    corrected, start = tensors(tmp_path / "dp2" / "teacher" / "hf"), tensors(given)
    assert all((corrected[name] - start[name]).abs().max() > 0 for name in start)


def test_the_exported_nemo_checkpoint_is_a_teacher_with_sequence_parallelism(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    export = finished[0] / "whole" / "export"
    models = run_in_one_torchrun(
        tmp_path,
        "sp",
        "parallel=tp2_sp",
        "teacher.mode=take",
        f"model.path={export / 'nemo'}",
        "student.hidden_size=32",
        "student.intermediate_size=64",
        "student.num_attention_heads=2",
    )
    for file in ("model.safetensors", "tokenizer.json"):  # what was exported both ways is the same
        assert (tmp_path / "sp" / "teacher" / "hf" / file).read_bytes() == (export / "hf" / file).read_bytes()
    assert models["student"]["parameters"] < models["teacher"]["parameters"]
