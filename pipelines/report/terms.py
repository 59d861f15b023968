"""Under what terms a student may be passed on: its teacher's, which it is derived from. What is stated, and what that
asks for; no legal advice. No torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path

CARRIED = ("licen[cs]e*", "notice*", "use_policy*")  # files of terms, in any case
IDENTIFIERS = (  # as Hugging Face's model cards know them
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "gemma"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
)


@dataclass(frozen=True)
class Terms:
    """licence: as stated; None: nothing is. files: that hold the terms. llama: of Meta's Llama licences, which one
    ("3.1"); None: another."""

    licence: str | None
    files: list[Path] = field(default_factory=list)
    llama: str | None = None

    @property
    def prefix(self) -> str:
        """What the name of a model that was made with it must begin with: Llama 3's community licences, section 1.b.i;
        Llama 2's asks for no name."""
        return {None: "", "2": "", "3": "Llama-3"}.get(self.llama, "Llama")

    @property
    def notice(self) -> str:
        """The line that section 1.b.iii of the Llama licences wants in a text file "Notice" of every copy."""
        if self.llama is None:
            return ""
        family = {"2": "Llama 2", "3": "Meta Llama 3"}.get(self.llama, f"Llama {self.llama}")
        agreement = {"2": "LLAMA 2"}.get(self.llama, family)
        copyright = "Copyright (c)" if self.llama == "2" else "Copyright ©"
        holder = f"{copyright} Meta Platforms, Inc. All Rights Reserved."
        return f"{family} is licensed under the {agreement} Community License, {holder}"

    def name(self, run: str) -> str:
        """A name for the model that keeps the rule of names."""
        if not self.prefix or run.lower().replace(" ", "-").startswith(self.prefix.lower()):
            return run
        return f"{self.prefix}-{run}"

    def asks(self) -> list[str]:
        """What whoever passes the student on has to do, a sentence each."""
        if self.licence is None:
            return ["No licence is stated in the teacher's directory: find out its terms, and set export.terms."]
        if self.llama is None:
            return []
        there = any(file.name.lower().startswith("licen") for file in self.files)
        found = [] if there else [f"Add a copy of the Llama {self.llama} licence: the teacher's directory has none."]
        if self.prefix:
            found.append(
                f'Pass it on with its licence and this NOTICE, show "Built with Llama" where you offer it, and let its '
                f'name begin with "{self.prefix.replace("-", " ")}" (section 1.b of the licence).'
            )
        return [*found, "Meta's acceptable use policy for Llama binds its users too."]


def read(teacher: Path, stated: str | None = None) -> Terms:
    """The terms of a teacher's directory. stated: the licence by the user's own word, before the one found there."""
    there = sorted(teacher.iterdir()) if teacher.is_dir() else []
    files = [path for path in there if path.is_file() and any(_matches(path.name, name) for name in CARRIED)]
    found = licence(teacher)
    # The teacher's own word decides what Meta asks for, whatever the student's card is to say.
    return Terms(stated or found, files, _llama(found or "") or _llama(stated or ""))


def licence(directory: Path) -> str | None:
    """The licence that a directory states: in its card's header, else a licence file's first line."""
    card = directory / "README.md"
    if card.is_file():
        header = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        stated = dict(re.findall(r"^(license(?:_name)?):[ \t]*(\S.*)$", header[1], re.MULTILINE)) if header else {}
        named, other = (stated.get(key, "").strip("\"' ") for key in ("license", "license_name"))
        if found := other if other and named in ("other", "") else named:
            return found
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        if (directory / name).is_file():
            lines = (directory / name).read_text(errors="replace").split("\n")
            return next((line.strip("# \t") for line in lines if line.strip()), name)
    return None


def header(terms: Terms) -> dict[str, str]:
    """What the head of a Hugging Face model card says of them."""
    if terms.licence is None:
        return {}
    if terms.licence.lower() in IDENTIFIERS:
        return {"license": terms.licence.lower()}
    file = next((file.name for file in terms.files if file.name.lower().startswith("licen")), None)
    return {"license": "other", "license_name": terms.licence} | ({"license_link": file} if file else {})


def _llama(words: str) -> str | None:
    """ "llama3.1", "Llama 3.1 Community License", "LLAMA 2 COMMUNITY LICENSE AGREEMENT" -> "3.1", "3.1", "2"."""
    found = re.search(r"llama[ _-]?(\d+(?:\.\d+)?)", words, re.IGNORECASE)
    return found[1] if found else None


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern.replace("*", ".*"), name, re.IGNORECASE) is not None
