"""What serving tools ask of a directory, and that one which is installed is asked to open it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.choices import Quantization
from pipelines.families import ModelShape
from pipelines.model.random_model import write_random_model
from pipelines.serving import quantize, tools
from pipelines.serving.reloaded import greedy, reload

SHAPE = ModelShape(301, 64, 96, 2, 1, 1, 64)
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64}
# vLLM's interface as open_with.py uses it, with transformers behind it.
VLLM = """
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM
__version__ = "0.0"
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        assert temperature == 0 and ignore_eos
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, **settings):
        assert settings["max_model_len"] == 24
        import os
        assert "WORLD_SIZE" not in os.environ
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
    def generate(self, prompts, sampling):
        print("words before the answer")
        ids = torch.tensor(prompts[0]["prompt_token_ids"])[None]
        for _ in range(sampling.max_tokens):
            ids = torch.cat([ids, self.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        tokens = ids[0, len(prompts[0]["prompt_token_ids"]):].tolist()
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])]
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_random_model(tmp_path / "hf", SHAPE.replace(rope_scaling=ROPE), 5, std=0.2)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return tmp_path / "hf"


def change(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | values).items() if value != "nothing"}
    path.write_text(json.dumps(config))


def test_what_we_write_has_no_obstacles(directory: Path) -> None:
    assert tools.obstacles(directory) == []
    quantize.write_quantized(
        directory, directory.with_name("int8"), Quantization.int8, SHAPE.replace(rope_scaling=ROPE)
    )
    assert [line.split(" ")[0] for line in tools.obstacles(directory.with_name("int8"))] == ["TensorRT-LLM's"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"torch_dtype": "nothing"}, "config.json has no torch_dtype."),
        ({"head_dim": "nothing"}, "config.json has no head_dim."),
        ({"torch_dtype": "float64"}, "torch_dtype is float64"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has no rope_type."),
        ({"tie_word_embeddings": True}, "beside tie_word_embeddings=true"),
    ],
)
def test_an_obstacle_is_named(directory: Path, values: dict[str, Any], words: str) -> None:
    change(directory, **values)
    assert words in " ".join(tools.obstacles(directory))


def test_obstacles_of_weights_and_sizes(tmp_path: Path) -> None:
    shape = SHAPE.replace(head_dim=24, intermediate_size=90)
    write_random_model(tmp_path / "hf", shape, 5)
    quantize.write_quantized(tmp_path / "hf", tmp_path / "int8", Quantization.int8, shape)
    found = " ".join(tools.obstacles(tmp_path / "int8"))
    assert "head_dim is 24" in found and "no tokenizer.json" in found and "multiples of 4, found [90]" in found
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert "no tensor lm_head.weight" in " ".join(tools.obstacles(tmp_path / "hf"))


def test_a_tool_that_is_installed_opens_it(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(16))
    expected = greedy(reload(directory), tokens, 8)
    assert set(tools.in_words(tools.opened(directory, tokens, lambda: expected))) == {
        "vLLM: not installed",
        "TensorRT-LLM: not installed",
    }
    (tmp_path / "vllm.py").write_text(VLLM)
    (tmp_path / "tensorrt_llm.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = tools.opened(directory, tokens, lambda: expected)
    assert found["vllm"] == {"installed": True, "version": "0.0", "equal": 1.0}
    assert "libcuda.so.1" in found["tensorrt_llm"]["error"]
    words = tools.in_words(found)
    assert words[0] == "vLLM 0.0 opens it; 100% of its tokens are transformers'"
    assert words[1].startswith("TensorRT-LLM did not open it: exit code 1")
    other = [expected[0], *((token + 1) % 301 for token in expected[1:])]
    assert tools.opened(directory, tokens, lambda: other)["vllm"]["equal"] == 1 / 8


def test_greedy_is_the_most_likely_token_each_time(directory: Path) -> None:
    model, ids = reload(directory), torch.arange(5)[None]
    found = greedy(model, list(range(5)), 3)
    with torch.no_grad():
        for token in found:
            assert model(ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
