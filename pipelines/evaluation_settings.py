"""The settings of the evaluation. Types, units and meaning; values live in conf/*.yaml. Imports no torch."""

from dataclasses import dataclass

from pipelines.choices import Precision

MODELS = ("teacher", "pruned", "student")
MODEL_FIGURES = (  # of each model in results.json, besides what the parts of evaluate add
    *("loss", "perplexity", "bits_per_byte", "kl", "agreement", "overlap", "calibration_error", "kl_by_entropy"),
    *("by_token_class", "parameters", "non_embedding_parameters", "tokens_per_second"),
)


@dataclass
class GateConfig:
    """A bound that a figure must keep, or the stage that finds it ends with exit code 2 (pipelines/gates.py)."""

    figure: str = ""  # MODEL.FIGURE of results.json, MODEL.tasks.TASK, MODEL.domains.NAME.FIGURE, or export.FIGURE
    of: str | None = None  # a model: the figure is divided by the same one of that model
    above: float | None = None  # one of the two, in the figure's unit; not reached by the bound itself
    below: float | None = None


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
