"""What runs in the ranks of test_frozen_teacher.py, and on a GPU by itself."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.models.gpt import GPTModel
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.config import UserError
from pipelines.families import ModelShape
from pipelines.model import build, parallel, weights
from pipelines.model.offload import HostLayers
from pipelines.model.pair import hidden_states
from pipelines.model.random_model import write_random_model
from tests.model.cases_step import TEACHER, write_models


def fp8_settings() -> dict[str, Any]:
    """The fields of Megatron's configuration on a GPU of compute capability 9.0 with Transformer Engine."""
    parallel.initialize(1)
    with (
        mock.patch.object(build, "uses_transformer_engine", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda: (9, 0)),
    ):
        config = build.transformer_config(TEACHER, precision="fp8", apply_rope_fusion=False)
    return {name: value for name, value in vars(config).items() if "fp8" in name or name.endswith("dtype")}


def fp8_refusal(engine: bool) -> str:
    """On a GPU of compute capability 8.0, with or without Transformer Engine."""
    parallel.initialize(1)
    with (
        mock.patch.object(build, "uses_transformer_engine", lambda: engine),
        mock.patch.object(torch.cuda, "get_device_capability", lambda: (8, 0)),
    ):
        try:
            build.transformer_config(TEACHER, precision="fp8")
        except UserError as error:
            return str(error)
    return "accepted"


def written_whole(directory: Path) -> dict[str, Any]:
    """Weights of matrices that take no writing to their parts, as those in FP8 do not: how often each was written, and
    whether all are those of plain parameters."""
    parallel.initialize(torch.distributed.get_world_size())
    write_models(directory)
    plain = build.build_model(TEACHER)
    weights.load_hugging_face(plain, directory / "teacher", TEACHER)
    model = build.build_model(TEACHER)
    matrices = {p.data_ptr(): name for name, p in model.named_parameters() if "linear" in name and p.dim() == 2}
    writes = _Writes(matrices)
    with mock.patch.object(weights, "is_float8tensor", lambda parameter: parameter.data_ptr() in matrices), writes:
        weights.load_hugging_face(model, directory / "teacher", TEACHER)
    equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    return {"equal": equal, "written": sorted(writes.found), "matrices": sorted(matrices.values())}


class _Writes(TorchDispatchMode):
    """The names of the tensors that were written, once for each time; by the places where they lie."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.copy_.default and (name := self.names.get(args[0].untyped_storage().data_ptr())):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


# On a GPU

WIDE = ModelShape(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
)


def _teacher(directory: Path, precision: str) -> tuple[GPTModel, int]:
    """The model and the bytes that the device holds for it."""
    before = torch.cuda.memory_allocated()
    model = build.build_model(WIDE, precision=precision, sequence_length=256)
    weights.load_hugging_face(model, directory, WIDE)
    model.requires_grad_(False).eval()
    return model, torch.cuda.memory_allocated() - before


@torch.no_grad()
def _states(model: GPTModel) -> torch.Tensor:
    tokens = torch.randint(0, WIDE.vocab_size, (2, 256), generator=torch.Generator().manual_seed(3)).cuda()
    return hidden_states(model, tokens, torch.arange(256).expand(2, 256).cuda()).float()


def on_a_gpu(fp8: bool) -> dict[str, float]:
    """Bytes of a teacher on the device, and how far its states are from the plain one's, in FP8 or offloaded."""
    parallel.initialize(1, device="cuda")
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write_random_model(directory / "model", WIDE, seed=1, std=0.02)
        plain, whole = _teacher(directory / "model", "bf16")
        expected = _states(plain)
        if fp8:
            model, held = _teacher(directory / "model", "fp8")
            found = _states(model)
            return {"whole": whole, "held": held, "error": ((found - expected).norm() / expected.norm()).item()}
    before = torch.cuda.memory_allocated()
    HostLayers(plain)
    held = whole + torch.cuda.memory_allocated() - before
    differs = max((_states(plain) - expected).abs().max().item() for _ in range(3))
    layer = sum(p.nbytes for p in plain.decoder.layers[0].parameters())
    return {"whole": whole, "held": held, "error": differs, "expected": whole - (WIDE.num_hidden_layers - 2) * layer}


if __name__ == "__main__":
    print(json.dumps(on_a_gpu(sys.argv[1] == "fp8")))
