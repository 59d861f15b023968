"""Open a directory with a serving tool, in a process of its own: python -m pipelines.serving.open_with TOOL DIRECTORY.

Reads {"tokens": [ids], "new_tokens": n} from stdin; its last line on stdout is {"version", "tokens": [ids] or null},
what the tool writes greedily behind those, null of a tool that only converts. A tool takes the GPU and starts processes
as it likes, so that it is none of the ranks.
"""

import json
import sys
import tempfile
from typing import Any


def vllm(directory: str, tokens: list[int], new_tokens: int) -> dict[str, Any]:
    """Half of the GPU's memory is enough for a few tokens, and leaves room for what the stage holds."""
    import vllm as tool

    model = tool.LLM(
        model=directory,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        max_model_len=len(tokens) + new_tokens,
        generation_config="vllm",  # greedy, whatever the directory's own says
    )
    sampling = tool.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    (answer,) = model.generate([{"prompt_token_ids": tokens}], sampling)
    return {"version": tool.__version__, "tokens": list(answer.outputs[0].token_ids)}


def tensorrt_llm(directory: str, tokens: list[int], new_tokens: int) -> dict[str, Any]:
    """Converted as its examples' convert_checkpoint.py does it, into a directory that is thrown away."""
    import tensorrt_llm as tool
    from tensorrt_llm.models import LLaMAForCausalLM

    with tempfile.TemporaryDirectory() as target:
        LLaMAForCausalLM.from_hugging_face(directory, dtype="auto").save_checkpoint(target, save_config=True)
    return {"version": tool.__version__, "tokens": None}


TOOLS = {"vllm": vllm, "tensorrt_llm": tensorrt_llm}

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    found = TOOLS[sys.argv[1]](sys.argv[2], asked["tokens"], asked["new_tokens"])
    print("\n" + json.dumps(found), flush=True)
