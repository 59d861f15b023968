"""stage=accept over the two nodes of a SLURM on this machine, by the launcher."""

import json
import re
from pathlib import Path

import pytest

from tests import slurm
from tests.cluster import test_slurm
from tests.slurm import Slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "can be started"),
]
cluster = test_slurm.cluster


def test_two_nodes_are_tried_by_one_command_that_gives_one_row(cluster: Slurm, tmp_path: Path) -> None:
    run = test_slurm.Run(cluster, tmp_path, plays=False)
    settings = ["experiment=acceptance", "stage=accept", "cluster.preflight=false"]
    parts = ["accept.parts=[bandwidth]", "accept.bandwidth_bytes=[65536]"]
    jobs = run.submit(*settings, *parts)
    assert cluster.end(jobs["accept"]) == "COMPLETED", run.logs()
    found = json.loads((tmp_path / "runs" / "accept" / "accept.json").read_text())
    assert found["machine"]["machines"] == len(found["machine"]["hosts"]) == found["machine"]["processes"] == 2
    assert [one["ranks"] for one in found["bandwidth"]] == [2] * 4
    assert len(re.findall(r"^\| \d{4}-.* \| 2 machines, each .*all_reduce", run.logs(), re.M)) == 1
