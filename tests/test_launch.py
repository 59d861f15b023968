"""What the ranks of one stage leave each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines import launch
from pipelines.compose import compose
from pipelines.model import start


def test_a_word_of_an_earlier_start_on_several_nodes_is_not_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ranks of torchruns without an id of their own, on the same port, whose environment tells them nothing new."""
    config = compose([f"run.directory={tmp_path}"])
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1"}
    settings |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name in [name for name in os.environ if name.startswith("SLURM_")] + [launch.EXCHANGE]:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    places: list[list[Path]] = []
    port = 0
    for _ in range(2):
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # an agent's
        port = store.port
        monkeypatch.setenv("MASTER_PORT", str(port))
        places.append([])
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            start.name.cache_clear()  # each is a process of its own
            exchange = launch.Exchange.of(config, "distil")
            places[-1].append(exchange.directory)
            if rank == "0":
                exchange.tell("stopped")
        assert exchange.listen() == "stopped"
        del store
    start.name.cache_clear()
    (first, again), (second, later) = places
    assert first == again and second == later and first != second
    assert not first.exists() and second.exists(), "the words of earlier starts go"


def test_a_stage_is_spared_what_a_dependency_warns_of_in_each_process(tmp_path: Path) -> None:
    code = "import warnings; warnings.warn('The pynvml package is deprecated. Please', FutureWarning)"
    code += "; warnings.warn('another is deprecated', FutureWarning)"
    environment = launch.environment(1, tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "pynvml" not in done.stderr.replace(code, "") and "another" in done.stderr
