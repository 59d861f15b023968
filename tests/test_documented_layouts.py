"""Every documented line on the machine that it is written for: what it asks for divides among the processes it names.

The machine has the GPUs that the line gives (`--gpus 4`), else eight of 80 GB with Transformer Engine, as a container
that gets all of them; none where the line says so. Models are stubs of the right shape, of which sizes are all that is
read.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from pipelines import config as configuration
from pipelines import elsewhere, nvidia_smi, planning
from pipelines.__main__ import stage_names
from pipelines.compose import compose, conf_directory
from pipelines.config import UserError
from pipelines.validation import directories, validate
from tests.test_house import documented_lines

NODE = 8
GIVEN = (
    "model.path=",
    "student.path=",
    "evaluate.student=",
    "data.corpus=",
    "data.sources=",
    "data=",
    "run.directory=",
)
GIVEN_TO_STAGES = ("prune.task=", "prune.depth_measure=")  # questions that a test does not have
STARTS = re.compile(
    r"(?:python -m pipelines|stillhouse|launchers/torchrun\.sh|docker run|enroot start|torchrun) .*stage=\S"
)
ON_GPUS = re.compile(r"llama|MODEL|torchrun|docker|enroot|benchmark_gpu")  # the small experiments are of CPU processes


def commands() -> list[str]:
    """Of every document and of the experiments' headers, but for launchers/slurm.sh, which checks its own machines."""
    lines = documented_lines()
    for header in conf_directory().glob("experiment/*.yaml"):
        lines += re.findall(r"^# command: +(\S.*)$", header.read_text(), re.M)
    lines = [re.sub(r"\s+(#.*)?", " ", line).strip() for line in lines]
    return list(dict.fromkeys(line for line in lines if STARTS.match(line) and ON_GPUS.search(line)))


def machine(command: str) -> tuple[int, list[str]]:
    """(GPUs of the machine, the settings of the line), as launchers/torchrun.sh and a container see them."""
    words = shlex.split(command, comments=True)
    start = words.index("stillhouse") if "stillhouse" in words else 0
    settings = [word for word in words[start:] if re.match(r"[a-z_.]+=", word)]
    gpus = NODE
    if words[0] == "launchers/torchrun.sh" and "--gpus" in words:
        gpus = int(words[words.index("--gpus") + 1])
        settings += [f"parallel.processes={gpus}", "parallel.device=cuda"]
    if words[0] == "docker" and "--gpus" not in words:
        gpus = 0
    return gpus, settings


def check(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises UserError where the line cannot run on its machine. place: an empty directory."""
    gpus, settings = machine(command)
    given = [word for word in settings if not word.startswith((*GIVEN, *GIVEN_TO_STAGES))]
    memory = "<gpu><fb_memory_usage><total>81559 MiB</total></fb_memory_usage></gpu>" * gpus
    monkeypatch.setattr(nvidia_smi, "read", lambda: nvidia_smi.parse(f"<nvidia_smi_log>{memory}</nvidia_smi_log>"))
    monkeypatch.setattr(configuration, "gpu_count", lambda: gpus)
    monkeypatch.setattr(elsewhere, "installed", lambda module: True)
    monkeypatch.setattr(directories, "check_weights", lambda config, stages: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(place)
    composed = compose(given)
    if composed.teacher.mode is not configuration.TeacherMode.pretrain:
        given_model = "model=given" in given or "experiment=" not in command
        shape = planning.shape_from_config((compose(["model=llama31_8b"]) if given_model else composed).model.shape)
        (place / "config.json").write_text(json.dumps(shape.to_hugging_face()))
        (place / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        given += [f"model.path={place}"]
    config = compose([*given, "data.sources=[{kind: standard_library}]"])
    nodes = re.search(r"--nnodes=(\d+)", command)
    if nodes:
        with elsewhere.checked_for(elsewhere.Nodes(int(nodes[1]) * NODE, NODE, image=True)):
            return _validated(config)
    return _validated(config)


def _validated(config: configuration.Config) -> None:
    validate(config, stage_names(config))


def test_documented_lines_are_found() -> None:
    assert len(commands()) >= 30


@pytest.mark.parametrize("command", commands())
def test_a_documented_line_divides_among_the_processes_it_names(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(command, tmp_path, monkeypatch)


def test_a_layout_that_cannot_divide_the_processes_of_its_line_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "stage=distil experiment=llama31_8b_to_4b_depth model.path=MODEL"
    with pytest.raises(UserError, match="found 8 \\* 1 \\* 1 = 8 with 4 processes"):
        check(f"launchers/torchrun.sh --gpus 4 {line}", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="at most 8 processes, one for each GPU"):
        check(f"python -m pipelines {line}", tmp_path, monkeypatch)
