"""What is to be exported: that quantized forms can be made here, and held to the models that were evaluated."""

import importlib.util
from collections.abc import Collection, Iterator

from pipelines import artifacts, elsewhere
from pipelines.config import Config, expect


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
    then = artifacts.read_manifest(evaluation).get("settings", {})
    names = ["split", "sequence_length", "batches"] + ["micro_batch_size"] * (config.evaluate.batches is not None)
    for name in names:
        setting, given = f"evaluate.{name}", getattr(config.evaluate, name)
        told = "null" if then.get(setting) is None else then[setting]
        remedy = (
            "Quantized forms are held to the models of the evaluation on its windows. Give the same, or run "
            "stage=[evaluate,export] overwrite=true."
        )
        expected = f"{told}, with which the evaluation in {evaluation} was made"
        expect(setting not in then or given == then[setting], setting, expected, given, remedy)


def warnings(config: Config, stages: Collection[str]) -> Iterator[str]:
    if "export" in stages and config.export.quantize_teacher and not config.export.quantize:
        yield "export.quantize_teacher=true has no effect without export.quantize"
