"""What is to be exported: that quantized forms can be made here, and held to the models that were evaluated."""

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any

from pipelines import artifacts, elsewhere
from pipelines.config import Config, document_mask, expect, layout
from pipelines.evaluation_settings import WINDOWS


def check(config: Config, stages: Collection[str]) -> None:
    methods = [method.value for method in config.export.quantize]
    twice = sorted({name for name in methods if methods.count(name) > 1})
    expect(not twice, "export.quantize", "each form once", f"{', '.join(twice)} twice", "Leave one out.")
    if methods and "export" in stages:
        there = elsewhere.in_image() or importlib.util.find_spec("compressed_tensors") is not None
        remedy = "pip install 'stillhouse[quantize]', or leave export.quantize out."
        expect(there, "export.quantize", "the library compressed-tensors", "none installed", remedy)
        _check_windows(config, stages)


def _check_windows(config: Config, stages: Collection[str]) -> None:
    """Quantized forms are scored on the windows of the evaluation that has finished, or nothing could compare them."""
    evaluation = artifacts.stage_directory(config, "evaluate")
    if "evaluate" in stages or config.export.step or not artifacts.is_complete(evaluation):
        return
    manifest = artifacts.read_manifest(evaluation)
    then, made = manifest.get("settings", {}), f"with which the evaluation in {evaluation} was made"
    remedy = (
        "Quantized forms are held to the models of the evaluation on its windows. Give the same, or run "
        "stage=[evaluate,export] overwrite=true."
    )
    now = {f"evaluate.{name}": getattr(config.evaluate, name) for name in (*WINDOWS, "batches")}
    now |= {"evaluate.document_mask": document_mask(config, "evaluate")}
    was = dict(then)
    if (apart := _document_mask(was)) is not None:
        was["evaluate.document_mask"] = apart
    else:
        del now["evaluate.document_mask"]
    if None not in (now["evaluate.batches"], was.get("evaluate.batches")):
        del now["evaluate.batches"]  # the windows that they come to count
        _check_batches(config, manifest, made, remedy)
    for setting, given in now.items():
        told = f"{_plain(was.get(setting))}, {made}"
        expect(setting not in was or given == was[setting], setting, told, _plain(given), remedy)


def _check_batches(config: Config, manifest: dict[str, Any], made: str, remedy: str) -> None:
    """Each data-parallel rank takes so many micro batches of its own."""
    settings, ranks = config.evaluate, layout(config.parallel)
    assert settings.batches is not None
    mine = (settings.batches, settings.micro_batch_size, ranks.data * ranks.context)
    then, there = manifest["settings"], manifest.get("layout", {})
    rows = there["data"] * there["context"] if there else mine[2]
    theirs = (then["evaluate.batches"], then.get("evaluate.micro_batch_size", mine[1]), rows)
    if mine[2] != rows:
        remedy += f" The layouts differ, in which evaluate.batches counts for each data-parallel rank: {rows} there."
    told = ["{} micro batches of {} on each of {} data-parallel ranks".format(*one) for one in (theirs, mine)]
    expect(prod(mine) == prod(theirs), "evaluate.batches", f"{told[0]}, {made}", told[1], remedy)


def _document_mask(settings: Mapping[str, Any]) -> bool | None:
    """Whether an evaluation kept documents apart, by the settings in its manifest; None where they do not tell."""
    own = settings.get("evaluate.document_mask")
    return settings.get("distil.document_mask") if own is None else own


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def warnings(config: Config, stages: Collection[str]) -> Iterator[str]:
    if "export" in stages and config.export.quantize_teacher and not config.export.quantize:
        yield "export.quantize_teacher=true has no effect without export.quantize"
