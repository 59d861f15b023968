"""Where and how a SLURM cluster runs the stages, as settings. Imports no torch.

Values are sites' own: conf/cluster/<site>.yaml. None of them decides a result; `launchers/slurm.sh` writes them into
batch scripts (pipelines/cluster), and validation/cluster.py says what each may hold.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class GpuRequest(Enum):
    """How a job asks for its GPUs."""

    gpus_per_node = "gpus_per_node"  # --gpus-per-node=8
    gres = "gres"  # --gres=gpu:8
    none = "none"  # not at all: whole nodes come with them


@dataclass
class VariableConfig:
    """An environment variable of every process, with the reason why it is set."""

    name: str = ""
    value: Any = ""  # a text, as it is to be: nothing expands it; Any, or true and numbers would become text unseen
    why: str = ""


@dataclass
class StageNodesConfig:
    """Of one stage; None: as for all."""

    partition: str | None = None
    time: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    processes_per_node: int | None = None


@dataclass
class StagesConfig:
    """Each stage that can be a job. A stage without ranks takes one node and one process, whatever the others take."""

    corpus: StageNodesConfig = field(default_factory=StageNodesConfig)
    teacher: StageNodesConfig = field(default_factory=StageNodesConfig)
    prune: StageNodesConfig = field(default_factory=StageNodesConfig)
    distil: StageNodesConfig = field(default_factory=StageNodesConfig)
    evaluate: StageNodesConfig = field(default_factory=StageNodesConfig)
    export: StageNodesConfig = field(default_factory=StageNodesConfig)
    report: StageNodesConfig = field(default_factory=StageNodesConfig)
    verify: StageNodesConfig = field(default_factory=StageNodesConfig)
    benchmark: StageNodesConfig = field(default_factory=StageNodesConfig)
    accept: StageNodesConfig = field(default_factory=StageNodesConfig)


@dataclass
class ClusterConfig:
    """nodes * processes_per_node of a stage is its number of processes, in place of parallel.processes."""

    name: str | None = None  # the site's, for people; None: no site is chosen, and nothing can be submitted
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features that nodes must have
    time: str = "04:00:00"  # limit of one job: H:M:S, D-H, D-H:M or D-H:M:S, in quotes in YAML; a stage takes several
    nodes: int = 1
    gpus_per_node: int = 8  # 0: nodes without GPUs
    processes_per_node: int | None = None  # None: one per GPU, two on nodes without
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    exclusive: bool = True  # no other job on the nodes
    image: str | None = None  # registry/name:tag, or an absolute path to a .sqsh; None: no container
    mounts: list[str] = field(default_factory=list)  # of the container: path, source:target or source:target:flags
    workdir: str | None = None  # of the processes; None: the directory that the chain is submitted from
    python: str | None = None  # interpreter on the nodes; None: `python` of the image, else the one that submits
    sbatch_arguments: list[str] = field(default_factory=list)  # more #SBATCH lines, each --option or --option=value
    srun_arguments: list[str] = field(default_factory=list)
    environment: list[VariableConfig] = field(default_factory=list)
    requeue: bool = True  # the site lets jobs requeue themselves; else each continues in a new job
    warning_seconds: int = 600  # before the time limit: the run is asked to save and stop
    grace_seconds: int = 480  # to save and stop after having been asked, before the processes are ended
    restarts: int = 3  # at most, one after the other without a new checkpoint between them
    preflight: bool = True  # check every node before each start, and leave out those that fail
    preflight_seconds: int = 600  # at most, with the time to load the image
    stages: StagesConfig = field(default_factory=StagesConfig)
