"""Settings of what is done once per site: fetching models and data. Imports no torch."""

from dataclasses import dataclass, field


@dataclass
class FetchConfig:
    """What stage=fetch gets from the Hugging Face hub, on a machine with network. The token for what is gated is the
    user's own, from HF_TOKEN or the file of `hf auth login`: no setting takes one."""

    models: list[str] = field(default_factory=list)  # owner/name, or owner/name@revision: branch, tag or commit
    datasets: list[str] = field(default_factory=list)  # the same
    files: list[str] = field(
        default_factory=lambda: ["*.parquet", "*.jsonl", "*.jsonl.gz"]
    )  # of a data set, by patterns on their paths; of a model what a Hugging Face directory needs
    directory: str = "fetched"  # gets models/<owner>/<name> and datasets/<owner>/<name>
    workers: int = 4  # files at a time
