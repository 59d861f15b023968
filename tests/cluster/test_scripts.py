"""What is written into batch scripts and what is left to do, without SLURM; their shell is run where it counts."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from pipelines import gates, preflight
from pipelines.artifacts import begin
from pipelines.cluster import queue, script
from pipelines.cluster.__main__ import main
from pipelines.cluster.chain import Chain
from pipelines.cluster_settings import ClusterConfig, StagesConfig
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.stages import PIPELINE, STAGES
from pipelines.validation.cluster import check, of_stage, seconds

LOCAL = ["experiment=quickstart", "cluster=local"]
EVIL = "a'b\"c$(touch hit) `touch hit`; touch hit & #\\ *"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def header(text: str) -> str:
    """What stands before job.sh."""
    assert text.endswith(script.BODY.read_text())
    return text.removesuffix(script.BODY.read_text())


def values_of(text: str, place: Path) -> dict[str, list[str]]:
    """What the shell makes of a script's variables."""
    names = ("run", "python", "container", "srun_arguments", "overrides", "VALUE")
    ask = "set +u\n" + "".join(f'printf "%s\\0" {name} "${{#{name}[@]}}" "${{{name}[@]}}"\n' for name in names)
    done = subprocess.run(["bash", "-c", header(text) + ask], cwd=place, capture_output=True, text=True, check=True)
    words, found = done.stdout.split("\0"), {}
    while len(words) > 1:
        name, count = words[0], int(words[1])
        found[name], words = words[2 : 2 + count], words[2 + count :]
    return found


def test_a_chain_has_a_job_for_each_stage_with_nodes_of_its_own(place: Path) -> None:
    alone = ["parallel.tensor=1", "teacher.micro_batch_size=4", "distil.micro_batch_size=4"]
    chain = Chain([*LOCAL, "cluster.stages.distil.nodes=4", "cluster.stages.distil.time=2-00", *alone])
    assert [job.label for job in chain.jobs] == [f"{n:02}-{stage}" for n, stage in enumerate(PIPELINE, start=1)]
    chain.write()
    jobs = {job.stage: job for job in chain.jobs}
    assert jobs["distil"].size() == "4 nodes, 1 process on each" and jobs["corpus"].size() == "1 node, 1 process"
    text = jobs["distil"].script.read_text()
    for line in ("--nodes=4", "--time=2-00", "--signal=B:USR1@120", "--open-mode=append", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert f"#SBATCH --output={place}/runs/quickstart/slurm/logs/%x_%j.log\n" in text
    assert "parallel.processes=4" in jobs["distil"].overrides and "parallel.processes=2" in jobs["prune"].overrides
    assert "parallel.processes: 4" not in text and "processes: 4" in jobs["distil"].settings.read_text()
    assert not any(o.startswith("cluster") for o in jobs["distil"].overrides)  # sites' files are not in images
    written = yaml.safe_load(jobs["distil"].settings.read_text())["cluster"]
    assert (written["name"], written["warning_seconds"], written["nodes"]) == ("local", 120, 2)
    assert {key: written["stages"]["distil"][key] for key in ("nodes", "time")} == {"nodes": 4, "time": "2-00"}
    for job in chain.jobs:
        subprocess.run(["bash", "-n", str(job.script)], check=True)


def test_a_run_in_steps_has_a_job_for_each_part(place: Path) -> None:
    chain = Chain(["experiment=quickstart_iterative", "cluster=local"])
    assert [job.label[3:] for job in chain.jobs] == [
        *("corpus", "teacher", "step1-prune", "step1-distil", "prune", "distil", "evaluate", "export", "report")
    ]
    first = chain.jobs[3]
    assert first.name == "quickstart_iterative-step1-distil"
    assert first.stage_directory == place / "runs" / "quickstart_iterative" / "step1" / "distil"
    for job in chain.jobs:  # what the nodes get, composes there to where the chain says that it is
        config = compose(list(job.overrides))
        assert str(job.stage_directory) == f"{config.run.directory}/{config.run.name}/{job.stage}"


def test_what_is_finished_is_left_out(place: Path) -> None:
    config = compose(["experiment=quickstart", f"run.directory={place}/runs"])
    attempt = begin(config, "corpus", lambda line: None)
    (place / "runs" / "quickstart" / "corpus" / "train.bin").write_text("tokens")
    attempt.finish({})
    chain = Chain([*LOCAL, "stage=[corpus,teacher]"])
    assert [job.stage for job in chain.jobs] == ["teacher"] and "01-corpus: finished already" in chain.left_out[0]
    with pytest.raises(UserError, match="data.test_fraction: 0.02 -> 0.1"):
        Chain([*LOCAL, "data.test_fraction=0.1"])


def test_a_chain_does_not_get_past_a_gate_by_being_submitted_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that is finished and whose gate fails is not left out as one that is done."""
    monkeypatch.setattr(gates, "stage_of", lambda gate: "corpus")  # evaluate would need models
    attempt = begin(compose(["experiment=quickstart", f"run.directory={place}/runs"]), "corpus", lambda line: None)
    results = {"models": {"student": {"kl": 0.3}}}
    (place / "runs" / "quickstart" / "corpus" / "results.json").write_text(json.dumps(results))
    attempt.finish({})
    asked = [*LOCAL, "stage=[corpus,teacher]"]
    with pytest.raises(UserError, match="corpus: 1 of 1 gates failed: student.kl is 0.3, expected below 0.2"):
        Chain([*asked, "gates=[{figure: student.kl, below: 0.2}]"])
    assert len(Chain([*asked, "gates=[{figure: student.kl, below: 0.4}]"]).jobs) == 1


def test_settings_are_checked_for_the_nodes_and_not_for_this_machine(place: Path) -> None:
    (place / "model").mkdir()
    shape = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    (place / "model" / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match="a divisor of the teacher's 4 attention heads, found 8"):
        given = ["model=given", "model.path=model", "teacher=take", "student=custom", "student.hidden_size=32"]
        Chain([*LOCAL, *given, "cluster.nodes=8", "parallel=tp8"])
    given = ["experiment=quickstart", "cluster=ngc", "distil.optimizer=transformer_engine", "parallel.tensor=1"]
    given += ["parallel.device=cuda", "teacher.global_batch_size=128", "distil.global_batch_size=128"]
    with pytest.raises(UserError, match="transformer_engine without transformer_engine"):
        Chain(given)  # without an image it is this machine's Python that will run
    found = Chain([*given, "cluster.image=stillhouse", f"cluster.mounts=[{place}]"]).jobs
    assert {job.nodes.gpus_per_node for job in found if job.ranks} == {8}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["cluster=none"], "expected a site"),
        (["stage=plan"], "python -m pipelines stage=plan"),
        (["cluster.account='a b'"], "cluster.account"),
        (["cluster.partition='x\n#SBATCH --uid=0'"], "cluster.partition"),
        (["cluster.qos='$(id)'"], "cluster.qos"),
        (["cluster.constraint='a;b'"], "cluster.constraint"),
        (["cluster.stages.distil.partition='a\tb'"], "cluster.stages.distil.partition"),
        (["run.name='a b'"], "run.name"),
        (["run.name='a\nb'"], "run.name"),
        (["run.directory='a%j'"], "run.directory"),
        (["cluster.time=4h"], "cluster.time"),
        (["cluster.time=00:01:00"], "more than cluster.warning_seconds"),
        (["cluster.time='4:00'"], "04:00:00 for hours and minutes, 00:04:00 for minutes and seconds"),
        (
            ["cluster.time=43200"],
            'Quote it in YAML, where 12:00:00 without quotes is the number 43200: time: "12:00:00"',
        ),
        (["cluster.stages.distil.time=90"], 'If 90 minutes are meant: "01:30:00"'),
        (["cluster.grace_seconds=100"], "cluster.grace_seconds"),
        (["cluster.stages.corpus.nodes=2"], "it has no ranks"),
        (["cluster.sbatch_arguments=['--comment=a b']"], "cluster.sbatch_arguments[0]"),
        (["cluster.sbatch_arguments=['--mem=0\n#SBATCH --uid=0']"], "cluster.sbatch_arguments[0]"),
        (["cluster.sbatch_arguments=['--signal=USR2']"], "another option than --signal"),
        (["cluster.sbatch_arguments=['--dep=1']"], "another option than --dependency"),
        (["cluster.srun_arguments=['-N4']"], "cluster.srun_arguments[0]"),
        (["cluster.srun_arguments=['--label\n']"], "cluster.srun_arguments[0]"),
        (["cluster.environment=[{name: A, value: b}]"], "the reason for A"),
        (['cluster.environment=[{name: A, value: b, why: "c\nrm -rf x"}]'], "cluster.environment[0].why"),
        (['cluster.environment=[{name: A, value: "b\nc", why: d}]'], "cluster.environment[0].value"),
        (["cluster.environment=[{name: 'A B', value: b, why: c}]"], "a variable's name"),
        (["cluster.environment=[{name: HF_TOKEN, value: b, why: c}]"], "no secret"),
        (["cluster.environment=[{name: my_apikey_2, value: b, why: c}]"], "no secret"),
        (["cluster.environment=[{name: A, value: hf_abcdefghijklmnopqrstuvwxyz, why: c}]"], "no token or password"),
        (["cluster.environment=[{name: A, value: true, why: c}]"], "expected a text, found True. Quote it"),
        (["cluster.environment=[{name: A, value: 1, why: c}]"], "expected a text, found 1. Quote it"),
        (["cluster.environment=[{name: PATH, value: /bin, why: c}]"], "The script finds srun and scontrol by it"),
        (["cluster.environment=[{name: stage, value: x, why: c}]"], "a variable of your own"),
        (["cluster.environment=[{name: A, value: $HOME/x, why: c}]"], "which nothing expands"),
        (["cluster.environment=[{name: A, value: '~/x', why: c}]"], "which nothing expands"),
        (["cluster.nodes=0"], "cluster.nodes"),
        (["cluster.nodes=-1"], "cluster.nodes"),
        (["cluster.gpus_per_node=-1"], "cluster.gpus_per_node"),
        (["cluster.restarts=-1"], "cluster.restarts"),
        (["cluster.preflight_seconds=0"], "cluster.preflight_seconds"),
        (
            ["cluster.gpus_per_node=8", "cluster.processes_per_node=16"],
            "cluster.processes_per_node: expected at most one process for each of the 8 GPUs of a node in stage "
            "teacher, found 16. Lower it",
        ),
        (
            ["cluster.stages.distil.gpus_per_node=2", "cluster.stages.distil.processes_per_node=4"],
            "cluster.stages.distil.processes_per_node: expected at most one process for each of the 2 GPUs",
        ),
        (["cluster.stages.distil.nodes=0"], "cluster.stages.distil.nodes"),
        (["cluster.grace_seconds=-60"], "cluster.grace_seconds"),
        (["cluster.environment=[{name: SLURM_CONF, value: b, why: c}]"], "a variable of your own"),
        (["cluster.python='a\nb'"], "cluster.python"),
        (["cluster.mounts=[/a]"], "none without cluster.image"),
        (["cluster.image=a/b.sqsh"], "an absolute path to the .sqsh"),
        (["cluster.image=/a/b.sqsh"], "an existing file"),
        (["cluster.image=''"], "registry/name:tag, or an absolute path to a .sqsh, found ''"),
        (["cluster.image='a b'"], "registry/name:tag"),
        (["cluster.image=docker://nvcr.io/a:1"], "Leave docker:// out: nvcr.io/a:1"),
        (["cluster.image=/tmp"], "found the directory /tmp"),
        (["cluster.image=./images"], "an absolute path to the .sqsh"),
        (["cluster.image=/a/b.sif"], "a .sqsh, which enroot runs, found Apptainer's /a/b.sif. Make a .sqsh"),
        (["cluster.image=x", "cluster.mounts=['/a,/b']"], "without commas"),
        (["cluster.image=x", "cluster.mounts=[a:b]"], "/source:/target"),
        (["cluster.image=x", "cluster.mounts=[/somewhere]"], "run.directory: expected a path that is mounted"),
        (["cluster.image=x", "cluster.mounts=['/:/host']"], "run.directory: expected a path that is mounted"),
        (["cluster.workdir=/tmp"], "run.directory: expected an absolute path with cluster.workdir"),
    ],
)
def test_what_no_script_can_hold_is_one_message(place: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as error:
        Chain([*LOCAL, *overrides])
    assert part in str(error.value)
    assert not (place / "runs").exists()


def test_what_a_container_must_see_is_compared_as_the_file_system_takes_it(place: Path) -> None:
    """Mounts and paths with .. and with links; and a path that only an evaluation reads."""
    here, data = place / "here", place / "data"
    here.mkdir()
    data.mkdir()
    (data / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (here / "link").symlink_to(data)
    (place / "other").symlink_to(here)
    os.chdir(here)

    def seen(*mounts: Path | str, prompts: str = "", workdir: str = "null") -> str:
        asked = [*LOCAL, "cluster.image=x", f"cluster.mounts=[{','.join(map(str, mounts))}]"]
        asked += [f"cluster.workdir={workdir}"] + [f"evaluate.generation.prompts={prompts}"] * bool(prompts)
        try:
            check(compose(asked), ["evaluate"])
        except UserError as error:
            return str(error)
        return ""

    assert not seen(f"{data}/../here") and not seen(f"{here}/:{here}")
    forgotten = "evaluate.generation.prompts: expected a path that is mounted under the same name inside the image"
    found = f"{forgotten}, found {data}/prompts.jsonl. Add it"
    assert seen(here, prompts=f"{data}/prompts.jsonl").startswith(found)
    assert seen(here, prompts=f"{here}/../data/prompts.jsonl").startswith(found)
    leads = f"{forgotten}, found {here}/link/prompts.jsonl, which leads to {data}/prompts.jsonl. Add it"
    assert seen(here, prompts="link/prompts.jsonl").startswith(leads)
    assert not seen(here, data, prompts="link/prompts.jsonl")
    assert not seen(here, place / "other", prompts=f"{place}/other/mine"), (
        "a mount that is a link is a directory inside"
    )
    assert not seen(here, place / "other", workdir=f"{place}/other", prompts="mine"), "the same place"
    assert seen(here, workdir=f"{place}/other").startswith("the working directory: expected a path that is mounted")


def test_no_string_of_the_settings_is_taken_for_a_command(place: Path) -> None:
    """Through everything that may be any text: the shell gives each back as it was, and does nothing else."""
    chain = Chain([*LOCAL, "cluster.image=x", f"cluster.mounts=[{place}]"])
    cluster = chain.cluster
    cluster.image, cluster.workdir, cluster.python = EVIL, f"{place}/{EVIL}", EVIL
    cluster.mounts.append(f"/{EVIL}:/{EVIL}")
    cluster.srun_arguments = [f"--comment={EVIL}"]
    cluster.environment[0].name, cluster.environment[0].value = "VALUE", EVIL
    cluster.environment[0].why = "why $(touch hit) `touch hit`"
    job = script.Job(**{**vars(chain.jobs[0]), "overrides": (f"export.prompt={EVIL}", EVIL)})
    text = script.render(job, cluster, place)
    found = values_of(text, place)
    assert found["overrides"] == [f"export.prompt={EVIL}", EVIL] and found["VALUE"] == [EVIL]
    assert found["python"] == [EVIL] and found["srun_arguments"] == [f"--comment={EVIL}"]
    mounts = f"--container-mounts={place}:{place},/{EVIL}:/{EVIL}"
    workdir = f"--container-workdir={place}/{EVIL}"
    assert found["container"] == [f"--container-image={EVIL}", mounts, workdir, "--no-container-mount-home"]
    assert not list(place.rglob("hit"))
    here = place / "it's $(touch hit) here"
    here.mkdir()
    cluster.image = None
    cluster.workdir = None
    shell = header(script.render(job, cluster, here)) + "pwd"
    done = subprocess.run(["bash", "-c", shell], cwd=place, capture_output=True, text=True)
    assert done.stdout == f"{here}\n" and not list(place.rglob("hit"))


def test_an_override_with_a_line_break_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", *LOCAL, "export.prompt='a\n#SBATCH --uid=0'"]) == 2
    assert "characters that can be printed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("nvcr.io#nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("localhost:5000/stillhouse", "localhost:5000#stillhouse"),
        ("team/stillhouse:1", "team/stillhouse:1"),
        ("stillhouse", "stillhouse"),
        ("/images/stillhouse.sqsh", "/images/stillhouse.sqsh"),
    ],
)
def test_an_image_is_named_as_enroot_names_it(image: str, name: str) -> None:
    assert script.enroot_name(image) == name


@pytest.mark.parametrize(
    ("time", "limit"),
    [("04:00:00", 14400), ("1-0", 86400), ("1-02:03", 93780), ("1-02:03:04", 93784)]
    + [(time, None) for time in ("30", "1:30", "1:2:3:4", "1-1:2:3:4", "", "1-", "UNLIMITED")],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, limit: int | None) -> None:
    assert seconds(time) == limit


def test_gpus_are_asked_for_as_the_site_wants_it(place: Path) -> None:
    wanted = {"gpus_per_node": "--gpus-per-node=8", "gres": "--gres=gpu:8", "none": None}
    for request, line in wanted.items():
        config = compose(["cluster=ngc", f"cluster.gpu_request={request}"])
        job = script.Job("r", "04-distil", "distil", True, of_stage(config.cluster, "distil"), (), place, place)
        options = script.sbatch_options(job, config.cluster)
        assert [o for o in options if o.startswith(("--gpu", "--gres"))] == ([line] if line else [])
        assert "--exclusive" in options and "--mem=0" in options
        assert job.nodes.processes_per_node == 8


def test_every_stage_of_a_run_can_be_a_job() -> None:
    assert set(PIPELINE) <= {field.name for field in fields(StagesConfig)} <= STAGES.keys()


def test_a_dry_run_writes_nothing_twice_and_needs_no_slurm(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["--dry-run", *LOCAL]) == 0
    out, error = capsys.readouterr()
    home = place / "runs" / "quickstart" / "slurm"
    assert f"sbatch --parsable --dependency=afterok:JOB1 --kill-on-invalid-dep=yes {home}/02-teacher.sh" in out
    assert "expected SLURM's commands on this machine, found none" in error
    before = {file.name: file.read_bytes() for file in home.glob("0*")}
    assert main(["--dry-run", *LOCAL]) == 0
    assert {file.name: file.read_bytes() for file in home.glob("0*")} == before and len(before) == 2 * len(PIPELINE)
    assert main(LOCAL) == 2
    assert "--dry-run" in capsys.readouterr().err


def pretend(place: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """SLURM's commands as shell lines; each notes its arguments in calls."""
    directory = place / "bin"
    directory.mkdir()
    for name, body in programs.items():
        (directory / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{shlex.quote(str(place / "calls"))}\n{body}\n')
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_where_slurm_refuses_a_job_those_before_it_are_cancelled(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse = 'case "$*" in *03-prune*) echo "invalid account" >&2; exit 1 ;; *) wc -l <calls ;; esac'
    pretend(place, monkeypatch, squeue="exit 0", sbatch=refuse, scancel="exit 0")
    assert main(LOCAL) == 2
    said = capsys.readouterr().err
    assert "invalid account" in said and "submitted before it, 2 3, is cancelled: nothing of the chain is" in said
    assert (place / "calls").read_text().splitlines()[-1] == "scancel 2 3"
    assert not (place / "runs" / "quickstart" / "slurm" / "chain.json").exists()


def test_a_cpu_build_of_torch_is_not_submitted_to_nodes_whose_gpus_are_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["cluster=local", "cluster.gpus_per_node=2", "stage=verify"]
    pretend(place, monkeypatch, squeue="exit 0", sbatch="echo 7")
    monkeypatch.setattr(preflight, "torch_cuda", lambda: None)
    assert main(asked) == 2
    expected = f"a torch that is built for CUDA, for verify; found none for {sys.executable}"
    assert expected in capsys.readouterr().err and not (place / "calls").exists()
    assert not (place / "runs").exists(), "a refused command leaves nothing"
    assert main(["--dry-run", *asked]) == 0
    assert (
        f"warning: this will not be submitted: cluster.gpus_per_node: expected 0, or {expected}"
        in capsys.readouterr().err
    )
    for other in ("cluster.python=/usr/bin/python3", "parallel.device=cpu", "cluster.gpus_per_node=0"):
        assert not Chain([*asked, other]).unfit
    half = [*LOCAL, "cluster.gpus_per_node=2", "stage=[verify,report]"]
    assert "for verify;" in Chain(half).unfit
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.cluster.chain.not_needed", lambda config, stage: "done" * (stage == "verify"))
        chain = Chain(half)
        assert [job.stage for job in chain.jobs] == ["report"] and not chain.unfit, "only what is left to do counts"
    monkeypatch.setattr(preflight, "torch_cuda", lambda: (13, 0))
    assert main(asked) == 0


def test_jobs_of_a_run_are_known_by_their_scripts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place / "runs" / "a" / "slurm"
    lines = [f"7|RUNNING|a-teacher|{home}/02-teacher.sh", f"8|PENDING|b|{place}/runs/b/slurm/1.sh", "9|PENDING|x|"]
    pretend(place, monkeypatch, squeue="\n".join(f"echo {shlex.quote(line)}" for line in lines))
    assert queue.jobs_of(home) == [queue.Queued("7", "RUNNING", "a-teacher")]
    home.mkdir(parents=True)
    (place / "link").symlink_to(place / "runs")
    assert queue.jobs_of(place / "link" / "a" / "slurm") == [queue.Queued("7", "RUNNING", "a-teacher")]


def test_slurm_is_asked_without_the_variables_of_a_job_and_of_the_users_own_defaults(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NNODES", "SLURMD_NODENAME", "SBATCH_WAIT", "SBATCH_TIMELIMIT", "SQUEUE_STATES"):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_CONF", "SLURM_JWT", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "kept")
    pretend(place, monkeypatch, sbatch="env >env; echo 1")
    assert queue.submit([place / "01-corpus.sh"]) == ["1"]
    found = dict(line.split("=", 1) for line in (place / "env").read_text().splitlines() if "=" in line)
    assert {name for name in found if name.startswith(("SLURM", "SBATCH", "SQUEUE"))} == {"SLURM_CONF", "SLURM_JWT"}
    assert found["NCCL_DEBUG"] == "kept"


def test_a_container_gets_no_path_of_this_machines_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    cluster = replace(local_site(), image="stillhouse")
    job = script.Job("r", "04-distil", "distil", True, of_stage(cluster, "distil"), (), place, place)
    shell = header(script.render(job, cluster, place)) + 'echo "<${PYTHONPATH:-none}>"'
    done = subprocess.run(["bash", "-c", shell], cwd=place, capture_output=True, text=True)
    assert done.stdout == "<none>\n"
    done = subprocess.run(
        ["bash", "-c", shell.replace("unset PYTHONPATH", "")], cwd=place, capture_output=True, text=True
    )
    assert done.stdout == "</elsewhere>\n", "without it this shell's would have been"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_a_script_is_clean_shell(place: Path) -> None:
    chain = Chain(LOCAL)
    chain.write()
    subprocess.run(["shellcheck", "--severity=warning", str(chain.jobs[1].script)], check=True)


def test_a_site_is_needed_before_anything_is_checked() -> None:
    with pytest.raises(UserError, match="cluster: expected a site"):
        check(compose(["experiment=quickstart"]), ["distil"])


STOPPED = '{"code": 75, "message": "stopped as asked", "stage": "distil"}'


@functools.cache
def local_site() -> ClusterConfig:
    return compose(["cluster=local", "cluster.preflight=false"]).cluster


def run_with_stand_ins(
    place: Path,
    state: str,
    srun: str,
    stopped: bool = True,
    afterwards: str = "",
    code: int = 75,
    preflight: bool = False,
    stage: str = "distil",
    sbatch: str = "echo 102",
) -> tuple[str, list[str]]:
    """(what the script of a stage prints, what it asks SLURM), where SLURM refuses to requeue and says this of the job.

    stopped: the stage says that it has saved; afterwards: what SLURM says once a new job is submitted.
    """
    commands = {
        "scontrol": 'case "$1 $2" in "show hostnames") echo node1 ;; requeue*) exit 1 ;;\n'
        f'"show job") echo "JobId=101 JobState=$(cat {place}/state) ExcNodeList=(null)" ;; esac',
        "srun": f"echo '{STOPPED}' >\"$STILLHOUSE_VERDICT\"; {srun}" if stopped else srun,
        "sbatch": f"{sbatch}; {f'echo {shlex.quote(afterwards)} >{place}/state' if afterwards else ''}",
        "scancel": "exit 0",
        "squeue": 'echo "103|afterok:101(unfulfilled)"; echo "102|afterany:101(unfulfilled)"',
    }
    for name, body in commands.items():
        stand_in = place / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/bash\necho "{name} $*" >>{place}/asked\n{body}\n')
        stand_in.chmod(0o755)
    (place / "state").write_text(state)
    cluster = replace(local_site(), preflight=preflight)
    home = place / "runs" / "r" / "slurm"
    home.mkdir(parents=True, exist_ok=True)
    job = script.Job("r", f"04-{stage}", stage, True, of_stage(cluster, stage), (), home.parent / stage, home)
    job.script.write_text(script.render(job, cluster, place))
    slurm = {"SLURM_JOB_ID": "101", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = os.environ | slurm | {"PATH": f"{place}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(job.script)], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    asked = (place / "asked").read_text().replace(str(job.script), "SCRIPT").splitlines()
    (place / "asked").unlink()
    return done.stdout, asked


def test_a_job_that_may_not_be_requeued_continues_in_one_new_job_that_waits_for_its_end(place: Path) -> None:
    """Where a site refuses scontrol requeue. The commands of SLURM are stand-ins, which note what they were asked."""
    said, asked = run_with_stand_ins(place, "RUNNING", "exit 1")
    assert "requeueing job 101" in said and "job 102 continues" in said
    submitted = asked.index("sbatch --parsable --dependency=afterany:101 SCRIPT")
    assert "scontrol update JobId=101 Requeue=0" in asked[:submitted], "or SLURM starts both"
    assert "scontrol update JobId=103 Dependency=afterok:102" in asked, "what waited for it waits for the new one"
    assert "scontrol update JobId=102 Dependency=afterany:102" not in asked
    # SLURM has requeued it in spite of its answer, and refuses once more: no third job.
    said, asked = run_with_stand_ins(place, "RUNNING", "exit 1")
    assert "job 102, which waits for this one, continues" in said
    assert not [line for line in asked if line.startswith("sbatch")]


# What `scontrol show job` of SLURM 22.05 says in each case: its state alone does not tell them apart.
CANCELLED = "COMPLETING Reason=None Requeue=1 Restarts=0 PreemptTime=None"
PREEMPTED = "COMPLETING Reason=None Requeue=0 Restarts=0 PreemptTime=2026-11-22T22:52:20"
REQUEUED = "COMPLETING Reason=None Requeue=1 Restarts=1"
TIMEOUT = "COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 PreemptTime=None"
WARNED = "kill -USR1 $PPID; sleep 1; kill -TERM $PPID; sleep 1; exit 1"
ENDED = "kill -TERM $PPID; sleep 1; exit 1"


def started(asked: list[str]) -> list[str]:
    """What of it would let the run go on."""
    return [line for line in asked if line.startswith(("sbatch", "scontrol requeue"))]


@pytest.mark.parametrize("state", [PREEMPTED, "PREEMPTED Reason=None"])
@pytest.mark.parametrize("srun", [WARNED, ENDED])
def test_a_preempted_job_that_slurm_does_not_requeue_continues_in_a_new_one(place: Path, state: str, srun: str) -> None:
    said, asked = run_with_stand_ins(place, state, srun)
    assert "preempted: job 102 continues" in said
    assert started(asked) == ["sbatch --parsable --dependency=afterany:101 SCRIPT"]


@pytest.mark.parametrize(
    ("srun", "stopped"),
    [(WARNED, True), (ENDED, True), (WARNED, False), (ENDED, False), ("exit 143", False), ("exit 1", True)],
)
def test_a_cancelled_job_is_not_continued(place: Path, srun: str, stopped: bool) -> None:
    """Whatever signals came before, and where its processes end before this shell hears of it."""
    said, asked = run_with_stand_ins(place, CANCELLED, srun, stopped)
    assert "job 101 was cancelled, and so nothing continues it" in said.splitlines()[-1]
    assert not started(asked)
    assert [line.split()[0] for line in asked].count("srun") == 1


def test_a_continuation_that_sbatch_refuses_while_the_stage_saves_is_asked_for_again_behind_it(place: Path) -> None:
    once = f"[ -e {place}/refused ] && echo 102 || {{ touch {place}/refused; exit 1; }}"
    srun = f"kill -TERM $PPID; sleep 3; touch {place}/saved; exit 1"
    said, asked = run_with_stand_ins(place, PREEMPTED, srun, sbatch=once)
    assert "preempted: job 102 continues" in said and len(started(asked)) == 2
    assert (place / "saved").exists(), "the save is waited for"


@pytest.mark.parametrize("state", [REQUEUED, f"{REQUEUED} PreemptTime=2026-11-22T22:52:20"])
def test_what_slurm_starts_again_by_itself_gets_no_second_job(place: Path, state: str) -> None:
    said, asked = run_with_stand_ins(place, state, WARNED)
    assert "SLURM starts job 101 again" in said and not started(asked)


def test_a_job_whose_shell_alone_is_ended_saves_and_is_not_continued(place: Path) -> None:
    said, asked = run_with_stand_ins(place, "RUNNING", ENDED)
    assert "has saved and stopped: SIGTERM to this shell ends the job" in said and not started(asked)


def test_a_state_without_a_word_of_an_end_is_no_end(place: Path) -> None:
    said, asked = run_with_stand_ins(place, "CONFIGURING Reason=None Restarts=0", "kill -USR1 $PPID; sleep 1; exit 1")
    assert "cancelled" not in said and started(asked)


def test_a_job_that_meets_its_limit_while_it_saves_continues(place: Path) -> None:
    said, asked = run_with_stand_ins(place, TIMEOUT, WARNED)
    assert started(asked) == ["scontrol requeue 101", "sbatch --parsable --dependency=afterany:101 SCRIPT"]


NOW = time.strftime("%Y-%m-%dT%H:%M:%S")
SILENT = "kill -USR1 $PPID; sleep 2; exit 1"  # is warned, and ends without having saved


@pytest.mark.parametrize("stopped", [True, False])
def test_a_stage_that_outlasts_its_limit_without_saving_ends_for_good_and_says_time(place: Path, stopped: bool) -> None:
    said, asked = run_with_stand_ins(place, f"RUNNING EndTime={NOW}", SILENT, stopped, code=1)
    last = said.splitlines()[-1]
    assert "ended for good: the time limit 00:30:00 of its job came, and nothing new was saved in it" in last
    assert "Raise cluster.stages.distil.time" in last and not started(asked)


def test_pieces_that_an_evaluation_has_kept_are_something_new(place: Path) -> None:
    pieces = place / "runs" / "r" / "evaluate" / "parts" / "tasks"
    pieces.mkdir(parents=True)
    srun = f"kill -USR1 $PPID; echo '{{}}' >{pieces}/student.mmlu.json; sleep 2; exit 1"
    said, asked = run_with_stand_ins(place, f"RUNNING EndTime={NOW}", srun, stage="evaluate")
    assert "stage evaluate has saved and stopped" in said and started(asked)


@pytest.mark.parametrize("state", ["RUNNING EndTime=2999-01-01T00:00:00", f"RUNNING EndTime={NOW} PreemptTime={NOW}"])
def test_a_stage_that_is_warned_for_another_reason_goes_on_in_another_job(place: Path, state: str) -> None:
    said, asked = run_with_stand_ins(place, state, SILENT)
    assert "restart 1 of at most 3" in said and started(asked)


def test_a_check_that_a_warning_interrupts_is_told_as_that_and_leaves_no_node_out(place: Path) -> None:
    srun = "kill -USR1 $(ps -o ppid= -p $PPID); sleep 2; exit 138"  # timeout stands between
    said, asked = run_with_stand_ins(place, "RUNNING", srun, stopped=False, preflight=True)
    assert "the check of node node1 was interrupted" in said and "failed its check" not in said
    assert "was asked to stop before it began" in said and not any("--exclude" in line for line in asked)


def test_a_job_that_is_cancelled_while_it_submits_takes_the_new_one_with_it(place: Path) -> None:
    said, asked = run_with_stand_ins(place, "RUNNING", "kill -USR1 $PPID; sleep 1; exit 1", afterwards=CANCELLED)
    assert "scancel 102" in asked and "job 102 continues" not in said and "was cancelled" in said
