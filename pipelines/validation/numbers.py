"""Which values a single number may have, by the name of its setting."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from pipelines.config import Config, UserError


@dataclass(frozen=True)
class Range:
    """low <= value < high; above: low < value; whole: value <= high."""

    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def holds(self, value: float) -> bool:
        enough = self.low < value if self.above else self.low <= value
        return enough and (value <= self.high if self.whole else value < self.high)

    def describe(self, value: float) -> str:
        """The side of the range that a value misses; both where it has an upper end of its own."""
        if self.high == MANY:
            return f"less than {MANY:,}" if MANY <= value < math.inf else f"{self.low:g} or more"
        if self.low == -math.inf:
            return "a number"
        if self.high < math.inf:
            start = f"above {self.low:g} and" if self.above else f"from {self.low:,g} to"
            return f"a number {start} {'at most' if self.whole else 'below'} {self.high:,.0f}"
        return f"a number above {self.low:g}" if self.above else f"{self.low:g} or more"


MANY = 10**15  # of anything that is counted
POSITIVE, NOT_NEGATIVE, ONE_OR_MORE = Range(0, above=True), Range(0), Range(1, MANY)
BELOW_ONE, BETWEEN_0_AND_1 = Range(0, 1), Range(0, 1, above=True)
SEED = Range(1, 2**31)  # Megatron takes none below 1

RANGES: dict[str, Range] = {
    **dict.fromkeys(("learning_rate", "temperature", "tolerance", "rms_norm_eps", "rope_theta", "weight"), POSITIVE),
    **dict.fromkeys(("warmup_steps", "weight_decay", "gradient_clip", "min_learning_rate"), NOT_NEGATIVE),
    **dict.fromkeys(("kd_weight", "ce_weight", "alpha", "first_step", "start", "end"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "momentum"), BELOW_ONE),
    **dict.fromkeys(("student_layer", "teacher_layer"), Range(-math.inf)),  # validation/signals.py knows the models
    **dict.fromkeys(("validation_fraction", "test_fraction", "calibration_fraction"), BELOW_ONE),
    **dict.fromkeys(("processes", "tensor", "pipeline", "context", "workers", "part", "parts"), ONE_OR_MORE),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), ONE_OR_MORE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), ONE_OR_MORE),
    **dict.fromkeys(("max_position_embeddings", "sequence_length", "batches", "micro_batches"), ONE_OR_MORE),
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "steps", "validation_interval"), ONE_OR_MORE),
    **dict.fromkeys(("validation_batches", "checkpoint_interval", "keep_checkpoints", "log_interval"), ONE_OR_MORE),
    "network_bytes_per_second": ONE_OR_MORE,
    **dict.fromkeys(("calibration_samples", "new_tokens", "tokenizer_sample_bytes", "top_k"), ONE_OR_MORE),
    **dict.fromkeys(("student_hidden", "teacher_hidden", "rounds", "tokens", "vocabularies"), ONE_OR_MORE),
    **dict.fromkeys(("micro_batch_sizes", "scoring_micro_batch_sizes", "scoring_batches"), ONE_OR_MORE),
    "warmup": NOT_NEGATIVE,
    **dict.fromkeys(("skip_steps", "keep_best"), NOT_NEGATIVE),
    "spike": Range(1, above=True),
    "step": ONE_OR_MORE,
    **dict.fromkeys(("limit_bytes", "document_bytes", "tokenizer_vocab_size", "rank"), ONE_OR_MORE),
    **dict.fromkeys(("divergence_parameter", "gradient_filter"), BETWEEN_0_AND_1),
    **dict.fromkeys(("parameters", "bytes_per_gpu", "seconds", "tokens_per_second"), POSITIVE),
    **dict.fromkeys(("ratio", "smallest", "share_of_peak", "top_p"), Range(0, 1, above=True, whole=True)),
    **dict.fromkeys(("depth_samples", "measured", "candidates", "sequences", "layer", "layers"), ONE_OR_MORE),
    **dict.fromkeys(("hidden", "indices", "random_seed", "distil_tokens"), NOT_NEGATIVE),
    **dict.fromkeys(("nodes", "processes_per_node", "warning_seconds", "grace_seconds"), ONE_OR_MORE),
    **dict.fromkeys(("gpus_per_node", "restarts"), NOT_NEGATIVE),
    **dict.fromkeys(("shard_bytes", "batch_sizes", "prompt_tokens", "threads"), ONE_OR_MORE),
    "preflight_seconds": ONE_OR_MORE,
    "bandwidth_bytes": ONE_OR_MORE,
    **dict.fromkeys(("above", "below"), Range(-math.inf)),  # of figures of any sign
    **dict.fromkeys(("limit", "questions"), ONE_OR_MORE),
    **dict.fromkeys(("bytes", "loss_below"), POSITIVE),
    "long_context": ONE_OR_MORE,
    "count": NOT_NEGATIVE,
    "seed": SEED,
}


def check(config: Config) -> None:
    """Raises UserError for the first number that is out of its range, infinite or not a number."""
    for setting, value in numbers(config):
        allowed = RANGES.get(setting.rpartition(".")[2])
        if not math.isfinite(value):
            expected = allowed.describe(value) if allowed else "a number"
            remedy = "Give a finite number."
        elif allowed is None or allowed.holds(value):
            continue
        else:
            expected, remedy = allowed.describe(value), "Lower it." if value >= allowed.high else "Raise it."
        raise UserError(f"{setting}: expected {expected}, found {value}. {remedy}")


def numbers(settings: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(dotted path, value) of every number in the settings, lists of groups included."""
    for name, value in vars(settings).items():
        if is_dataclass(value):
            yield from numbers(value, f"{path}{name}.")
        elif isinstance(value, list):
            for place, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from numbers(entry, f"{path}{name}[{place}].")
                elif isinstance(entry, int | float) and not isinstance(entry, bool):
                    yield path + name, entry
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path + name, value
