"""The settings of the evaluation. Types, units and meaning; values live in conf/*.yaml. Imports no torch."""

from dataclasses import dataclass

from pipelines.choices import Precision


@dataclass
class EvaluateConfig:
    """The models' quality on a held-out split of the corpus comes first and always; every other part has its own group
    here, and is a gap with a reason where it cannot be measured."""

    split: str = "test"
    sequence_length: int = 256
    micro_batch_size: int = 8
    batches: int | None = None  # micro batches per data-parallel rank; None: the whole split
    precision: Precision | None = None  # of the models; None: distil.precision
    document_mask: bool | None = None  # as in training; None: distil.document_mask
