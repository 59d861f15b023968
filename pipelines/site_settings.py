"""Settings of what is done once per site: fetching models and data, accepting the machine. Imports no torch."""

from dataclasses import dataclass, field
from enum import Enum


@dataclass
class FetchConfig:
    """What stage=fetch gets from the Hugging Face hub, on a machine with network. The token for what is gated is the
    user's own, from HF_TOKEN or the file of `hf auth login`: no setting takes one."""

    models: list[str] = field(default_factory=list)  # owner/name, or owner/name@revision: branch, tag or commit
    datasets: list[str] = field(default_factory=list)  # the same
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness: the data sets of each
    files: list[str] = field(
        default_factory=lambda: ["*.parquet", "*.jsonl", "*.jsonl.gz"]
    )  # of a data set, by patterns on their paths; of a model what a Hugging Face directory needs
    directory: str = "fetched"  # gets models/<owner>/<name>, datasets/<owner>/<name> and tasks/
    workers: int = 4  # files at a time


class AcceptPart(Enum):
    node = "node"
    verify = "verify"
    bandwidth = "bandwidth"
    steps = "steps"
    resume = "resume"


@dataclass
class AcceptConfig:
    """What stage=accept tries on one machine. Whole training steps are those of model= and student=."""

    parts: list[AcceptPart] = field(default_factory=lambda: list(AcceptPart))
    steps: int = 50  # timed, after two that are not
    sequence_length: int = 2048  # tokens of a step's one sequence
    bandwidth_bytes: list[int] = field(default_factory=lambda: [2**20, 2**24, 2**28])  # of each collective's tensor
