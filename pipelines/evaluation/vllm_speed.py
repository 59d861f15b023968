"""One model's times in vLLM, in a process of its own: python -m pipelines.evaluation.vllm_speed.

Reads {"model": settings of vllm.LLM, "rounds", "requests": [{"prompts": [[ids]], "new_tokens"}]} from stdin; its last
line on stdout is {"version", "times": [{"first": [s], "whole": [s]}]}, one entry per request, one time per round: until
each sequence has its first new token, and until it has all. When the process ends, the device has its memory back. vLLM
keeps beginnings of prompts that it has read; that is off here, or no round but the first would read anything.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from pipelines.config import UserError
from pipelines.serving import tools

SECONDS = 3600  # for one model: to open it, compile it, and answer
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def times(
    directory: Path,
    tokenizer: Path,
    requests: Sequence[tuple[Sequence[Sequence[int]], int]],
    *,
    precision: str,
    seed: int,
    rounds: int,
    share: float | None,
) -> dict[str, Any]:
    """{"version", "times"} as above.

    requests: (prompts of one length, new tokens of each). precision: "fp32" or "bf16". share: of the GPU's memory that
    vLLM may take; None: there is none, and vLLM is shown none. Raises UserError with the last word of what failed.
    """
    model = {
        "model": str(directory),
        "tokenizer": str(tokenizer),
        "dtype": DTYPES[precision],
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "seed": seed,
        "enable_prefix_caching": False,
        "generation_config": "vllm",  # greedy, whatever the directory's own says
        "max_model_len": max(len(prompts[0]) + new_tokens for prompts, new_tokens in requests),
        "max_num_seqs": max(len(prompts) for prompts, _ in requests),
    } | ({} if share is None else {"gpu_memory_utilization": share})
    asked = [{"prompts": prompts, "new_tokens": new_tokens} for prompts, new_tokens in requests]
    found = tools.in_own_process(
        ["pipelines.evaluation.vllm_speed"],
        {"model": model, "rounds": rounds, "requests": asked},
        SECONDS,
        {"CUDA_VISIBLE_DEVICES": ""} if share is None else {},
    )
    if "error" in found:
        raise UserError(f"evaluate.efficiency: expected vLLM to answer from {directory}, found {found['error']}")
    return found


def _answered(asked: Mapping[str, Any]) -> dict[str, Any]:
    import vllm

    engine = vllm.LLM(**asked["model"])
    found = []
    for request in asked["requests"]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        seconds: dict[str, list[float]] = {"first": [], "whole": []}
        for turn in range(1 + asked["rounds"]):
            for name, new_tokens in (("first", 1), ("whole", request["new_tokens"])):
                passed = _seconds(vllm, engine, prompts, new_tokens)
                if turn:
                    seconds[name].append(passed)
        found.append(seconds)
    return {"version": vllm.__version__, "times": found}


def _seconds(vllm: Any, engine: Any, prompts: list[dict[str, list[int]]], new_tokens: int) -> float:
    """Raises RuntimeError where a sequence has another number of new tokens."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    start = perf_counter()
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    passed = perf_counter() - start
    counts = [len(answer.outputs[0].token_ids) for answer in answers]
    if counts != [new_tokens] * len(prompts):
        raise RuntimeError(f"expected {len(prompts)} sequences of {new_tokens} new tokens, found {counts}")
    return passed


if __name__ == "__main__":
    print("\n" + json.dumps(_answered(json.load(sys.stdin))), flush=True)
