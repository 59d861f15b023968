"""Weights in fewer bits: what lies in the files, what it stands for, and that transformers computes with it."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines.choices import Quantization
from pipelines.config import UserError
from pipelines.families import ModelShape, read_shape
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.safetensors_header import weight_bytes
from pipelines.serving import quantize

SHAPE = ModelShape(301, 64, 96, 2, 4, 2, 16)  # 32 divides every layer's inputs, 64 does not
BITS = {"int8": 8, "int4": 4, "fp8": 8}
LIMIT = {"int8": 0.05, "int4": 0.8, "fp8": 0.3}  # of the logits' relative change at these weights


@pytest.fixture(scope="module", params=[(torch.float32, False), (torch.bfloat16, True)], ids=["fp32", "bf16-tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype, tied = request.param
    shape = SHAPE.replace(tie_word_embeddings=tied)
    place = tmp_path_factory.mktemp("source") / "hf"
    write_random_model(place, shape, 3, std=0.1)
    weights = load_file(place / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5] = 0.0  # a channel without a scale of its own
    rewrite(place, {name: value.to(dtype) for name, value in weights.items()}, dtype)
    return place


def rewrite(place: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    save_file(weights, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))


def unpacked(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """scale * integer in float64, from the packing: little-endian fields of each int32, offset by half the range."""
    stem = name.removesuffix("weight")
    scale = tensors[f"{stem}weight_scale"].double()
    if name in tensors:
        return tensors[name].double() * scale
    rows, columns = tensors[f"{stem}weight_shape"].tolist()
    words = tensors[f"{stem}weight_packed"].long() % 2**32
    fields = torch.stack([(words >> shift) % 2**bits for shift in range(0, 32, bits)], dim=-1)
    whole = fields.reshape(rows, -1)[:, :columns].double() - 2 ** (bits - 1)
    return (whole.view(rows, scale.shape[1], -1) * scale[:, :, None]).view(rows, columns)


def write(source: Path, tmp_path: Path, method: str, **settings: float) -> tuple[Path, quantize.Scheme]:
    shape = read_shape(source)
    return tmp_path / method, quantize.write_quantized(
        source, tmp_path / method, Quantization(method), shape, **settings
    )


@pytest.mark.parametrize("method", BITS)
def test_transformers_computes_with_what_the_integers_stand_for(source: Path, tmp_path: Path, method: str) -> None:
    target, how = write(source, tmp_path, method)
    stored, before = load_file(target / "model.safetensors"), load_file(source / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        original = plain(tokens).logits
        for name in quantize.linear_weights(SHAPE):
            weight = unpacked(stored, name, BITS[method])
            steps = before[name].double().abs().amax() / 2 ** (BITS[method] - 1)
            assert (weight - before[name].double()).abs().max() < 8 * steps and torch.isfinite(weight).all()
            plain.get_parameter(name).copy_(weight.float())
        expected = plain(tokens).logits
        opened = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        found = opened(tokens).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert 1e-4 < (found - original).norm() / original.norm() < LIMIT[method]
    tensors = quantize.Dequantized(target, read_shape(source), how)
    tensors.expect_model(read_shape(source))
    for name in read_shape(source).tensors():
        exact = (
            unpacked(stored, name, BITS[method]) if name in quantize.linear_weights(SHAPE) else before[name].double()
        )
        assert tensors[name].dtype == before[name].dtype
        torch.testing.assert_close(
            tensors[name].double(), exact, rtol=1e-2 if tensors[name].itemsize == 2 else 1e-6, atol=0
        )
        assert torch.equal(tensors.slice(name, 0, 3, 7), tensors[name][3:7])


@pytest.mark.parametrize("method", BITS)
def test_each_weight_is_the_nearest_of_its_scale(source: Path, tmp_path: Path, method: str) -> None:
    target, _ = write(source, tmp_path, method)
    stored, name = load_file(target / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    before = load_file(source / "model.safetensors")[name].double()
    scale = stored["model.layers.1.mlp.down_proj.weight_scale"].double()
    step = scale.repeat_interleave(before.shape[1] // scale.shape[1], dim=1)
    away = (unpacked(stored, name, BITS[method]) - before).abs()
    if method == "fp8":
        assert (away <= before.abs() / 16 + step * 2**-9).all()  # three bits behind the point
    else:
        inside = before.abs() <= step * (2 ** (BITS[method] - 1) - 0.6)  # the others lie beyond the last integer
        assert inside.double().mean() > 0.9 and (away[inside] <= step[inside] * 0.5001).all()
        assert (away <= step * 1.02).all()


@pytest.mark.parametrize("method", BITS)
def test_the_size_is_that_of_the_bits(source: Path, tmp_path: Path, method: str) -> None:
    target, how = write(source, tmp_path, method)
    linear = quantize.linear_weights(SHAPE)
    item = Tensors(source).dtype("model.norm.weight").itemsize
    weights = sum(math.prod(size) for size in linear.values())
    scales = sum(size[0] * how.scales(size[1]) for size in linear.values())
    rest = read_shape(source).parameters() - weights
    data = weights * BITS[method] // 8 + scales * item + rest * item
    shapes = 0 if method == "fp8" else 16 * len(linear)
    assert 0 < weight_bytes(target) - data - shapes < 10_000  # the header


def test_it_is_cut_into_files_with_an_index(source: Path, tmp_path: Path) -> None:
    target, _ = write(source, tmp_path, "int8", max_shard_bytes=40_000)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 2 and (target / "model.safetensors.index.json").is_file()
    one, _ = write(source, tmp_path / "one", "int8")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits for path in (target, one)
        ]
    assert torch.equal(*logits)


def test_what_belongs_to_the_model_is_copied_and_other_weights_are_not(source: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "tokenizer.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (source / name).write_text("{}")
    target, _ = write(source, tmp_path, "int8")
    names = {path.name for path in target.iterdir()}
    assert names == {"LICENSE", "tokenizer.json", "model.safetensors", "config.json", "generation_config.json"}
    described = json.loads((target / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "compressed-tensors" and described["format"] == "pack-quantized"
    with pytest.raises(UserError, match="found a model quantized by compressed-tensors"):
        read_shape(target)


def test_int4_wants_groups_that_divide(tmp_path: Path) -> None:
    shape = SHAPE.replace(intermediate_size=100)
    write_random_model(tmp_path / "hf", shape, 1)
    with pytest.raises(UserError, match="multiples of 32, found 64, 100"):
        quantize.write_quantized(tmp_path / "hf", tmp_path / "int4", Quantization.int4, shape)
    assert quantize.scheme(Quantization.int4, SHAPE.replace(intermediate_size=128)).group == 64


def test_a_library_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match="expected the library compressed-tensors.*pip install 'stillhouse"):
        write(source, tmp_path, "int8")
    assert not list(tmp_path.iterdir())
