"""What a setting of config.py may be, where it is one of a few words. Imports no torch."""

from enum import Enum


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TeacherMode(Enum):
    take = "take"  # the given directory as it is
    pretrain = "pretrain"  # from a seeded random Hugging Face directory of model.shape
    correct = "correct"  # continue training the given directory on the corpus


class SourceKind(Enum):
    auto = "auto"  # by the path's ending
    jsonl = "jsonl"
    text = "text"
    parquet = "parquet"
    datasets = "datasets"  # a directory written by datasets' save_to_disk
    megatron = "megatron"  # an existing .bin/.idx prefix
    standard_library = "standard_library"  # the running Python's own
    package_descriptions = "package_descriptions"  # of the installed Python packages: prose


class DomainKind(Enum):
    """How a domain's text relates to what the models are for."""

    own = "own"
    other = "other"  # out of distribution: what forgetting shows on


class Importance(Enum):
    """What ranks channels, neurons, heads and KV groups."""

    activation = "activation"  # their activations
    taylor = "taylor"  # the first-order change of the loss without them
    random = "random"  # the control


class Aggregation(Enum):
    """Of absolute values."""

    mean = "mean"
    l1 = "l1"
    l2 = "l2"
    max = "max"


class DepthMethod(Enum):
    """Which layers go."""

    layers = "layers"  # student.drop_layers
    block_influence = "block_influence"  # those whose output is most like their input
    taylor = "taylor"  # those of the least first-order change of the loss
    random = "random"  # the control
    loss = "loss"  # those whose removal, each by itself, hurts least
    contiguous = "contiguous"  # the block of neighbours whose removal hurts least
    greedy = "greedy"  # one after the other, each time the one whose removal hurts least


BY_REMOVAL = (DepthMethod.loss, DepthMethod.contiguous, DepthMethod.greedy)  # what measures what a removal costs


class Measure(Enum):
    """What tells how much a removal hurts."""

    loss = "loss"  # cross-entropy of the calibration split, nats/token
    task = "task"  # of multiple-choice questions (prune.task)


class StepTeacher(Enum):
    """Who teaches the students of a run in steps."""

    first = "first"  # the run's teacher, in every step
    previous = "previous"  # the student of the step before


class Divergence(Enum):
    """The distance from teacher to student (core/family.py); with a parameter: beta and alpha."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"  # divergence_parameter: the teacher's share of the mixture, 0.5
    skew_kl = "skew_kl"  # divergence_parameter: the same, 0.1
    total_variation = "total_variation"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class TeacherPrecision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"  # the weights and inputs of its layers' matrix products, by Transformer Engine; the rest bf16


class Optimizer(Enum):
    """Whose AdamW takes the step; the arithmetic is the same, and so is the state in a checkpoint."""

    auto = "auto"  # the first of these that is installed; on the CPU torch
    transformer_engine = "transformer_engine"
    apex = "apex"
    torch = "torch"  # fused on a GPU


class Contender(Enum):
    """Whose heads and loss the benchmark measures, by the names in its results."""

    stillhouse = "stillhouse"
    nemo = "nemo"  # NeMo 2's LogitsKLLoss
    modelopt = "modelopt"  # ModelOpt's LogitsKLLoss for Megatron, which Megatron-Bridge trains with
    torch = "torch"  # torch's kl_div on whole logits
    torch_compile = "torch.compile"  # the same, compiled
    liger = "liger"  # Liger's fused-linear JSD, on one GPU


class Quantization(Enum):
    """What the weights of a model's linear layers become, but those of the output head (serving/quantize.py)."""

    int8 = "int8"  # one scale per output channel
    int4 = "int4"  # one scale per group of 128 inputs, or of 64 or 32 where these alone divide them
    fp8 = "fp8"  # E4M3, one scale per output channel


class Engine(Enum):
    """What answers the requests by which a model's speed is told."""

    transformers = "transformers"
    vllm = "vllm"  # pip install vllm


class Tracker(Enum):
    """Where figures of training go beside metrics.jsonl and TensorBoard (trainer/trackers.py). Offline unless
    WANDB_MODE or MLFLOW_TRACKING_URI says otherwise. One run per stage, over restarts."""

    wandb = "wandb"  # into <run>/wandb
    mlflow = "mlflow"  # into <run>/mlflow.db


class Format(Enum):
    text = "text"
    json = "json"
