"""Models and data sets from the Hugging Face hub, on a machine with network: what every other stage then reads offline.

Each goes into a directory of its own, <fetch.directory>/models/<owner>/<name> or .../datasets/..., which takes its name
once it is whole and checked: every file has the size and hash that the hub tells, and a model's headers fit its
config.json. Beside them lies fetched.json: the repository, the revision that was asked for, the commit that it stood
for, the licence. A directory that is there stays at its commit. Weights that are no safetensors (pickles) are not
fetched.
"""

import datetime
import fnmatch
import hashlib
import ipaddress
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines import artifacts, console, files, quota
from pipelines.config import FetchConfig, UserError
from pipelines.evaluation import harness
from pipelines.families import read_shape
from pipelines.safetensors_header import check_model

RECORD = "fetched.json"
# Of a model's repository, at its top: config.json, weights, tokenizer, licence.
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
NOT_OF_A_MODEL = ("consolidated*",)  # the same weights once more, in another layout
ATTEMPTS = 5  # at a file whose connection breaks; each goes on where the last one stopped


@dataclass(frozen=True)
class File:
    """As the hub lists it. sha256: of a large file; git: the id of a small one, git's sha1 of "blob <size>" and it."""

    name: str
    size: int
    sha256: str | None
    git: str | None


@dataclass(frozen=True)
class Repository:
    """kind: "model" or "dataset". revision: what was asked for. commit: what it stands for."""

    kind: str
    name: str
    revision: str
    commit: str
    license: str
    gated: bool
    files: tuple[File, ...]


def run(context: artifacts.StageContext) -> dict[str, Any]:
    settings = context.config.fetch
    # huggingface_hub reads these when it is imported. This is the one stage that is meant to use the network. Its own
    # protocol for large files starts anew after a break; plain HTTP continues.
    os.environ["HF_HUB_OFFLINE"] = "0"
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    refuse_a_token_in_the_clear()
    root, fetched = Path(settings.directory), {}
    for kind, names in (("model", settings.models), ("dataset", settings.datasets)):
        for text in names:
            name, _, revision = text.partition("@")
            target = root / f"{kind}s" / name
            fetched[name] = fetch(kind, name, revision or "main", target, settings, context.config.overwrite)
    if settings.tasks:
        _ask_for_tasks(settings.tasks)
        for task, repositories in harness.download(settings.tasks, root / "tasks").items():
            console.say(f"fetch  task {task}: {', '.join(repositories)}, in {root / 'tasks'}")
            fetched[task] = {"kind": "task", "repositories": repositories}
    return fetched


def _ask_for_tasks(names: list[str]) -> None:
    """One question to the hub, before the library datasets asks many times and waits in between. Raises UserError."""
    from huggingface_hub import HfApi

    harness.version()
    console.say(f"fetch  tasks {', '.join(names)}: looking into the harness's list")
    described = harness.described([harness.Task(name, name) for name in names])
    data = [repository for row in described for repository in row["data"] if "/" in repository]
    if data:
        console.say(f"fetch  asking {_endpoint()} for {', '.join(data[:5])}{' and more' * (len(data) > 5)}")
        api = HfApi(endpoint=_endpoint())
        _asked("dataset", data[0], "main", lambda: api.repo_info(data[0], repo_type="dataset"), setting="fetch.tasks")


def fetch(
    kind: str, name: str, revision: str, target: Path, settings: FetchConfig, overwrite: bool = False
) -> dict[str, Any]:
    """One repository into `target`; what is recorded of it. Raises UserError where the hub refuses or the network
    ends."""
    record, wanted = target / RECORD, None if kind == "model" else sorted(settings.files)
    if record.is_file() and not overwrite:
        known = files.read_object(record, "Remove the directory, or give overwrite=true.")
        if revision not in (known["revision"], known["commit"]):
            raise UserError(
                f"{target}: expected {revision}, found {known['revision']} at commit {known['commit']}. Give "
                "overwrite=true to fetch it again, or another fetch.directory."
            )
        if known.get("patterns") != wanted:
            raise UserError(
                f"{target}: expected files by {wanted}, found those by {known.get('patterns')}. Give overwrite=true to "
                "fetch it anew, or another fetch.directory."
            )
        console.say(f"fetch  {name}: there already, at commit {known['commit'][:12]}, in {target}")
        return known
    if target.exists() and not record.is_file():
        raise UserError(
            f"{target}: expected nothing, or what an earlier stage=fetch left, found a directory without {RECORD}. "
            "Move it away, or choose another fetch.directory."
        )
    found = listed(kind, name, revision, settings.files)
    building = target.with_name(target.name + ".partial")
    _make_room(building, found)
    size = sum(file.size for file in found.files)
    terms = f"{'gated, ' if found.gated else ''}licence {found.license}"
    console.say(f"fetch  {name} at {found.commit[:12]}: {len(found.files)} files, {size / 1e9:,.2f} GB, {terms}")
    _download(found, building, settings.workers)
    if kind == "model":
        check_model(building, read_shape(building))
    known = {
        "repository": name,
        "kind": kind,
        "revision": revision,
        "patterns": wanted,
        "commit": found.commit,
        "license": found.license,
        "gated": found.gated,
        "date": datetime.date.today().isoformat(),
        "bytes": size,
        "files": {file.name: file.sha256 or f"git:{file.git}" for file in found.files},
    }
    files.write_json(building / RECORD, known)
    _put_in_place(building, target)
    console.say(f"fetch  {name}: {target}")
    return known


def listed(kind: str, name: str, revision: str, patterns: Iterable[str]) -> Repository:
    """What the hub has under a name, of the files that are wanted. Raises UserError."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    info = _asked(
        kind, name, revision, lambda: api.repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    )
    everything = [_file(sibling) for sibling in info.siblings or []]
    if kind == "model":
        wanted = [f for f in everything if "/" not in f.name and _matches(f.name, MODEL_FILES)]
        wanted = [file for file in wanted if not _matches(file.name, NOT_OF_A_MODEL)]
        if not any(file.name.endswith(".safetensors") for file in wanted):
            names = ", ".join(file.name for file in everything)[:300]
            raise UserError(
                f"fetch.models: expected {name} to have *.safetensors, found {names}. "
                "Weights as pickles are not fetched: choose a revision or a copy of the model with safetensors."
            )
    else:
        wanted = [file for file in everything if _matches(file.name, patterns)]
        if not wanted:
            some = ", ".join(file.name for file in everything[:5])
            raise UserError(
                f"fetch.files: expected patterns that name files of {name}, found that {', '.join(patterns)} match "
                f"none of {len(everything)}, such as {some}. Change fetch.files."
            )
    for file in wanted:
        if file.name.startswith("/") or ".." in Path(file.name).parts:
            raise UserError(
                f"{name}: expected names of files inside the repository, found {file.name!r}. Do not use it."
            )
    commit = str(info.sha)
    return Repository(kind, name, revision, commit, _license(info), bool(info.gated), tuple(wanted))


def _file(sibling: Any) -> File:
    sha256 = sibling.lfs["sha256"] if sibling.lfs else None
    return File(sibling.rfilename, int(sibling.size or 0), sha256, sibling.blob_id)


def _license(info: Any) -> str:
    """The licence field of the repository's card, or its tag."""
    card = dict(info.card_data.to_dict()) if info.card_data else {}
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    tags = [tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")]
    return str(named or card.get("license") or (tags[0] if tags else "not stated"))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _make_room(building: Path, found: Repository) -> None:
    """Raises UserError where what is still to come does not fit on the disk or into the user's quota.

    What an attempt at another commit or for other files left is removed.
    """
    building.mkdir(parents=True, exist_ok=True)
    wanted = {building / file.name for file in found.files}
    for path in building.rglob("*"):
        if path.is_file() and path not in wanted and ".cache" not in path.relative_to(building).parts:
            path.unlink()
    here = sum(file.stat().st_size for file in building.rglob("*") if file.is_file())
    needed, room = sum(file.size for file in found.files) - here, quota.room(building)
    if needed > room.least:
        raise UserError(
            f"{building.parent}: expected {needed:,} bytes of room for {found.name}, found {room.least:,}. Free some, "
            "or set fetch.directory to another disk."
        )


def _download(found: Repository, building: Path, workers: int) -> None:
    """Every file of the repository, whole and checked. What an earlier attempt left is used as far as it is right."""
    stop = threading.Event()
    with (
        console.progress(f"fetch  {found.name}", sum(file.size for file in found.files) or None, "bytes") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        waiting = [pool.submit(_one, found, file, building, stop) for file in found.files]
        try:
            for file, done in zip(found.files, waiting, strict=True):
                done.result()
                bar.advance(file.size)
        except BaseException:
            stop.set()  # the others end before their next file
            raise


def _one(found: Repository, file: File, building: Path, stop: threading.Event) -> None:
    """One file: fetched in as many attempts as it takes, each from where the last one stopped, then hashed."""
    from huggingface_hub import hf_hub_download
    from requests.exceptions import RequestException

    where = {"repo_type": found.kind, "revision": found.commit, "local_dir": building, "endpoint": _endpoint()}
    download = partial(hf_hub_download, found.name, file.name, **where)
    for attempt in range(ATTEMPTS):
        if stop.is_set():
            return
        try:
            _asked(found.kind, found.name, found.revision, download, retried=attempt + 1 < ATTEMPTS)
            break
        except (_Broken, RequestException):
            stop.wait(2.0**attempt / 4)
    if not is_whole(file, building / file.name):
        (building / file.name).unlink(missing_ok=True)
        raise UserError(
            f"{found.name}: expected {file.name} with the hash that the hub tells, found other bytes; they are "
            "removed. Start the same command again."
        )


def _endpoint() -> str:
    """The hub, or the mirror that the environment names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def refuse_a_token_in_the_clear() -> None:
    """Raises UserError where huggingface_hub would send a token without encryption over a network."""
    from huggingface_hub import constants, get_token

    address = urlsplit(_endpoint())
    if address.scheme == "https" or _is_this_machine(address.hostname or ""):
        return
    if get_token() and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        raise UserError(
            f"HF_ENDPOINT: expected https:// where a token is sent, found {address.scheme or 'no scheme'} to "
            f"{address.hostname}: everybody on the way could read the token. Use https, or set "
            "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send none."
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Broken(Exception):
    """A connection that ended; the next attempt may get further."""


def _asked(
    kind: str, name: str, revision: str, request: Callable[[], Any], retried: bool = False, setting: str = ""
) -> Any:
    """The hub's answer. setting: that names the repository. Raises UserError with what it refuses and why, and _Broken
    for what is worth another attempt."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub
    from requests.exceptions import RequestException

    where = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{name}"
    where = re.sub(r"//[^/@]*@", "//", where)
    setting = setting or f"fetch.{kind}s"
    token = "with the token of HF_TOKEN or of hf auth login" if get_token() else "without a token"
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        token = "without a token, as HF_HUB_DISABLE_IMPLICIT_TOKEN=1 asks"
    try:
        return request()
    except hub.GatedRepoError:
        raise UserError(
            f"{setting}: expected access to {name}, found that it is gated, {token}. Accept its licence at {where} and "
            "set HF_TOKEN, or run hf auth login, with a token of that account."
        ) from None
    except hub.RevisionNotFoundError:
        raise UserError(
            f"{setting}: expected a branch, tag or commit of {name}, found no {revision}. See {where}/tree/main."
        ) from None
    except hub.RepositoryNotFoundError:
        raise UserError(
            f"{setting}: expected {name} on the hub, found none, {token}. Check its spelling at {where}; for a "
            "private one set HF_TOKEN."
        ) from None
    except (RequestException, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{setting}: expected access to {name}, found {status} from {where}, {token}. Set HF_TOKEN to a "
                "token that may read it."
            ) from None
        if files.is_disk_error(error):
            raise
        if retried:
            raise _Broken from None
        cause = f"status {status}" if status else type(error.__cause__ or error).__name__
        raise UserError(
            f"{setting}: expected an answer from {where}, found {cause}. Run stage=fetch where there is network, "
            "such as a login node; the same command continues."
        ) from None


def is_whole(file: File, path: Path) -> bool:
    """Whether a file on disk has the size and the hash that the hub tells of it."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is None and file.git is None:
        return True
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == (file.sha256 or file.git)


def _put_in_place(building: Path, target: Path) -> None:
    """The directory under its name, every file on the disk, without what the downloads needed."""
    shutil.rmtree(building / ".cache", ignore_errors=True)
    files.sync_files(path for path in building.rglob("*") if path.is_file())
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    building.rename(target)
    files.sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
