"""Where documents that share a row can be kept apart (document_mask)."""

from collections.abc import Collection, Iterator

from pipelines import elsewhere
from pipelines.config import Config, Layout, Precision, TeacherPrecision, document_mask, expect, teacher_precision
from pipelines.signals import across_tokens
from pipelines.validation.training import trainings


def check(config: Config, stages: Collection[str], ranks: Layout) -> None:
    for name, training in trainings(config, stages):
        remedy = "Each document would have to be cut over the ranks: set it to false, or parallel.context=1."
        expected = f"false with parallel.context={ranks.context}"
        expect(ranks.context == 1 or not training.document_mask, f"{name}.document_mask", expected, "true", remedy)
    distil = config.distil
    if "distil" in stages and distil.document_mask:
        across = across_tokens(distil.hidden, distil.attention)
        expected = "false with losses on attention or relations, which compare all tokens of a row"
        expect(not across, "distil.document_mask", expected, "true", "Set it to false, or leave those losses out.")
    prune = config.prune
    if "prune" in stages and prune.document_mask:
        expected, remedy = "1 with prune.document_mask=true", "Set it to 1: documents apart are scored row by row."
        expect(prune.micro_batch_size == 1, "prune.micro_batch_size", expected, prune.micro_batch_size, remedy)
    if ranks.device == "cuda" and elsewhere.installed("transformer_engine"):
        _check_transformer_engine(config, stages)


def _check_transformer_engine(config: Config, stages: Collection[str]) -> None:
    """Its attention over documents apart ("thd") has kernels for half precision alone, and for plain head sizes."""
    for setting, precision in _precisions(config, stages):
        name = setting.split(".")[0]
        if document_mask(config, name):
            expected = f"bf16 with {name}.document_mask=true and Transformer Engine"
            remedy = f"Set it to bf16, or {name}.document_mask=false."
            expect(precision.value != "fp32", setting, expected, precision.value, remedy)
    refused = "verify" in stages and config.verify.document_mask
    remedy = "Verify it on the CPU: parallel.device=cpu."
    expect(not refused, "verify.document_mask", "false with Transformer Engine, which has it in bf16", "true", remedy)


def _precisions(config: Config, stages: Collection[str]) -> Iterator[tuple[str, Precision | TeacherPrecision]]:
    for name, training in trainings(config, stages):
        yield f"{name}.precision", training.precision
    if "distil" in stages:
        yield "distil.teacher_precision", teacher_precision(config.distil)
    if "prune" in stages:
        yield "prune.precision", config.prune.precision
    if "evaluate" in stages:
        yield "evaluate.precision", config.evaluate.precision or config.distil.precision
