"""Random Hugging Face directories: the same for a seed however they are written, and what stands beside the weights."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pipelines.config import UserError
from pipelines.families import ModelShape, read_shape
from pipelines.model.hub_files import write_hub_files
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors

SHAPE = ModelShape(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
)


def _digest(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.glob("*.safetensors")}


def _tokenizer(directory: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<begin>": 1, "hello": 2, "<end>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>")
    fast.save_pretrained(directory)
    return directory


def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    write_random_model(tmp_path / "one", SHAPE, seed=1)
    torch.manual_seed(99)
    write_random_model(tmp_path / "again", SHAPE, seed=1)
    write_random_model(tmp_path / "sharded", SHAPE, seed=1, max_shard_bytes=1e5)
    write_random_model(tmp_path / "other", SHAPE, seed=2)
    assert _digest(tmp_path / "one") == _digest(tmp_path / "again") != _digest(tmp_path / "other")
    one, sharded = Tensors(tmp_path / "one"), Tensors(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert all(torch.equal(one[name], sharded[name]) for name in one.names)


def test_a_change_of_depth_or_dtype_keeps_the_tensors_that_stay(tmp_path: Path) -> None:
    write_random_model(tmp_path / "deep", SHAPE, seed=1)
    write_random_model(tmp_path / "shallow", SHAPE.replace(num_hidden_layers=2), seed=1, dtype="bfloat16")
    deep, shallow = Tensors(tmp_path / "deep"), Tensors(tmp_path / "shallow")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(deep[name].bfloat16(), shallow[name])


def test_the_distribution(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", SHAPE, seed=1, std=0.05)
    tensors = Tensors(tmp_path / "model")
    for name in SHAPE.tensors():
        tensor = tensors[name]
        if "norm" in name:
            assert (tensor == 1).all()
            continue
        std = 0.05 / 4 if "o_proj" in name or "down_proj" in name else 0.05
        assert abs(tensor.std().item() / std - 1) < 0.05, name
        assert abs(tensor.mean().item()) < 0.05 * std, name
    first, second = (tensors[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_it_opens_in_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = _tokenizer(tmp_path / "tokenizer")
    write_random_model(tmp_path / "model", SHAPE, seed=1, dtype="bfloat16", tokenizer=tokenizer)
    assert read_shape(tmp_path / "model") == SHAPE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == SHAPE.parameters()
    weights = Tensors(tmp_path / "model")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode([2]) == "hello"
    for config in (model.config, GenerationConfig.from_pretrained(tmp_path / "model")):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 3, None)


def test_without_tokenizer_no_special_tokens_are_invented(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    write_random_model(tmp_path / "model", SHAPE, seed=1)
    for kind in (AutoConfig, GenerationConfig):
        config = kind.from_pretrained(tmp_path / "model")
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_a_models_own_ids_and_generation_config_go_before_the_tokenizers(tmp_path: Path) -> None:
    source = _tokenizer(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    write_random_model(tmp_path / "model", SHAPE, seed=1, tokenizer=source)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["eos_token_id"] == [2, 3]
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 3], "temperature": 0.6}


def test_the_model_it_was_trained_from_says_how_text_is_generated(tmp_path: Path) -> None:
    tokenizer, origin, made = _tokenizer(tmp_path / "tokenizer"), tmp_path / "origin", tmp_path / "made"
    for directory in (origin, made):
        directory.mkdir()
    own = {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9}
    (origin / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    (origin / "generation_config.json").write_text(json.dumps(own))
    write_hub_files(made, SHAPE, torch.float32, tokenizer, origin)
    config = json.loads((made / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 3])
    assert json.loads((made / "generation_config.json").read_text()) == own
    write_hub_files(made, SHAPE, torch.float32, tokenizer)
    alone = [(made / name).read_text() for name in ("config.json", "generation_config.json")]
    (origin / "config.json").write_text("{}")  # as a random model without a tokenizer says it
    (origin / "generation_config.json").write_text('{"eos_token_id": null}')
    write_hub_files(made, SHAPE, torch.float32, tokenizer, origin)
    assert [(made / name).read_text() for name in ("config.json", "generation_config.json")] == alone


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected a tokenizer"):
        write_random_model(tmp_path / "model", SHAPE, seed=1, tokenizer=tmp_path / "empty")
    assert not (tmp_path / "model").exists()
