"""What distillation brings and what its choices change, on a small trained teacher, over several seeds.

    python launchers/ablations.py [--runs runs] [--page docs/RESULTS.md] [--seeds 1 2 3] [--jobs 2] [--arms NAME ...]

Each arm is experiment=ablations/<arm>, all of one teacher, that of experiment=pruning_study, which is trained in
<runs>/pruning_study where there is none. The arms uncorrected and corrected are of the same teacher on text that it has
never seen, the C++ headers that come with PyTorch. launchers/study.py says how the arms follow.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study import Arm, Study, follow, options, stages, threads

PAGE, PLOT = Path("docs/RESULTS.md"), "ablations"
OTHER_BYTES = 4_000_000  # of the other text


AT_RANDOM = ("prune.importance=random", "prune.random_seed={seed}")
CORRECTED = "ablations_corrected"


def arm(title: str, name: str) -> Arm:
    """One that distils the pruned model of `kd`."""
    return Arm(title, experiment=f"ablations/{name}", starts_from="kd")


ARMS: dict[str, Arm] = {
    "kd": Arm("KL alone", experiment="ablations/kd"),
    "plain": arm("plain training", "plain"),
    "both": arm("KL and cross-entropy, half each", "both"),
    "random_start_kd": Arm("random start, KL alone", AT_RANDOM, True, experiment="ablations/random_start_kd"),
    "random_start_plain": Arm("random start, plain", AT_RANDOM, True, experiment="ablations/random_start_plain"),
    "temperature_2": arm("temperature 2", "temperature_2"),
    "temperature_4": arm("temperature 4", "temperature_4"),
    "reverse_kl": arm("reverse KL", "reverse_kl"),
    "jensen_shannon": arm("Jensen-Shannon", "jensen_shannon"),
    "skew_kl": arm("skew KL", "skew_kl"),
    "total_variation": arm("total variation", "total_variation"),
    "hidden": arm("KL and hidden states", "hidden"),
    "taid": arm("TAID", "taid"),
}
# On another text, with losses of another scale: a table of their own.
OTHER_ARMS: dict[str, Arm] = {
    "uncorrected": Arm("teacher as it is", experiment="ablations/uncorrected", corpus=CORRECTED),
    "corrected": Arm(
        "teacher that was corrected", experiment="ablations/corrected", corpus=CORRECTED, teacher=CORRECTED
    ),
}

# (what is asked, the arm expected to be better, the other): arXiv 2407.14679 and 2408.11796 for the first four and
# the last; for the others nobody promises a direction at this size.
COMPARISONS = (
    ("distillation against plain training, equal tokens", "kd", "plain"),
    ("both terms against plain training, equal tokens", "both", "plain"),
    ("pruned against random start, distilled", "kd", "random_start_kd"),
    ("pruned against random start, plain training", "plain", "random_start_plain"),
    ("temperature 1 against 2", "kd", "temperature_2"),
    ("temperature 1 against 4", "kd", "temperature_4"),
    ("forward against reverse KL", "kd", "reverse_kl"),
    ("forward KL against Jensen-Shannon divergence", "kd", "jensen_shannon"),
    ("forward against skew KL", "kd", "skew_kl"),
    ("forward KL against total variation", "kd", "total_variation"),
    ("hidden states beside the logits against logits alone", "hidden", "kd"),
    ("TAID against a fixed target", "taid", "kd"),
)
OTHER_COMPARISONS = (("corrected against uncorrected teacher", "corrected", "uncorrected"),)


def studies(runs: Path, page: Path = PAGE, jobs: int = 2) -> tuple[Study, Study]:
    """That of the distillation, and that of the teacher's correction."""
    shared = (runs.resolve(), "ablations_arms", threads(jobs))
    return (
        Study("pruning_study", ARMS, COMPARISONS, page, PLOT, *shared),
        Study("pruning_study", OTHER_ARMS, OTHER_COMPARISONS, page, f"{PLOT}_correction", *shared, block="correction"),
    )


def other_text() -> str:
    """The override that names it."""
    torch = find_spec("torch")
    assert torch is not None and torch.submodule_search_locations, "torch"
    headers = Path(torch.submodule_search_locations[0]) / "include" / "**" / "*.h"
    return f"data.sources=[{{path: '{headers}', kind: text, document_bytes: 20000, limit_bytes: {OTHER_BYTES}}}]"


def main(arguments: Sequence[str] | None = None) -> None:
    given = options(str(__doc__), ARMS | OTHER_ARMS, PAGE).parse_args(arguments)
    own, other = studies(given.runs, given.page, given.jobs)
    names, others = ([name for name in given.arms if name in study.arms] for study in (own, other))
    follow(own, [stages("[corpus,teacher]", "pruning_study", own.runs)], given.seeds, given.jobs, names)
    teacher = f"model.path={own.runs}/pruning_study/teacher/hf"
    corrects = stages("[corpus,teacher]", "ablations/corrected", own.runs, teacher, other_text())
    follow(other, [corrects] if others else [], given.seeds, given.jobs, others)


if __name__ == "__main__":
    main()
