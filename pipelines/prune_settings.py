"""How a teacher is pruned, as settings. Imports no torch.

Layers count from 1; channels, neurons, heads and KV groups from 0, as Hugging Face numbers them.
"""

from dataclasses import dataclass, field

from pipelines.choices import Aggregation, DepthMethod, Importance, Measure, Precision, StepTeacher

# What pruning makes smaller, in the words of config.json.
PRUNED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_key_value_heads",
    "num_attention_heads",
    "num_hidden_layers",
)


@dataclass
class OfLayerConfig:
    """Some neurons, heads or KV groups of one layer."""

    layer: int = 1
    indices: list[int] = field(default_factory=list)


@dataclass
class ProtectConfig:
    """What stays, however it is scored."""

    layers: list[int] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)  # channels
    ffn: list[OfLayerConfig] = field(default_factory=list)
    heads: list[OfLayerConfig] = field(default_factory=list)
    kv_groups: list[OfLayerConfig] = field(default_factory=list)


@dataclass
class MultiplesConfig:
    """What the student's sizes must be multiples of, beside what the layout asks for: kernels like 64 or 128."""

    hidden_size: int = 1
    intermediate_size: int = 1
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    num_hidden_layers: int = 1


@dataclass
class TargetConfig:
    """Limits of the student whose shape is searched for; without any the shape is that of student.*. What student.*
    gives is no longer searched."""

    parameters: float | None = None  # at most
    ratio: float | None = None  # at most, of the teacher's parameters
    bytes_per_gpu: float | None = None  # at most: bf16 weights on the fullest device of the layout
    seconds: float | None = None  # at most: of a forward pass over search.sequences of sequence_length
    tokens_per_second: float | None = None  # at least: of the same pass


@dataclass
class SearchConfig:
    """The grid's values per axis (empty: steps of a sixteenth of the teacher's size, in the multiples), and how far
    candidates are followed: by the losses of each axis alone, then together, then sliced, then distilled."""

    hidden_size: list[int] = field(default_factory=list)
    intermediate_size: list[int] = field(default_factory=list)
    num_attention_heads: list[int] = field(default_factory=list)
    num_key_value_heads: list[int] = field(default_factory=list)
    num_hidden_layers: list[int] = field(default_factory=list)
    smallest: float = 0.5  # of the teacher's size, on an axis without values of its own
    measured: int = 16  # candidates whose loss is measured
    candidates: int = 4  # of these, the best that are sliced
    distil_tokens: float = 0  # that each sliced candidate is distilled on; 0: none is
    by: Measure = Measure.loss  # what ranks the sliced candidates
    speed: str = "modelled"  # of plan.gpu; "measured" on this machine and layout; or a table's file
    sequences: int = 1  # of the pass whose speed counts
    keep_candidates: bool = False  # the weights of those that did not win


@dataclass
class PruneConfig:
    importance: Importance = Importance.activation  # of channels, neurons, heads and KV groups
    sequence_aggregation: Aggregation = Aggregation.mean  # over a sample's tokens
    sample_aggregation: Aggregation = Aggregation.l2  # over the samples
    random_seed: int = 1234  # of importance=random, depth_method=random and random_weights
    random_weights: bool = False  # a control: a student of the wanted shape with nothing of the teacher's weights
    depth_method: DepthMethod = DepthMethod.block_influence
    depth_measure: Measure = Measure.loss  # of depth_method=loss, contiguous and greedy
    depth_samples: int | None = None  # sequences that each removal is measured on; None: calibration_samples
    task: str | None = None  # JSONL of multiple-choice questions (questions.py), for measures by task
    task_normalised: bool = False  # accuracy by the likelihood per character of a choice: lm-eval's acc_norm
    scores: str | None = None  # scores.safetensors of another run of this teacher, instead of scoring
    calibration_samples: int = 128  # sequences, spread evenly over the calibration split
    sequence_length: int = 256  # tokens
    micro_batch_size: int = 8  # sequences per data-parallel rank and pass
    precision: Precision = Precision.fp32  # of the teacher while it is scored; the student keeps the files' own
    document_mask: bool = False  # as in training; with micro_batch_size 1
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    multiples: MultiplesConfig = field(default_factory=MultiplesConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass
class StepConfig:
    """One student of a run in steps: its shape, where None keeps that of the student before, or the limits of one that
    is searched for; and what of its distillation differs from distil.*."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    num_hidden_layers: int | None = None
    drop_layers: list[int] | None = None  # counted from 1 in the student before
    parameters: float | None = None  # at most, as prune.target
    ratio: float | None = None  # at most, of the student before
    steps: int | None = None
    warmup_steps: int | None = None
    learning_rate: float | None = None
    min_learning_rate: float | None = None


@dataclass
class IterateConfig:
    """Prune and distil in steps, each student the next one's start (iteration.py). Empty: in one, to student.*."""

    students: list[StepConfig] = field(default_factory=list)  # the last one is the run's student
    teacher: StepTeacher = StepTeacher.first
