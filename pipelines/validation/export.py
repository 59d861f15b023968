"""What is to be exported: that quantized forms can be made here."""

import importlib.util
from collections.abc import Collection, Iterator

from pipelines import elsewhere
from pipelines.config import Config, expect


def check(config: Config, stages: Collection[str]) -> None:
    methods = [method.value for method in config.export.quantize]
    twice = sorted({name for name in methods if methods.count(name) > 1})
    expect(not twice, "export.quantize", "each form once", f"{', '.join(twice)} twice", "Leave one out.")
    if methods and "export" in stages:
        there = elsewhere.in_image() or importlib.util.find_spec("compressed_tensors") is not None
        remedy = "pip install 'stillhouse[quantize]', or leave export.quantize out."
        expect(there, "export.quantize", "the library compressed-tensors", "none installed", remedy)


def warnings(config: Config, stages: Collection[str]) -> Iterator[str]:
    if "export" in stages and config.export.quantize_teacher and not config.export.quantize:
        yield "export.quantize_teacher=true has no effect without export.quantize"
