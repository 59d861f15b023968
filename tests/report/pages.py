"""A report page as the tests read it: its elements, its text, and the files beside it."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipelines.artifacts import StageContext
from pipelines.config import Config
from pipelines.stages import report

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """Elements, their attributes and the text of a page; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


def make(root: Path, name: str = "quickstart", **changes: Any) -> tuple[Page, dict[str, Any], Path]:
    """Run the report stage on root/name: (page, results.json, directory)."""
    config = Config()
    config.run.directory, config.run.name = str(root), name
    for key, value in changes.items():
        group, setting = key.split("__")
        setattr(getattr(config, group), setting, value)
    directory = root / name / "report"
    directory.mkdir(parents=True)
    report.run(StageContext(config, "report", directory))
    results = json.loads((directory / "results.json").read_text())
    return Page((directory / "index.html").read_text()), results, directory
