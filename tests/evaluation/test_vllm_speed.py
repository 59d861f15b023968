"""Speed in vLLM: what it is asked, what its times become, and that what it cannot do is a gap.

A stand-in has vLLM's interface as vllm_speed.py uses it, takes a known time for each token, and writes down its calls.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.choices import Engine
from pipelines.config import UserError
from pipelines.evaluation import efficiency
from pipelines.evaluation.efficiency import Request
from pipelines.evaluation_settings import EfficiencyConfig
from tests.stages import small_run

SECONDS = {"teacher": 0.04, "distil": 0.02}  # per new token, by the stage that made the directory
VLLM = """
import json, os, time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
__version__ = "0.0"
SECONDS = {seconds}
def note(**words):
    with open({calls!r}, "a") as file:
        file.write(json.dumps(words) + "\\n")
@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
class LLM:
    def __init__(self, model, **settings):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        note(opened=model, settings=settings, process=os.getpid(), world=os.environ.get("WORLD_SIZE"), visible=visible)
        if "prune" in model:
            raise ValueError("no kernel for head_dim 8")
        self.seconds = SECONDS[Path(model).parent.name]
    def generate(self, prompts, sampling, use_tqdm):
        note(prompts=prompts, sampling=asdict(sampling))
        print("words before the answer")
        time.sleep(self.seconds * sampling.max_tokens)
        ids = [7] * (sampling.max_tokens - {lost})
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for _ in prompts]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("vllm") / "runs")


def stand_in(place: Path, monkeypatch: pytest.MonkeyPatch, lost: int = 0) -> Path:
    """Where its calls are written."""
    calls = place / "calls"
    text = VLLM.replace("{seconds}", repr(SECONDS)).replace("{calls!r}", repr(str(calls)))
    (place / "vllm.py").write_text(text.replace("{lost}", str(lost)))
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", f"{place}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return calls


def measured(root: Path, engines: list[Engine], models: tuple[str, ...] = ("teacher", "distil")) -> dict[str, Any]:
    settings = EfficiencyConfig(batch_sizes=[2], prompt_tokens=[6], new_tokens=5, rounds=2, engines=engines)
    config = small_run.configure(root, evaluate__efficiency=settings)
    names = {"distil": "student", "prune": "pruned"}
    directories = {names.get(stage, stage): root / "small" / stage / "hf" for stage in models}
    return efficiency.of_models(config, directories, "fp32", "cpu")


def test_what_vllm_is_asked_and_what_its_times_become(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(tmp_path, monkeypatch)
    found = measured(root, [Engine.vllm], ("teacher", "prune", "distil"))
    noted = [json.loads(line) for line in calls.read_text().splitlines()]
    opened = [each for each in noted if "opened" in each]
    hf = str(root / "small/teacher/hf")
    assert [Path(each["opened"]).parent.name for each in opened] == ["teacher", "prune", "distil"]
    assert len({each["process"] for each in opened}) == 3 and opened[0]["opened"] == hf
    assert opened[0]["settings"] == {
        "tokenizer": hf,
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "seed": 1234,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "max_model_len": 11,
        "max_num_seqs": 2,
    }
    assert opened[0]["world"] is None and opened[0]["visible"] == ""  # no rank, and no GPU where the stage has none
    asked = [each for each in noted if "prompts" in each]
    sampling = {"temperature": 0, "ignore_eos": True}
    assert [each["sampling"] for each in asked] == [sampling | {"max_tokens": new} for new in (1, 5)] * 6
    assert all([len(ids["prompt_token_ids"]) for ids in each["prompts"]] == [6, 6] for each in asked)
    assert found["form"] == "vLLM 0.0" and found["models"] == {}
    assert list(found["missing"]) == ["vllm.pruned"] and "no kernel for head_dim 8" in found["missing"]["vllm.pruned"]
    teacher, student = found["rows"]
    for row, seconds in ((teacher, 0.04), (student, 0.02)):
        assert row["engine"] == "vllm" and row["batch"] == 2 and "latency_ms" not in row
        assert 1e3 * seconds <= row["time_to_first_token_ms"]
        assert row["prefill_tokens_per_second"] == pytest.approx(12 / (row["time_to_first_token_ms"] / 1e3))
    assert teacher["ratio"]["decode_tokens_per_second"] == 1.0
    known = student["decode_tokens_per_second"] / teacher["decode_tokens_per_second"]
    assert student["ratio"]["decode_tokens_per_second"] == pytest.approx(known)


def test_a_row_follows_from_the_times() -> None:
    row = efficiency.vllm_row("student", Request(4, 100, 5), [0.5, 0.4, 9.0], [1.3, 1.2, 9.0])
    assert row["time_to_first_token_ms"] == pytest.approx(500)
    assert row["prefill_tokens_per_second"] == pytest.approx(400 / 0.5)
    assert row["decode_tokens_per_second"] == pytest.approx(4 / (0.8 / 4))
    with pytest.raises(UserError, match="longer than the first.*new_tokens"):
        efficiency.vllm_row("student", Request(4, 100, 5), [0.5], [0.5])


def test_both_engines_have_rows_of_their_own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    found = measured(root, [Engine.transformers, Engine.vllm])
    kinds = [(row["engine"], row["model"]) for row in found["rows"]]
    assert kinds == [(engine, model) for engine in ("transformers", "vllm") for model in ("teacher", "student")]
    assert found["form"].startswith("transformers 4") and found["form"].endswith(", vLLM 0.0")
    assert found["models"]["student"]["peak_bytes"] > 0 and not found["missing"]


def test_too_few_tokens_are_no_figures(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, lost=1)
    found = measured(root, [Engine.vllm])
    assert found["rows"] == [] and "2 sequences of 1 new tokens, found [0, 0]" in found["missing"]["vllm.teacher"]


def test_vllm_that_is_not_installed_is_a_gap(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency.vllm_speed, "installed", lambda: False)
    found = measured(root, [Engine.transformers, Engine.vllm])
    assert {row["engine"] for row in found["rows"]} == {"transformers"}
    assert list(found["missing"]) == ["vllm"] and "vllm is not installed. Install it" in found["missing"]["vllm"]
    assert measured(root, [Engine.transformers])["missing"] == {}
