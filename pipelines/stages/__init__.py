"""The table of stages: what each reads, which settings decide its result, whether it runs on ranks. Imports no torch.

Dispatch, artifacts and the documentation read this table. A stage is `pipelines/stages/<name>.py` with
`run(context: artifacts.StageContext) -> dict`, called on every rank; the figures that rank 0 returns go into
manifest.json.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage.

    ranks: runs as one process per device under torchrun; otherwise in one process.
    reads: names of `artifacts.INPUTS` that must be there and whole; may_read: those taken where they are there.
    settings: dotted configuration paths that decide the result. A path to a group stands for every key in it but
        those of FREE, which change the speed, the log or how far a run goes, and not the result.
    kept: writes a directory with a manifest and a `complete` marker, and is not run twice.
    derived: only shows what other stages wrote; made anew where that has changed, without asking for overwrite.
    per_machine: without ranks of its own, one process on each of several machines (model/machines.py).
    of_machine: belongs to no run, but to the machine: its directory is <run.directory>/<name>/, whatever run.name says.
    """

    name: str
    does: str
    ranks: bool
    reads: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    may_read: tuple[str, ...] = ()
    kept: bool = True
    derived: bool = False
    of_machine: bool = False
    per_machine: bool = False

    @property
    def takes_all_nodes(self) -> bool:
        """Of a job on a cluster; the others run on one node without its GPUs."""
        return self.ranks or self.per_machine


FREE = frozenset(
    {
        "micro_batch_size",
        "recompute",
        "optimizer",
        "teacher_offload",
        "checkpoint_interval",
        "keep_checkpoints",
        "keep_best",
        "save_asynchronous",
        "skip_steps",
        "log_interval",
        "profile",
        "validation_interval",
        "validation_batches",
        "workers",
        "part",
        "parts",
    }
)

_TABLE = (
    Stage(
        "fetch",
        "models and data sets from the Hugging Face hub, with the user's token, where there is network",
        ranks=False,
        kept=False,
        of_machine=True,
    ),
    Stage(
        "corpus",
        "text to Megatron .bin/.idx, split into train, validation, test and calibration",
        ranks=False,
        reads=("sources",),
        may_read=("tokenizer",),
        settings=("data", "model.shape.vocab_size"),
    ),
    Stage(
        "tokenize",
        "one part of a large corpus, for job arrays: data.part of data.parts; stage=corpus puts the parts together",
        ranks=False,
        kept=False,
    ),
    Stage(
        "teacher",
        "take a Hugging Face teacher as it is, pretrain a small one, or correct one on the corpus",
        ranks=True,
        reads=("corpus",),
        may_read=("model",),
        settings=("teacher", "model.shape", "run.seed"),
    ),
    Stage(
        "prune",
        "score on calibration data, select, and slice the teacher's safetensors",
        ranks=True,
        reads=("corpus", "teacher"),
        may_read=("scores", "task"),
        settings=("student", "prune"),
    ),
    Stage(
        "distil",
        "train the student on the frozen teacher's logits, both sharded over the same ranks",
        ranks=True,
        reads=("corpus", "teacher", "start"),
        settings=("distil", "run.seed"),
    ),
    Stage(
        "evaluate",
        "teacher, pruned and student side by side on held-out text",
        ranks=True,
        reads=("corpus", "teacher"),
        may_read=("start", "student", "given_student", "task_files", "domain_files", "prompts", "baseline"),
        settings=("evaluate", "evaluate.micro_batch_size", "distil.precision", "distil.document_mask"),
    ),
    Stage(
        "export",
        "a verified Hugging Face directory, optionally a NeMo checkpoint",
        ranks=True,
        reads=("corpus", "student"),
        may_read=("teacher", "evaluation"),
        settings=("export",),
    ),
    Stage(
        "report",
        "results.json, plots, one HTML page",
        ranks=False,
        may_read=("corpus", "teacher_run", "pruning", "distillation", "evaluation", "exported", "steps"),
        settings=("report", "gates"),
        derived=True,
    ),
    Stage("decide", "which variant to take: size, quality and speed, within limits", ranks=False, kept=False),
    Stage("plan", "parameters, FLOPs and bytes per device, before anything is started", ranks=False, kept=False),
    Stage(
        "accept",
        "try a new machine: proofs, bandwidth, steps at true size, a killed training, an export; a row for the records",
        ranks=False,
        kept=False,
        of_machine=True,
        per_machine=True,
    ),
    Stage("verify", "prove values and gradients of the sharded step on this machine", ranks=True, kept=False),
    Stage(
        "benchmark",
        "memory, speed and error of loss and step beside NeMo's, ModelOpt's, torch's and Liger's",
        ranks=True,
        kept=False,
        of_machine=True,
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _TABLE}
PIPELINE: tuple[str, ...] = tuple(stage.name for stage in _TABLE if stage.kept)  # what stage=all runs
