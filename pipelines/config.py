"""The typed schema of every setting. Types, units and meaning live here; values live in conf/*.yaml. Imports no torch.

`pipelines/validation.py` checks the values against each other and against the files they name.
"""

import glob
import os
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

from pipelines import elsewhere
from pipelines.choices import (
    Contender,
    Device,
    Divergence,
    Format,
    Optimizer,
    Precision,
    SourceKind,
    TeacherMode,
    TeacherPrecision,
    Tracker,
)
from pipelines.cluster_settings import ClusterConfig
from pipelines.evaluation_settings import EvaluateConfig, GateConfig
from pipelines.export_settings import ExportConfig
from pipelines.prune_settings import IterateConfig, PruneConfig
from pipelines.report_settings import DecideConfig, ReportConfig
from pipelines.signals import AttentionLossConfig, HiddenLossConfig, SchedulesConfig, TaidConfig
from pipelines.site_settings import AcceptConfig, FetchConfig


class UserError(ValueError):
    """A user's mistake: one message without a traceback: what was expected, what was found, what to do."""


def expect(good: bool, setting: str, expected: str, found: Any, remedy: str) -> None:
    """Raises UserError where something is not as it should be. setting: its name, or the file that it stands in."""
    if not good:
        raise UserError(f"{setting}: expected {expected}, found {found}. {remedy}")


@dataclass
class RunConfig:
    name: str = "quickstart"
    directory: str = "runs"  # a run lives in <directory>/<name>/<stage>/
    seed: int = 1234
    trackers: list[Tracker] = field(
        default_factory=list
    )  # of the stages that train; pip install 'stillhouse[trackers]'
    project: str = "stillhouse"  # at Weights & Biases; at MLflow the experiment


@dataclass
class ShapeConfig:
    """A model's shape in the words of Hugging Face's config.json."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    architecture: str = "LlamaForCausalLM"


@dataclass
class ModelConfig:
    """The teacher: a directory, or the shape to pretrain (also what `plan` counts where there is no directory)."""

    path: str | None = None  # Hugging Face directory or NeMo 2 checkpoint
    name: str = "teacher"
    shape: ShapeConfig = field(default_factory=ShapeConfig)


@dataclass
class StudentConfig:
    """The target shape of pruning; None keeps the teacher's."""

    path: str | None = None  # a pruned Hugging Face directory to distil into, instead of the prune stage's
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None  # the same number in each KV group that stays
    num_key_value_heads: int | None = None  # whole KV groups go, with their heads
    num_hidden_layers: int | None = None
    drop_layers: list[int] | None = None  # counted from 1


@dataclass
class ParallelConfig:
    """processes = tensor * pipeline * context * data; data follows from the rest."""

    processes: int | None = None  # None: every GPU, or 2 on a machine without one
    tensor: int | None = None  # None: every process
    pipeline: int = 1
    context: int = 1  # ranks that share each sequence in training; in other stages they take rows of their own
    sequence_parallel: bool = False
    device: Device = Device.auto


@dataclass
class SourceConfig:
    path: str | None = None  # None only for standard_library and package_descriptions
    kind: SourceKind = SourceKind.auto
    weight: float = 1.0  # share of the training samples that come from it, relative to the other sources
    text_key: str = "text"  # of jsonl, parquet, datasets
    limit_bytes: int | None = None  # take documents up to this much text (UTF-8); None: all; not for megatron
    document_bytes: int | None = None  # cut text files at blank lines into documents of about this size; None: one each


@dataclass
class DataConfig:
    corpus: str | None = None  # a corpus directory of another run, instead of making one
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: str | None = None  # directory; None: the teacher's where it has one, else a byte-level BPE is trained
    tokenizer_vocab_size: int | None = None  # of the BPE trained here; None: model.shape.vocab_size
    tokenizer_sample_bytes: int = 100_000_000  # train-split text that the BPE is trained on, by the sources' weights
    validation_fraction: float = 0.02  # of the documents
    test_fraction: float = 0.02
    calibration_fraction: float = 0.02
    workers: int | None = None  # None: every core
    part: int | None = None  # of stage=tokenize: which share of the files, from 1 to parts
    parts: int | None = None  # the corpus is made of files that stage=tokenize has tokenized, in so many parts


PROFILED = range(6, 9)  # steps, counted from 1 from where a start begins


@dataclass
class TrainingConfig:
    sequence_length: int = 256  # tokens
    micro_batch_size: int = 4  # sequences per data-parallel rank and pass
    global_batch_size: int = 16  # sequences per optimizer step
    steps: int = 200
    warmup_steps: int = 20
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    gradient_clip: float = 1.0  # global L2 norm; 0 switches it off
    precision: Precision = Precision.fp32
    optimizer: Optimizer = Optimizer.auto
    distributed_optimizer: bool = False
    recompute: bool = False  # activation recompute of whole layers
    document_mask: bool = False  # attention and positions begin anew with each document; the next one is no label
    validation_interval: int = 50  # steps
    validation_batches: int = 4  # global batches
    checkpoint_interval: int = 50  # steps
    keep_checkpoints: int = 2  # the last ones
    keep_best: int = 0  # besides, of those saved at a step with a validation, the ones with the lowest loss there
    # Write a checkpoint's files while the next steps are taken, from a copy of the rank's share in host memory.
    save_asynchronous: bool = True
    log_interval: int = 1  # steps
    # Steps of a run that may be left out because the loss or the gradient is not finite, or a spike; 0: the first one
    # ends the run. Their data is consumed, weights and optimizer stay as they were.
    skip_steps: int = 0
    spike: float | None = (
        None  # times the median gradient norm of the last 128 steps, above which one is a spike; None: off
    )
    profile: bool = False  # a torch.profiler trace of three steps of rank 0, PROFILED, into the stage's tensorboard/


@dataclass
class TeacherConfig(TrainingConfig):
    mode: TeacherMode = TeacherMode.take


@dataclass
class DistilConfig(TrainingConfig):
    """loss = kd_weight * T^2 * divergence(teacher, student, T) + ce_weight * CE(labels, student)
    + the weighted losses of hidden and attention."""

    alpha: float = 0.5  # what the options of conf/signals that name it make both weights of
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = True  # multiply KD by T^2
    divergence: Divergence = Divergence.forward_kl
    divergence_parameter: float | None = None  # above 0 and below 1; None: the divergence's own
    top_k: int | None = None  # the teacher's most likely ids, all others as one; None: every id by itself
    # Leave blocks of 512 ids out of the logits' gradient in which both models' probabilities are below this and no
    # label lies (core/filter.py has the bound of the error); None: none are.
    gradient_filter: float | None = None
    teacher_precision: TeacherPrecision | None = None  # of the frozen teacher; None: distil.precision
    teacher_offload: bool = False  # its layers in host memory, each on the device only around its use
    hidden: list[HiddenLossConfig] = field(default_factory=list)
    attention: list[AttentionLossConfig] = field(default_factory=list)
    schedules: SchedulesConfig = field(default_factory=SchedulesConfig)
    taid: TaidConfig = field(default_factory=TaidConfig)


@dataclass
class VerifyConfig:
    sequence_length: int = 32
    micro_batch_size: int = 2
    micro_batches: int = 2  # per step and data-parallel rank
    tolerance: float = 1e-5  # norm(a - b) / norm(b) per tensor, fp32
    document_mask: bool = False  # as in training, on rows of several documents
    kd_weight: float = 0.7
    ce_weight: float = 0.3
    temperature: float = 2.0
    divergence: Divergence = Divergence.forward_kl
    divergence_parameter: float | None = None
    top_k: int | None = None


@dataclass
class BenchmarkConfig:
    """Two heads and the loss, for every pair of tokens and vocabulary; then whole steps of model= and student=; then
    what scoring model= for pruning costs beside its forward passes."""

    contenders: list[Contender] = field(default_factory=lambda: list(Contender))
    tokens: list[int] = field(default_factory=list)  # empty: no heads
    vocabularies: list[int] = field(default_factory=list)  # token ids; multiples of parallel.tensor
    student_hidden: int = 768
    teacher_hidden: int = 1024
    micro_batch_sizes: list[int] = field(default_factory=list)  # sequences; empty: no whole steps
    micro_batches: int = 1  # per step
    scoring_micro_batch_sizes: list[int] = field(default_factory=list)  # sequences; empty: no scoring
    scoring_batches: int = 3  # micro batches that are scored at a time
    sequence_length: int = 256  # tokens, of the whole steps and of scoring
    precision: Precision = Precision.fp32
    warmup: int = 1  # rounds in which each contender runs without being timed
    rounds: int = 5  # timed; the median counts
    docs: str | None = None  # a directory that gets the table and the plots too


@dataclass
class PlanConfig:
    gpu: str = "H100"  # what speed and hours are predicted for: a name in gpus.BF16_PEAKS, or one that torch gives
    share_of_peak: float = 0.4  # of the GPU's bf16 peak: what speed, hours and percent_of_plan reckon with
    layouts: bool = False  # a table of the layouts of as many processes that fit plan.gpu, the fastest first
    gpus_per_node: int = 8  # of one machine, joined by NVLink: tensor parallelism stays inside it
    network_bytes_per_second: float = 50e9  # per GPU between machines, one direction; 400 Gbit/s InfiniBand
    # Build both models at true size without weights or GPUs, for every distinct rank, and hold them to the plan; also
    # written dry_run=true. The only part of plan that needs torch.
    dry_run: bool = False


@dataclass
class Config:
    stage: Any = "plan"  # a name, a list of names, or "all": corpus to report
    overwrite: bool = False  # start a stage again whose settings or inputs changed; its checkpoints are moved aside
    format: Format = Format.text  # of what plan and decide print
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    iterate: IterateConfig = field(default_factory=IterateConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    gates: list[GateConfig] = field(default_factory=list)  # of no stage: another bound asks for no overwrite
    export: ExportConfig = field(default_factory=ExportConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    decide: DecideConfig = field(default_factory=DecideConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    accept: AcceptConfig = field(default_factory=AcceptConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def teacher_precision(distil: DistilConfig) -> TeacherPrecision:
    return distil.teacher_precision or TeacherPrecision(distil.precision.value)


def searches(config: Config) -> bool:
    """Whether prune searches for the student's shape."""
    return not config.student.path and any(value is not None for value in vars(config.prune.target).values())


def distils_candidates(config: Config) -> bool:
    """Whether the search distils its candidates."""
    return searches(config) and config.prune.search.distil_tokens > 0


def document_mask(config: Config, stage: str) -> bool:
    """Whether a stage keeps the documents apart that share a row."""
    if stage == "evaluate" and config.evaluate.document_mask is None:
        stage = "distil"
    return bool(getattr(getattr(config, stage), "document_mask", False))


@dataclass(frozen=True)
class Layout:
    """processes = tensor * pipeline * context * data, on one kind of device ("cpu" or "cuda")."""

    processes: int
    tensor: int
    pipeline: int
    context: int
    data: int
    device: str
    sequence_parallel: bool


def without_context(ranks: Layout) -> Layout:
    """The same processes where sequences stay whole: those that share one in training take rows of their own."""
    return replace(ranks, context=1, data=ranks.data * ranks.context)


def gpu_count() -> int:
    """NVIDIA devices that this process may use, told without torch; none with a CPU build of torch. Of the nodes that
    settings are checked for, those of each."""
    if (of_nodes := elsewhere.gpus()) is not None:
        return of_nodes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return 0
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    if not devices and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True, timeout=10).stdout
        devices = sum(line.startswith("GPU ") for line in listing.splitlines())
    try:
        if devices and metadata.version("torch").endswith("+cpu"):
            return 0
    except metadata.PackageNotFoundError:
        pass
    return min(devices, len(visible.split(","))) if visible else devices


def layout(parallel: ParallelConfig) -> Layout:
    """The layout that `parallel` asks for on this machine; inside a started job WORLD_SIZE is the number of processes.

    Raises UserError where the degrees do not divide the processes. Whether the device is there is asked of stages that
    need ranks (validation/layouts.py).
    """
    gpus = gpu_count()
    asked = parallel.device is Device.cuda  # of a machine without a GPU where nothing is started: planning, a corpus
    device = "cuda" if asked or gpus and parallel.device is not Device.cpu else "cpu"
    world = elsewhere.started_processes()
    default = gpus if gpus and device == "cuda" else _default_processes(parallel)
    processes = parallel.processes or world or default
    if world and world != processes:
        raise UserError(
            f"parallel.processes={processes}: expected the number of processes that were started, found "
            f"WORLD_SIZE={world}. Leave parallel.processes out, or start as many."
        )
    for name in ("tensor", "pipeline", "context"):
        if (getattr(parallel, name) or 1) < 1:
            raise UserError(f"parallel.{name}: expected 1 or more, found {getattr(parallel, name)}.")
    others = parallel.pipeline * parallel.context
    tensor = parallel.tensor or max(1, processes // others)
    if processes % (tensor * others):
        raise UserError(
            f"parallel: expected tensor * pipeline * context to divide the number of processes, found {tensor} * "
            f"{parallel.pipeline} * {parallel.context} = {tensor * others} with {processes} processes. "
            "Change parallel.processes, or leave parallel.tensor out to use every process."
        )
    data = processes // (tensor * others)
    return Layout(processes, tensor, parallel.pipeline, parallel.context, data, device, parallel.sequence_parallel)


def _default_processes(parallel: ParallelConfig) -> int:
    """What the given degrees need; two where the tensor degree is open."""
    needed = (parallel.tensor or 1) * parallel.pipeline * parallel.context
    return needed if parallel.tensor else max(2, needed)
