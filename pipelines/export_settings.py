"""The settings of the export. Types, units and meaning; values live in conf/*.yaml. Imports no torch."""

from dataclasses import dataclass, field

from pipelines.choices import Quantization


@dataclass
class ExportConfig:
    # Of a checkpoint that distil keeps, also while it trains: what it has trained by then, into
    # <run.directory>/<run.name>/export-step-NNNNNNN/. None: the distilled student.
    step: int | None = None
    nemo: bool = False  # also write a NeMo 2 checkpoint
    tolerance: float = 1e-3  # largest relative difference norm(a - b) / norm(b) of the reloaded logits
    prompt: str = "def main("
    new_tokens: int = 32
    shard_bytes: float | None = None  # largest safetensors file, in bytes of tensors; None: as distil wrote them
    terms: str | None = None  # the licence that the model card states; None: the teacher's, as its directory states it
    # Also with the weights of its linear layers in fewer bits, each in a directory of its own beside hf;
    # pip install 'stillhouse[quantize]'.
    quantize: list[Quantization] = field(default_factory=list)
    quantize_teacher: bool = False  # the teacher in the same ways, to compare with
