"""What identifies a machine: its devices, driver, interconnect, and the code and image that it runs.

`python -m pipelines.model.identity` tells it of one of several machines, to the first of them.
"""

import contextlib
import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipelines import lineage, nvidia_smi, preflight
from pipelines.config import UserError
from pipelines.model import measure

SEEN = 60.0  # seconds until a file that one machine has written must be seen on another


def identity(device: str) -> dict[str, Any]:
    """Of the machine that this process runs on."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "image": os.environ.get("STILLHOUSE_IMAGE", "none"),
        "device": measure.device_name(torch.device("cpu")),
        "driver": "none",
        "interconnect": interconnect(),
        "git": lineage.git_commit(),
        "versions": {"python": platform.python_version()} | lineage.versions(),
        "host": socket.gethostname(),
    }
    if device == "cuda":
        try:
            report = nvidia_smi.read()
        except nvidia_smi.Unanswered as reason:
            raise UserError(f"accept: expected nvidia-smi to tell the GPUs, found {reason}.") from None
        names = ", ".join(dict.fromkeys(gpu.name for gpu in report.gpus))
        found |= {"device": names, "driver": report.driver, "cuda": report.cuda}
    return found


def interconnect() -> str:
    """NVLink by nvidia-smi's matrix, and the adapters of InfiniBand with their rates; none where there is neither."""
    found = []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "topo", "-m"]
        matrix = subprocess.run(command, capture_output=True, text=True, timeout=nvidia_smi.TIMEOUT).stdout
        links = sorted({word for word in matrix.split() if word.startswith("NV") and word[2:].isdigit()})
        found += [f"NVLink {', '.join(links)}"] if links else []
    for rate in sorted(preflight.INFINIBAND.glob("*/ports/*/rate")):
        found.append(f"{rate.parts[-4]} {rate.read_text().strip()}")
    return "; ".join(found) or "none"


def main(arguments: list[str]) -> int:
    """Arguments: cuda or cpu, a file that another machine has written. Prints this machine's identity as JSON."""
    device, seen = arguments
    deadline = time.monotonic() + SEEN
    while not Path(seen).exists():
        if time.monotonic() > deadline:
            where = f"{socket.gethostname()} does not see {Path(seen).parent}"
            expected = "expected a run.directory that every machine sees"
            print(
                f"accept: {expected}, found that {where}. Set run.directory to a shared file system.", file=sys.stderr
            )
            return 2
        time.sleep(0.2)
    try:
        print(json.dumps(identity(device)))
    except UserError as error:
        print(f"{socket.gethostname()}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
