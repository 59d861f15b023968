"""One batch script per job: #SBATCH lines, what runs as variables, and job.sh, which is the same in all of them.

Every value from the settings is quoted for the shell; what stands in #SBATCH lines has been checked to be plain
(validation/cluster.py). Imports no torch.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.cluster_settings import ClusterConfig, GpuRequest, StageNodesConfig
from pipelines.stages import STAGES
from pipelines.validation.cluster import split_mount

BODY = Path(__file__).with_name("job.sh")
ROOT = Path(__file__).resolve().parents[2]  # of this code, for nodes that run it as this machine does


@dataclass(frozen=True)
class Job:
    """One stage, or one part of a run in steps, as a job.

    label: of its files, such as 04-distil; name: what SLURM shows; overrides: of `python -m pipelines` on the nodes;
    stage_directory: where the stage writes; home: where scripts, settings, logs and state of the chain lie.
    """

    run: str
    label: str
    stage: str
    ranks: bool
    nodes: StageNodesConfig
    overrides: tuple[str, ...]
    stage_directory: Path
    home: Path

    @property
    def name(self) -> str:
        return f"{self.run}-{self.label.split('-', 1)[1]}"

    @property
    def script(self) -> Path:
        return self.home / f"{self.label}.sh"

    @property
    def settings(self) -> Path:
        return self.home / f"{self.label}.yaml"

    def size(self) -> str:
        """2 nodes, 8 processes on each"""
        nodes, processes = self.nodes.nodes, self.nodes.processes_per_node
        each = f"{processes} process{'es' * (processes != 1)}" + " on each" * (nodes != 1)
        return f"{nodes} node{'s' * (nodes != 1)}, {each}"


def render(job: Job, cluster: ClusterConfig, here: Path) -> str:
    """The whole script. here: the directory that the chain is submitted from."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Stage {job.stage} of run {job.run} on {cluster.name}: {job.size()}. Written by launchers/slurm.sh. The",
        f"# settings that it runs with are in {job.settings.name}; docs/cluster.md says what happens when.",
        *(f"#SBATCH {option}" for option in sbatch_options(job, cluster)),
        "set -uo pipefail",
        "",
        "# What runs",
        *(f"{name}={shlex.quote(value)}" for name, value in variables(job, cluster).items()),
        _array("container", container_flags(cluster, here)),
        _array("srun_arguments", cluster.srun_arguments),
        _array("overrides", job.overrides, one_per_line=True),
        *_environment(cluster),
        f"cd -- {shlex.quote(cluster.workdir if cluster.workdir and not cluster.image else str(here))} || exit 2",
        "",
        BODY.read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def sbatch_options(job: Job, cluster: ClusterConfig) -> list[str]:
    nodes = job.nodes
    given = {
        "account": cluster.account,
        "partition": nodes.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    options = [
        f"--job-name={job.name}",
        f"--output={job.home}/logs/%x_%j.log",
        "--open-mode=append",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        f"--nodes={nodes.nodes}",
        "--ntasks-per-node=1",
        f"--time={nodes.time}",
    ]
    if nodes.gpus_per_node and cluster.gpu_request is GpuRequest.gpus_per_node:
        options.append(f"--gpus-per-node={nodes.gpus_per_node}")
    if nodes.gpus_per_node and cluster.gpu_request is GpuRequest.gres:
        options.append(f"--gres=gpu:{nodes.gpus_per_node}")
    if cluster.exclusive:
        options.append("--exclusive")
    # Without requeueing a job must outlive its dead node, to submit the one that continues it.
    options += ["--requeue"] if cluster.requeue else ["--no-requeue", "--no-kill"]
    options += [f"--signal=B:USR1@{cluster.warning_seconds}", "--kill-on-invalid-dep=yes"]
    return options + cluster.sbatch_arguments


def variables(job: Job, cluster: ClusterConfig) -> dict[str, str]:
    alone = STAGES[job.stage].per_machine
    python = cluster.python or ("python" if cluster.image else sys.executable)
    return {
        "run": job.run,
        "stage": job.stage,
        "part": job.label,
        "run_directory": str(job.home.parent),
        "directory": str(job.home),
        "script": str(job.script),
        "checkpoints": str(job.stage_directory / "checkpoints"),
        "ranks": _word(job.ranks),
        "nodes": str(job.nodes.nodes),
        "processes": "1" if alone else str(job.nodes.processes_per_node),  # that torchrun starts on each node
        "module": "pipelines.model.machines" if alone else "pipelines",
        "gpus": str(job.nodes.gpus_per_node),
        "python": python,
        "requeue": _word(cluster.requeue),
        "grace": str(cluster.grace_seconds),
        "warning": str(cluster.warning_seconds),
        "limit": str(job.nodes.time),
        "limit_setting": f"cluster.stages.{job.stage}.time",
        "restarts": str(cluster.restarts),
        "preflight": _word(cluster.preflight),
        "preflight_seconds": str(cluster.preflight_seconds),
    }


def container_flags(cluster: ClusterConfig, here: Path) -> list[str]:
    """pyxis' options of srun; none without an image."""
    if cluster.image is None:
        return []
    mounts = [":".join(split_mount(mount)) for mount in cluster.mounts]
    return [
        f"--container-image={enroot_name(cluster.image)}",
        *([f"--container-mounts={','.join(mounts)}"] if mounts else []),
        f"--container-workdir={cluster.workdir or here}",
        "--no-container-mount-home",
    ]


def enroot_name(image: str) -> str:
    """An image in enroot's words: a file as it is; the registry is set off by # from the rest of a name."""
    if image.startswith("/") or "#" in image or "/" not in image:
        return image
    registry, _, name = image.partition("/")
    return f"{registry}#{name}" if "." in registry or ":" in registry or registry == "localhost" else image


def _environment(cluster: ClusterConfig) -> list[str]:
    lines = [f"export {v.name}={shlex.quote(v.value)}  # {v.why}" for v in cluster.environment]
    if cluster.image is not None:  # it has the code, and the working directory before it: nothing of this machine
        return ["unset PYTHONPATH", *lines]
    return [*lines, f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]


def _array(name: str, values: Sequence[str], one_per_line: bool = False) -> str:
    quoted = [shlex.quote(value) for value in values]
    if one_per_line:
        return f"{name}=(\n" + "".join(f"  {value}\n" for value in quoted) + ")"
    return f"{name}=({' '.join(quoted)})"


def _word(value: bool) -> str:
    return "true" if value else "false"
