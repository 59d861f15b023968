"""Whether serving tools take a directory: what they ask of its files, and, where one is installed, that it opens it."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.families import EMBEDDING, FAMILIES, HEAD, ModelShape
from pipelines.files import read_object
from pipelines.processes import environment_outside_ranks
from pipelines.safetensors_header import read_entries

TOOLS = {"vllm": "vLLM", "tensorrt_llm": "TensorRT-LLM"}
HEAD_DIMS = (64, 128, 256)  # that every attention backend of vLLM takes
SECONDS = 900  # for a tool to open a model
DTYPES = ("bfloat16", "float16", "float32")


def obstacles(directory: Path) -> list[str]:
    """What vLLM's and TensorRT-LLM's readers would stumble over in a directory, a sentence each. Opens nothing."""
    config = read_object(directory / "config.json")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    shape = ModelShape.from_hugging_face(plain)  # raises UserError for what no reader could make sense of
    found = []
    for key in ("architectures", "torch_dtype", "head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        if config.get(key) is None:
            found.append(f"config.json has no {key}.")
    if (dtype := config.get("torch_dtype")) not in (*DTYPES, None):
        found.append(f"config.json: torch_dtype is {dtype}, expected one of {', '.join(DTYPES)}.")
    if shape.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        found.append(f"head_dim is {shape.head_dim}: not every attention backend of vLLM takes another than {sizes}.")
    if (scaling := config.get("rope_scaling")) is not None:
        lacking = [key for key in ("rope_type", *_of_rope(shape)) if key not in scaling]
        if lacking:
            found.append(f"config.json: rope_scaling has no {', '.join(lacking)}.")
    found += _of_weights(directory, shape)
    if not (directory / "tokenizer.json").is_file():
        found.append("There is no tokenizer.json.")
    return found + _of_quantization(config.get("quantization_config"), shape)


def opened(directory: Path, tokens: Sequence[int], expected: Callable[[], Sequence[int]]) -> dict[str, dict[str, Any]]:
    """{tool: {"installed": bool, "version", "equal": share of the new tokens that are transformers' own, None of a tool
    that converts, "error"}}. tokens: a prompt; expected: what transformers writes behind it, greedily; asked where a
    tool is installed."""
    there = {tool: importlib.util.find_spec(tool) is not None for tool in TOOLS}
    known = expected() if any(there.values()) else []
    return {
        tool: {"installed": installed} | (_open(tool, directory, tokens, known) if installed else {})
        for tool, installed in there.items()
    }


def in_words(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for tool, each in found.items():
        if not each["installed"]:
            lines.append(f"{TOOLS[tool]}: not installed")
        elif "error" in each:
            lines.append(f"{TOOLS[tool]} did not open it: {each['error']}")
        elif each["equal"] is None:
            lines.append(f"{TOOLS[tool]} {each['version']} converts it")
        else:
            lines.append(
                f"{TOOLS[tool]} {each['version']} opens it; {each['equal']:.0%} of its tokens are transformers'"
            )
    return lines


def in_own_process(
    command: Sequence[str], asked: Mapping[str, Any], seconds: float, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The object on the last line that `python -m <command>` writes when it has read `asked` from stdin, as JSON; else
    {"error": what came of it}. variables: of its environment, beside this process's, which is none of a rank there."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment_outside_ranks() | dict(variables or {}),
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        answer = json.loads(lines[-1]) if not done.returncode and lines else None
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return {"error": f"{type(error).__name__} after at most {seconds} s"}
    if answer is None:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        return {"error": f"exit code {done.returncode}: {last}"}
    return answer


def _open(tool: str, directory: Path, tokens: Sequence[int], expected: Sequence[int]) -> dict[str, Any]:
    asked = {"tokens": list(tokens), "new_tokens": len(expected)}
    answer = in_own_process(["pipelines.serving.open_with", tool, str(directory)], asked, SECONDS)
    if "error" in answer:
        return answer
    same = [one == other for one, other in zip(answer["tokens"] or [], expected, strict=False)]
    return {"version": answer["version"], "equal": sum(same) / len(expected) if answer["tokens"] is not None else None}


def _of_rope(shape: ModelShape) -> tuple[str, ...]:
    """The numbers that a rope scaling of this type must give."""
    return FAMILIES[shape.architecture].rope_types[(shape.rope_scaling or {}).get("rope_type", "default")]


def _of_weights(directory: Path, shape: ModelShape) -> list[str]:
    there = read_entries(directory)
    found = []
    if EMBEDDING not in there:
        found.append(f"There is no tensor {EMBEDDING}.")
    if not shape.tie_word_embeddings and HEAD not in there:
        found.append(f"There is no tensor {HEAD}, and tie_word_embeddings is false.")
    if shape.tie_word_embeddings and HEAD in there:
        found.append(f"There is a tensor {HEAD} beside tie_word_embeddings=true: readers take one of the two.")
    return found


def _of_quantization(described: Any, shape: ModelShape) -> list[str]:
    """vLLM cuts packed weights into words of 32 bits; TensorRT-LLM's converter reads GPTQ, AWQ and fbgemm alone."""
    if not isinstance(described, dict):
        return []
    found = ["TensorRT-LLM's converter does not read compressed-tensors: give it hf, and its own --use_weight_only."]
    bits = described["config_groups"]["group_0"]["weights"]["num_bits"]
    if described["format"] == "pack-quantized":
        sizes = shape.tensor_shapes().items()
        inputs = {size[1] for name, size in sizes if len(size) == 2 and name not in (EMBEDDING, HEAD)}
        odd = sorted(size for size in inputs if size % (32 // bits))
        if odd:
            found.append(f"vLLM wants layers whose inputs are multiples of {32 // bits}, found {odd}.")
    return found
