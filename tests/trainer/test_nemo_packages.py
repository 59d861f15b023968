"""Packages that run their __init__ on demand, on a package of the test's own."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.trainer import nemo_packages

FILES = {
    "stand_in/__init__.py": "import stand_in.heavy\nfrom stand_in.inner import of_inner\nRUN = True\n",
    "stand_in/heavy.py": "",
    "stand_in/inner/__init__.py": "import stand_in\nfrom stand_in.inner.light import VALUE as of_inner\n",
    "stand_in/inner/light.py": "VALUE = 3\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "stand_in" / "inner").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nemo_packages, "PACKAGES", ("stand_in", "stand_in.inner"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    nemo_packages.install()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "stand_in"]:
        del sys.modules[name]


def test_a_submodule_comes_without_the_packages_above_it(package: None) -> None:
    assert importlib.import_module("stand_in.inner.light").VALUE == 3
    from stand_in import inner  # type: ignore[import-not-found]

    assert inner.light.VALUE == 3 and "stand_in.heavy" not in sys.modules and "RUN" not in vars(sys.modules["stand_in"])


def test_a_name_that_is_no_submodule_runs_the_init_once(package: None) -> None:
    package_itself = importlib.import_module("stand_in")
    assert "stand_in.heavy" not in sys.modules
    from stand_in import of_inner  # type: ignore[import-not-found]

    assert of_inner == 3 and package_itself.RUN and "stand_in.heavy" in sys.modules
    with pytest.raises(AttributeError, match="nowhere"):
        package_itself.nowhere  # noqa: B018
    package_itself.RUN = False
    assert package_itself.of_inner == 3 and not package_itself.RUN, "not run again"


def test_where_a_package_lies_and_its_source_are_known(package: None) -> None:
    import inspect

    found = importlib.import_module("stand_in.inner")
    assert found.__file__ and "of_inner" in inspect.getsource(found) and found.__path__


def test_a_second_install_changes_nothing(package: None) -> None:
    before = list(sys.meta_path)
    nemo_packages.install()
    assert sys.meta_path == before
