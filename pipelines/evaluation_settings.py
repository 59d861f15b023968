"""The settings of the evaluation. Types, units and meaning; values live in conf/*.yaml. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.choices import DomainKind, Engine, Precision, SourceKind

GENERATED = (CHOICE, CLOZE) = ("corpus_choice", "corpus_cloze")  # sets of questions made from held-out text
TASK_FILES = (".yaml", ".yml", ".jsonl")
MODELS = ("teacher", "pruned", "student")
FEW = 20  # documents, below which the percentiles of a bootstrap lie too close together
WINDOWS = ("split", "sequence_length", "document_mask")  # what is in the windows that losses are measured on
MODEL_FIGURES = (  # of each model in results.json, besides what the parts of evaluate add
    *("loss", "perplexity", "bits_per_byte", "kl", "agreement", "overlap", "calibration_error", "kl_by_entropy"),
    *("by_token_class", "parameters", "non_embedding_parameters", "tokens_per_second"),
)
TOKEN_CLASSES = ("word_start", "word_inside", "number", "punctuation", "white_space", "other")  # text/token_classes.py
PARTS = ("domains", "long_context", "tasks", "efficiency", "generation", "behaviour")  # that add figures of models


@dataclass
class GateConfig:
    """A bound that a figure must keep, or the stage that finds it ends with exit code 2 (pipelines/gates.py)."""

    figure: str = ""  # MODEL.FIGURE of results.json, MODEL.tasks.TASK, MODEL.domains.NAME.FIGURE, or export.FIGURE
    of: str | None = None  # a model: the figure is divided by the same one of that model
    above: float | None = None  # one of the two, in the figure's unit; not reached by the bound itself
    below: float | None = None


def is_task_file(name: str) -> bool:
    """Whether one of evaluate.tasks.names is a path: of a task file, or of a directory of them."""
    return "/" in name or name.endswith(TASK_FILES)


SHIPPED = "shipped"  # as evaluate.behaviour.prompts


@dataclass
class TasksConfig:
    """lm-evaluation-harness on the models' Hugging Face directories; the ranks share the pairs of model and task.

    Of names: a task or group of the harness; corpus_choice and corpus_cloze, which are made from held-out text
    (evaluation/task_files.py); a path: a task's .yaml, a directory of them, or a .jsonl of questions (questions.py). A
    path goes by the file's name without its ending in shots, metrics and published.
    """

    names: list[str] = field(default_factory=list)  # empty: no tasks
    shots: dict[str, int] = field(default_factory=dict)  # examples before each question; others: the task's own number
    # Which of a task's metrics counts, as the harness names it, such as "exact_match,strict-match"; others: acc_norm
    # where the task has it, else acc, else its first.
    metrics: dict[str, str] = field(default_factory=dict)
    # {model: {task: value}} to hold beside what is found, in the metric's unit: shares from 0 to 1; null: none.
    published: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None  # the first so many questions of each task; None: all
    questions: int = 100  # in each set that is made from held-out text
    micro_batch_size: int = 16  # requests that a rank's model reads at a time
    precision: Precision | None = None  # of the models here, in generation and behaviour; None: evaluate.precision
    # Layers spread over all devices of a machine, one rank of it at work, here, in generation and behaviour: for models
    # larger than one device.
    parallelize: bool = False


@dataclass
class EfficiencyConfig:
    """What the models cost to use: every batch size with every prompt length, on rank 0's device."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])  # sequences continued together; empty: not measured
    prompt_tokens: list[int] = field(default_factory=lambda: [128])  # read before the first new one, per sequence
    new_tokens: int = 32  # written after them, per sequence
    rounds: int = 5  # of timed requests of each kind per model
    threads: int | None = None  # of the CPU; None: as many as the rank has (OMP_NUM_THREADS); vLLM takes its own number
    # What opens the directories and answers; each has rows of its own. Memory is told by transformers alone.
    engines: list[Engine] = field(default_factory=lambda: [Engine.transformers])


@dataclass
class DomainConfig:
    """Text of one kind, read by the corpus's tokenizer."""

    name: str = ""  # in the results: letters, digits, - and _
    path: str | None = None  # as data.sources take it; None only for the sources that have none
    kind: DomainKind = DomainKind.own
    source: SourceKind = SourceKind.auto
    text_key: str = "text"  # of jsonl, parquet, datasets
    document_bytes: int | None = None  # cut text files at blank lines into documents of about this size
    tokens: int = 100_000  # at most so many, from the beginning


@dataclass
class GenerationConfig:
    """What every model makes of the same prompts, and how much of it is said more than once."""

    count: int = 0  # prompts: the first of the file, or as many pieces of held-out text; 0: none
    prompts: str | None = None  # JSONL with a "prompt" in every line; None: from the evaluated split
    new_tokens: int = 64  # at most, of each continuation
    greedy: bool = False  # the likeliest id each time; otherwise drawn, seeded by run.seed
    temperature: float = 1.0  # of drawing; 1 and top_p=1 are the model's own distribution
    top_p: float = 1.0  # the likeliest ids that together have this probability
    micro_batch_size: int = 16  # prompts that a rank's model continues at a time


@dataclass
class BehaviourConfig:
    """How often a model refuses, and how often its answer holds a word of a list, by category of prompt; greedy."""

    # JSONL with a "category" and a "prompt" in every line; "shipped": those beside evaluation/behaviour.py; None: not
    # measured.
    prompts: str | None = None
    lexicon: str | None = None  # text file, a word or phrase per line; None: a few mild insults, to try the part with
    refusals: str | None = None  # text file, a regular expression per line; None: what English assistants begin with
    new_tokens: int = 48  # at most, of each answer
    micro_batch_size: int = 16  # prompts that a rank's model answers at a time


@dataclass
class EvaluateConfig:
    """The models' quality on a held-out split of the corpus comes first and always; every other part has its own group
    here, and is a gap with a reason where it cannot be measured."""

    split: str = "test"
    student: str | None = None  # a Hugging Face directory to evaluate as the student; None: what distil has made
    sequence_length: int = 256
    micro_batch_size: int = 8
    batches: int | None = None  # micro batches per data-parallel rank; None: the whole split
    precision: Precision | None = None  # of the models; None: distil.precision
    document_mask: bool | None = None  # as in training; None: distil.document_mask
    tasks: TasksConfig = field(default_factory=TasksConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    domains: list[DomainConfig] = field(default_factory=list)  # measured beside the split, each by itself
    # Sequence lengths, in tokens, at which the split's documents that are long enough are read besides.
    long_context: list[int] = field(default_factory=list)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    baseline: str | None = None  # results.json of an earlier evaluation of the same text, to tell the drift from


def prompt_files(settings: EvaluateConfig) -> list[str | None]:
    """What generation and behaviour read beside the models."""
    behaviour = settings.behaviour
    prompts = None if behaviour.prompts == SHIPPED else behaviour.prompts
    return [settings.generation.prompts, prompts, behaviour.lexicon, behaviour.refusals]


def few_in_words(documents: int) -> str:
    """What to think of intervals over so few documents; empty where there are enough."""
    if documents >= FEW:
        return ""
    if documents < 2:
        return f"no intervals: {documents} document{'s' * (documents != 1)}, where it takes two or more"
    return f"intervals rest on {documents} documents; with fewer than {FEW} they are too narrow"
