"""Hugging Face directories through Megatron shards and back, at every layout, against transformers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.families import ModelShape, read_shape
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors
from tests.ranks import RankPools

CASES = "tests.model.cases_weights"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.15,
}


@dataclass
class Source:
    """A directory that transformers writes. settings: what differs from SMALL."""

    settings: dict[str, Any] = field(default_factory=dict)
    family: str = "Llama"
    dtype: str = "float32"
    max_shard_size: str = "5GB"


SOURCES = {
    "llama3_head_dim": Source({"head_dim": 24, "rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "tied": Source({"tie_word_embeddings": True}),
    "multi_head": Source({"num_key_value_heads": 8}),
    "linear_rope": Source({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": Source({"head_dim": 12, "sliding_window": None, "rope_theta": 1e6}, family="Mistral"),
    "sharded": Source(max_shard_size="60KB"),
    "odd_vocabulary": Source({"vocab_size": 253}),
    "odd_tied_vocabulary": Source({"vocab_size": 257, "tie_word_embeddings": True}),
    "bf16": Source(dtype="bfloat16"),
}
# (processes, tensor, pipeline, sequence parallel)
LAYOUTS = {
    "tp1": (1, 1, 1, False),
    "tp2": (2, 2, 1, False),
    "tp2_sp": (2, 2, 1, True),
    "pp2": (2, 1, 2, False),
    "dp2": (2, 1, 1, False),
    "tp4": (4, 4, 1, False),
    "tp4_sp": (4, 4, 1, True),
    "tp2_pp2": (4, 2, 2, False),
    "tp2_pp2_sp": (4, 2, 2, True),
    "tp2_dp2": (4, 2, 1, False),
}
IDS = np.random.default_rng(7).integers(0, 250, size=(2, 64)).tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """{name: (directory, logits of transformers in fp32)}."""
    import transformers

    made = {}
    for number, (name, source) in enumerate(SOURCES.items()):
        torch.manual_seed(number)
        config = getattr(transformers, f"{source.family}Config")(**(SMALL | source.settings))
        model = getattr(transformers, f"{source.family}ForCausalLM")(config).to(getattr(torch, source.dtype))
        for norm in (weight for key, weight in model.named_parameters() if "norm" in key):
            norm.data.normal_(1.0, 0.2)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory, max_shard_size=source.max_shard_size)
        # Read afresh: casting a model of transformers to bf16 also rounds its rotary frequencies.
        model = type(model).from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            made[name] = directory, model(torch.tensor(IDS)).logits.numpy()
    assert len(list(made["sharded"][0].glob("*.safetensors"))) > 3
    return made


def _layout(name: str) -> tuple[int, dict[str, Any]]:
    processes, tensor, pipeline, sequence_parallel = LAYOUTS[name]
    return processes, {"tensor": tensor, "pipeline": pipeline, "sequence_parallel": sequence_parallel}


def _assert_same_weights(directory: Path, expected: Path, shape: ModelShape) -> None:
    found, wanted = Tensors(directory), Tensors(expected)
    found.expect(shape.tensor_shapes())
    for name in shape.tensors():
        assert found.dtype(name) == wanted.dtype(name), name
        assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)), name


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_identical_and_logits_are_those_of_transformers(
    sources: dict[str, tuple[Path, np.ndarray]], ranks: RankPools, tmp_path: Path, layout: str, source: str
) -> None:
    directory, expected = sources[source]
    processes, arguments = _layout(layout)
    dtype = SOURCES[source].dtype
    call = {"source": str(directory), "output": str(tmp_path / "out"), "layout": arguments, "ids": IDS, "dtype": dtype}
    logits = [found for found in ranks(processes, f"{CASES}:round_trip", **call) if found is not None]
    assert len(logits) == processes // arguments["pipeline"]
    assert np.abs(expected).max() > 1, "logits too small to tell anything"
    for found in logits:
        assert np.abs(found - expected).max() < 1e-5
    shape = read_shape(directory)
    assert read_shape(tmp_path / "out") == shape
    _assert_same_weights(tmp_path / "out", directory, shape)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_bf16_models_keep_bf16_files_bit_identical(
    sources: dict[str, tuple[Path, np.ndarray]], ranks: RankPools, tmp_path: Path, layout: str
) -> None:
    directory, _ = sources["bf16"]
    processes, arguments = _layout(layout)
    ranks(
        processes,
        f"{CASES}:round_trip_in_bf16",
        source=str(directory),
        output=str(tmp_path / "out"),
        layout=arguments,
    )
    _assert_same_weights(tmp_path / "out", directory, read_shape(directory))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("source", ["llama3_head_dim", "odd_tied_vocabulary", "mistral"])
def test_what_is_written_opens_in_transformers(
    sources: dict[str, tuple[Path, np.ndarray]], ranks: RankPools, tmp_path: Path, source: str
) -> None:
    from transformers import AutoModelForCausalLM

    directory, expected = sources[source]
    processes, arguments = _layout("tp2")
    call = {"source": str(directory), "output": str(tmp_path / "out"), "layout": arguments, "ids": IDS}
    ranks(processes, f"{CASES}:round_trip", dtype="float32", **call)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        logits = model(torch.tensor(IDS)).logits.numpy()
    assert type(model).__name__ == f"{SOURCES[source].family}ForCausalLM"
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2_dp2"])
def test_gathering_a_function_of_the_parameters(
    sources: dict[str, tuple[Path, np.ndarray]], ranks: RankPools, layout: str
) -> None:
    directory, _ = sources["odd_tied_vocabulary"]
    processes, arguments = _layout(layout)
    first, *others = ranks(processes, f"{CASES}:gathered", source=str(directory), layout=arguments)
    assert others == [None] * (processes - 1)
    weights = Tensors(directory)
    assert set(first) == set(read_shape(directory).tensors())
    for name, value in first.items():
        assert np.array_equal(value, 3 * weights[name].numpy()), name


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "tp4", "tp2_pp2"])
def test_no_rank_holds_more_than_its_shard_and_one_tensor(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    shape = _small_shape(vocab_size=1024, intermediate_size=1024)
    write_random_model(tmp_path / "model", shape, seed=1)
    total, largest = 4 * shape.parameters(), max(4 * int(np.prod(size)) for size in shape.tensor_shapes().values())
    assert largest < total / 14
    processes, arguments = _layout(layout)
    call = {"source": str(tmp_path / "model"), "output": str(tmp_path / "out"), "layout": arguments}
    held = ranks(processes, f"{CASES}:bytes_held", **call)
    norms = 4 * shape.hidden_size * (2 * shape.num_hidden_layers + 1)
    slack = 32 * 1024  # blocks of 4 KiB, or of one KV group, on their way; objects that travel as bytes
    for rank in held:
        assert rank["read"] == rank["shard"] <= total / processes + norms
        assert rank["mapped at once"] <= largest / arguments["tensor"]
        assert rank["allocated while loading"] <= slack
        assert rank["allocated while saving"] <= largest + slack
    assert held[0]["allocated while saving"] >= largest, "the measurement sees nothing"


@pytest.mark.parametrize("layout", ["dp2", "tp2_dp2"])
def test_replicas_read_the_files_once_between_them_and_hold_the_same_bits(
    ranks: RankPools, tmp_path: Path, layout: str
) -> None:
    write_random_model(tmp_path / "model", _small_shape(vocab_size=1024), seed=1)
    processes, arguments = _layout(layout)
    call = {"source": str(tmp_path / "model"), "layout": arguments}
    found = ranks(processes, f"{CASES}:read_by_replicas", **call)
    for place in {rank["place"] for rank in found}:
        first, second = (rank for rank in found if rank["place"] == place)
        assert (first["read"], second["read"]) == (first["shard"], 0)
        assert first["weights"] == second["weights"]


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "tp4", "KV groups.*multiple.*=4, found 2"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "tp4", "attention heads.*multiple.*=4, found 6"),
        ({"intermediate_size": 98}, "tp4", "ffn neurons.*multiple.*=4, found 98"),
        ({"num_hidden_layers": 3}, "tp2_pp2", "layers.*multiple.*=2, found 3"),
    ],
)
def test_shapes_that_the_layout_does_not_divide_are_refused_by_name(
    ranks: RankPools, tmp_path: Path, settings: dict[str, int], layout: str, message: str
) -> None:
    write_random_model(tmp_path / "model", _small_shape(**settings), seed=1)
    processes, arguments = _layout(layout)
    for error in ranks(processes, f"{CASES}:build_error", source=str(tmp_path / "model"), layout=arguments):
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)


def test_every_rank_refuses_weights_that_are_not_those_of_config_json(ranks: RankPools, tmp_path: Path) -> None:
    shape = _small_shape()
    write_random_model(tmp_path / "model", shape, seed=1)
    write_random_model(tmp_path / "quantized", shape, seed=1, dtype="float8_e4m3fn")
    processes, arguments = _layout("tp2")
    for name, other, message in (
        (
            "model",
            shape.replace(intermediate_size=128),
            r"layers.0.mlp.gate_proj.weight: expected \[128, 64\], found \[96, 64\]",
        ),
        ("model", shape.replace(num_hidden_layers=6), "missing 18 of 57: model.layers.4.input_layernorm.weight"),
        ("model", shape.replace(num_hidden_layers=2), "found 18 more: model.layers.2.input_layernorm.weight"),
        ("quantized", shape, "expected weights in .*, found model.embed_tokens.weight in F8_E4M3"),
    ):
        call = {"source": str(tmp_path / name), "shape": other, "layout": arguments}
        for error in ranks(processes, f"{CASES}:load_error", **call):
            with pytest.raises(ValueError, match=message):
                raise ValueError(error)


@pytest.mark.parametrize("when", ["before", "configuration", "weights"])
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_full_disk_is_one_message_on_every_rank_and_leaves_the_earlier_directory(
    sources: dict[str, tuple[Path, np.ndarray]], ranks: RankPools, tmp_path: Path, layout: str, when: str
) -> None:
    directory, _ = sources["sharded"]
    processes, arguments = _layout(layout)
    output = tmp_path / "out"
    output.mkdir()
    (output / "earlier").touch()
    call = {"source": str(directory), "output": str(output), "layout": arguments, "when": when}
    errors = ranks(processes, f"{CASES}:full_disk", **call)
    assert len(set(errors)) == 1
    assert str(output) in errors[0]
    assert ("free disk space, found 1,000" if when == "before" else "No space left") in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["earlier"]


def _small_shape(**changes: Any) -> ModelShape:
    config = {"architectures": ["LlamaForCausalLM"], "head_dim": 8} | SMALL | changes
    return ModelShape.from_hugging_face(config)
