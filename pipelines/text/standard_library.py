"""The built-in corpus: the running Python's standard library, which every machine has.

Sources of its modules, the topics of its built-in help, and the docstrings of its compiled modules (whose sources are
in C). Left out: test suites and `encodings`, whose tables are no text. About 11 MB for CPython 3.11.
"""

import importlib
import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pipelines.config import UserError

LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def files() -> list[Path]:
    """The source files, sorted by their path below the library."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts) and p.is_file()]
    if not found:
        raise UserError(
            f"data.sources kind=standard_library: expected Python's own sources in {root}, found none. "
            "Give another source, e.g. 'data.sources=[{path: corpus.jsonl}]'."
        )
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def read(path: Path) -> str:
    """A source file's text by its own declared encoding, line ends as \\n."""
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
    return path.read_text(encoding=encoding)


def documentation() -> Iterator[str]:
    """One document per help topic and per compiled-in module, in the order of their names."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield topics[topic]
    for name in sorted(sys.builtin_module_names):
        try:
            module = importlib.import_module(name)
        except ImportError:  # a name that this build lists but cannot start
            continue
        text = _module_text(module)
        if text:
            yield text


def _module_text(module: ModuleType) -> str:
    out = io.StringIO()
    if module.__doc__:
        out.write(f"{module.__name__}\n\n{module.__doc__}\n")
    for name in sorted(vars(module)):
        value = vars(module)[name]
        if not (callable(value) and isinstance(getattr(value, "__doc__", None), str)):
            continue
        out.write(f"\n{name}{getattr(value, '__text_signature__', None) or ''}\n\n{value.__doc__}\n")
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member in sorted(vars(value)):
                text = getattr(vars(value)[member], "__doc__", None)
                if not member.startswith("__") and isinstance(text, str):
                    out.write(f"\n{name}.{member}\n\n{text}\n")
    return out.getvalue()
