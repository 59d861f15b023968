"""A model's linear weights in fewer bits, in the format of compressed-tensors, which transformers and vLLM open.

Weights alone, to the nearest, without calibration data: of each linear layer but the output head, W becomes Q * scale
with symmetric integers or FP8 (E4M3) Q and scale = max |W| / (range / 2) per output channel or per group of inputs.
Embedding, head and norms stay as they are. Files are safetensors, read and written tensor by tensor.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.choices import Quantization
from pipelines.config import UserError
from pipelines.families import EMBEDDING, HEAD, ModelShape
from pipelines.files import read_object
from pipelines.model.safetensors_stream import Announced, Tensors, Writer
from pipelines.safetensors_header import expect_tensors

LIBRARY = "compressed-tensors"
GROUPS = (128, 64, 32)  # inputs per scale of INT4, the first that divides: what vLLM's kernels take
INSTALL = "pip install 'stillhouse[quantize]', or leave export.quantize out."


@dataclass(frozen=True)
class Scheme:
    """format: compressed-tensors' name of how they lie in the file. group: inputs per scale; None: a whole channel."""

    bits: int
    type: str  # "int" or "float"
    format: str
    group: int | None

    def arguments(self) -> Any:
        """The scheme as compressed-tensors' QuantizationArgs."""
        quantization = library().quantization
        strategy = "channel" if self.group is None else "group"
        return quantization.QuantizationArgs(
            num_bits=self.bits, type=self.type, symmetric=True, strategy=strategy, group_size=self.group
        )

    def scales(self, inputs: int) -> int:
        """How many each output channel has."""
        return 1 if self.group is None else inputs // self.group

    def compressor(self) -> Any:
        """What packs and unpacks the weights of this format."""
        return library().compressors.BaseCompressor.load_from_registry(self.format)


def library() -> Any:
    """The package compressed_tensors. Raises UserError where it cannot be imported."""
    try:
        import compressed_tensors
        import compressed_tensors.compressors
        import compressed_tensors.quantization.utils
    except ImportError as error:
        raise UserError(
            f"export.quantize: expected the library {LIBRARY}, found that it cannot be imported: {error}. {INSTALL}"
        ) from None
    return compressed_tensors


def linear_weights(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of the matrices that are quantized."""
    sizes = shape.tensor_shapes().items()
    return {name: (size[0], size[1]) for name, size in sizes if len(size) == 2 and name not in (EMBEDDING, HEAD)}


def scheme(method: Quantization, shape: ModelShape) -> Scheme:
    """How a model of this shape is quantized. Raises UserError where its sizes do not allow it."""
    if method is Quantization.fp8:
        return Scheme(8, "float", "float-quantized", None)
    inputs = sorted({size[1] for size in linear_weights(shape).values()})
    if method is Quantization.int8:
        return Scheme(8, "int", "pack-quantized", None)
    group = next((size for size in GROUPS if not any(number % size for number in inputs)), None)
    if group is None:
        raise UserError(
            f"export.quantize=[int4]: expected linear layers whose inputs are multiples of {GROUPS[-1]}, found "
            f"{', '.join(map(str, inputs))}. Prune to such sizes (prune.multiples), or quantize to int8."
        )
    return Scheme(4, "int", "pack-quantized", group)


def write_quantized(
    source: Path, target: Path, method: Quantization, shape: ModelShape, *, max_shard_bytes: float = 5e9
) -> Scheme:
    """Write `source`, a Hugging Face directory of `shape`, quantized into `target`, which appears whole.

    Its other files are copied, config.json with a quantization_config. Holds one tensor at a time. One process.
    Raises UserError where the library, the shape or the disk does not allow it.
    """
    how, tensors = scheme(method, shape), Tensors(source)
    tensors.expect_model(shape)
    linear, arguments, compressor = linear_weights(shape), how.arguments(), how.compressor()
    announced: Announced = {}
    for name in tensors.names:
        if name in linear:
            announced |= _announced(name, linear[name], how, tensors.dtype(name))
        else:
            announced[name] = (tensors.shape(name), tensors.dtype(name))
    with Writer(target, announced, max_shard_bytes) as writer:
        _copy_others(source, writer.partial, how)
        for name in tensors.names:
            parts = {name: tensors[name]}
            if name in linear:
                parts = _quantized(name, parts[name], how, compressor, arguments)
            for part, value in parts.items():
                writer.write(part, value)
    return how


class Dequantized(Tensors):
    """The tensors that a quantized directory stands for, under the names and in the dtype of the model it was made of;
    each is unpacked when it is read. `shape`: of the model; `how`: as `write_quantized` gave it."""

    def __init__(self, directory: str | Path, shape: ModelShape, how: Scheme) -> None:
        super().__init__(directory)
        self._linear, self._compressor, self._arguments = linear_weights(shape), how.compressor(), how.arguments()

    def expect_model(self, shape: ModelShape) -> None:
        """Raises UserError unless every tensor is there that a model of this shape is unpacked from."""
        expected: dict[str, tuple[int, ...]] = dict(shape.tensor_shapes())
        for name in self._linear:
            stem = name.removesuffix("weight")
            parts = [part for part in self._entries if part.startswith(stem)]
            if f"{stem}weight_scale" not in parts or len(parts) < 2:
                expected[f"{stem}weight_scale"] = ()  # told as missing
            expected.pop(name)
            expected |= {part: self._entries[part].shape for part in parts}
        expect_tensors(self.directory, self._entries, expected, (HEAD,) if shape.tie_word_embeddings else ())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._linear:
            return super().__getitem__(name)
        stem = name.removesuffix("weight")
        names = [part for part in self._entries if part.startswith(stem)]
        packed = {part.removeprefix(stem): super(Dequantized, self).__getitem__(part) for part in names}
        found: torch.Tensor = self._compressor.decompress_weight(packed, quantization_args=self._arguments)
        return found.to(packed["weight_scale"].dtype)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        if name not in self._linear:
            return super().slice(name, dim, start, stop)
        return self[name].narrow(dim, start, stop - start)


def _announced(name: str, size: tuple[int, int], how: Scheme, dtype: torch.dtype) -> Announced:
    """What `_quantized` makes of a weight of this size and dtype."""
    stem = name.removesuffix("weight")
    scale: Announced = {f"{stem}weight_scale": ((size[0], how.scales(size[1])), dtype)}
    if how.type == "float":
        return {name: (size, torch.float8_e4m3fn)} | scale
    packed = (size[0], -(-size[1] * how.bits // 32))
    return {f"{stem}weight_packed": (packed, torch.int32), f"{stem}weight_shape": ((2,), torch.int64)} | scale


def _quantized(
    name: str, weight: torch.Tensor, how: Scheme, compressor: Any, arguments: Any
) -> dict[str, torch.Tensor]:
    """The tensors that stand for one weight, by their full names. Its scales are rounded to the weight's dtype first,
    so that the integers are those of the scales that are stored."""
    stem, exact = name.removesuffix("weight"), weight.float()
    grouped = exact.unflatten(1, (how.scales(exact.shape[1]), -1))
    least, most = grouped.aminmax(dim=-1)
    found, _ = library().quantization.utils.calculate_qparams(least, most, arguments)
    scale = found.to(weight.dtype)
    # A row of zeros has a scale next to nothing, which in bf16 or fp16 may be nothing.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    parts = compressor.compress_weight(exact, scale.float(), arguments)
    return {stem + part: value.contiguous() for part, value in parts.items()} | {f"{stem}weight_scale": scale}


def _copy_others(source: Path, target: Path, how: Scheme) -> None:
    """config.json with what is quantized, and what else belongs to the model: tokenizer, card, licence."""
    config = read_object(source / "config.json") | {"quantization_config": _description(how)}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in _others(source):
        shutil.copyfile(file, target / file.name)


def _others(source: Path) -> Iterator[Path]:
    """The files of a directory that belong to no form of its weights."""
    for file in sorted(source.iterdir()):
        text = file.suffix in (".json", ".jinja", ".md", ".model", ".txt") or not file.suffix
        if file.is_file() and text and file.name != "config.json" and not file.name.endswith(".index.json"):
            yield file


def _description(how: Scheme) -> dict[str, Any]:
    """The quantization_config of config.json."""
    quantization = library().quantization
    group = quantization.QuantizationScheme(targets=["Linear"], weights=how.arguments())
    found = quantization.QuantizationConfig(
        config_groups={"group_0": group}, format=how.format, ignore=["lm_head"], quantization_status="compressed"
    )
    described: dict[str, Any] = found.model_dump(mode="json")
    return described
