"""What runs in the ranks of test_verify.py: the verify stage, as it is and with a defect planted in what it checks."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import artifacts
from pipelines.config import Config, Divergence, ParallelConfig, UserError
from pipelines.core import linear_divergence, loss, vocab_parallel
from pipelines.model import documents, layers, pair, signals, step
from pipelines.signals import AttentionKind, AttentionLossConfig, Heads, HiddenKind, HiddenLossConfig
from pipelines.stages import verify


def run(
    directory: str,
    defect: str = "",
    distributed_optimizer: bool = False,
    loss: dict[str, Any] | None = None,
    document_mask: bool = False,
    features: bool = False,
    **layout: Any,
) -> dict[str, Any]:
    """{"figures", "printed", "error"}: what the stage returned, printed on this rank, and its UserError if any."""
    config = Config(stage="verify", parallel=ParallelConfig(**layout))
    config.distil.distributed_optimizer = distributed_optimizer
    config.verify.sequence_length, config.verify.document_mask = 16, document_mask
    if features:
        config.distil.hidden = [
            HiddenLossConfig(1, 1, kind=HiddenKind.mse, weight=0.7),
            HiddenLossConfig(1, 1, kind=HiddenKind.cosine, rank=64),
            HiddenLossConfig(1, 1, kind=HiddenKind.relational, weight=1.5),
        ]
        config.distil.attention = [
            AttentionLossConfig(1, 1, kind=AttentionKind.kl, heads=Heads.each),
            AttentionLossConfig(1, 1, kind=AttentionKind.scores, weight=0.4),
        ]
    for name, value in (loss or {}).items():
        setattr(config.verify, name, Divergence(value) if name == "divergence" else value)
    printed, figures, error = io.StringIO(), {}, ""
    with contextlib.redirect_stdout(printed), DEFECTS[defect]():
        try:
            figures = verify.run(artifacts.StageContext(config, "verify", Path(directory)))
        except UserError as failure:
            error = str(failure)
    return {"figures": figures, "printed": printed.getvalue(), "error": error}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def gradients_times_tp() -> contextlib.AbstractContextManager[None]:
    """What autograd through an all-reduce of an already replicated loss does."""
    backward = linear_divergence._LinearDivergence.backward

    def scaled(ctx: Any, *upstream: Any) -> Any:
        hidden, *others = backward(ctx, *upstream)
        return 2 * hidden, *others

    return _replaced(linear_divergence._LinearDivergence, "backward", staticmethod(scaled))


def missing_temperature_squared() -> contextlib.AbstractContextManager[None]:
    return _replaced(loss.LossWeights, "kd_scale", property(lambda self: self.kd))


def local_normalization() -> contextlib.AbstractContextManager[None]:
    """Each micro batch's own mean, then the mean of those."""
    loss_function = step.loss_function

    def averaged(batch: step.Batch, terms: dict[str, Tensor]) -> step.Loss:
        total, count, report = loss_function(batch, terms)
        return total / count, torch.ones_like(count), report

    return _replaced(step, "loss_function", averaged)


def unmasked_padding() -> contextlib.AbstractContextManager[None]:
    return _replaced(vocab_parallel.Shard, "valid_width", lambda self, width: width)


def shifted_label() -> contextlib.AbstractContextManager[None]:
    """The next-token shift made once more inside the model."""
    terms = pair.DistillationPair._terms

    def shifted(self: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, loss_mask: Tensor) -> Any:
        return terms(self, student, teacher, labels.roll(-1, dims=1), loss_mask)

    return _replaced(pair.DistillationPair, "_terms", shifted)


def unreduced_gradients() -> contextlib.AbstractContextManager[None]:
    """Gradient finalization that divides but reduces over nothing."""

    def divided(model: list[Any], num_tokens: Tensor, **_: Any) -> None:
        model[0].scale_gradients(1.0 / num_tokens.item())

    return _replaced(step, "finalize_model_grads", divided)


def unsummed_projections() -> contextlib.AbstractContextManager[None]:
    """Under sequence parallelism each rank keeps the gradient of its own tokens."""
    build = signals.build_projections

    def unmarked(*arguments: Any, **keywords: Any) -> torch.nn.ModuleDict:
        projections = build(*arguments, **keywords)
        for parameter in projections.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
        return projections

    return _replaced(signals, "build_projections", unmarked)


def losses_not_carried() -> contextlib.AbstractContextManager[None]:
    """Losses inside the models are reported and have no gradient."""
    carry = signals.FeatureLosses.carry

    def dropped(self: Any, output: Tensor, found: dict[str, Tensor]) -> Tensor:
        carry(self, output, found)
        return output

    return _replaced(signals.FeatureLosses, "carry", dropped)


def nan_gradient() -> contextlib.AbstractContextManager[None]:
    backward = linear_divergence._LinearDivergence.backward

    def spoiled(ctx: Any, upstream: Tensor, *others: Any) -> Any:
        return backward(ctx, upstream * torch.nan, *others)

    return _replaced(linear_divergence._LinearDivergence, "backward", staticmethod(spoiled))


def attention_across_documents() -> contextlib.AbstractContextManager[None]:
    forward = layers.CausalAttention.forward

    def whole(self: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **_: Any) -> Tensor:
        return forward(self, *(t.unsqueeze(1) for t in (query, key, value)))

    return _replaced(layers.CausalAttention, "forward", whole)


def counted_end_of_document() -> contextlib.AbstractContextManager[None]:
    """The first token of the next document as a label."""
    found = documents.separated

    def counted(batch: step.Batch, end_of_document: int) -> step.Batch:
        return found(batch, end_of_document) | {"loss_mask": batch["loss_mask"].reshape(1, -1)}

    return _replaced(verify, "separated", counted)


DEFECTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "gradients_times_tp": gradients_times_tp,
    "missing_temperature_squared": missing_temperature_squared,
    "local_normalization": local_normalization,
    "unmasked_padding": unmasked_padding,
    "shifted_label": shifted_label,
    "unreduced_gradients": unreduced_gradients,
    "nan_gradient": nan_gradient,
    "attention_across_documents": attention_across_documents,
    "counted_end_of_document": counted_end_of_document,
    "unsummed_projections": unsummed_projections,
    "losses_not_carried": losses_not_carried,
}
