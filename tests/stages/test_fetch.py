"""What stage=fetch gets from a stand-in of the hub: whole, checked, recorded, continued; what it refuses, in words."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import secrets
from pipelines.artifacts import StageContext
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.families import ModelShape, read_shape
from pipelines.model.random_model import write_random_model
from pipelines.processes import environment_outside_ranks
from pipelines.safetensors_header import check_model
from pipelines.stages import fetch as stage
from pipelines.validation import validate
from tests.stages.hub import COMMIT, TOKEN, Hub

NAME = "meta-llama/Tiny-3.1"
SHAPE = ModelShape(301, 32, 48, 2, 4, 2, 8)
PICKLES = {"pytorch_model.bin": b"\x80\x04.", "original/consolidated.00.pth": b"\x80\x04."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model's repository: several shards, and what is not to be fetched."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    write_random_model(directory, SHAPE, 1, "bfloat16", max_shard_bytes=40_000)
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert sum(name.endswith(".safetensors") for name in found) > 1
    return found | PICKLES | {"LICENSE": b"a licence", "tokenizer.json": b"{}", "consolidated.safetensors": b"twice"}


@pytest.fixture
def hub(model: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(NAME, dict(model)) as found:
        yield found


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub, which has read its environment already, as a new process would find it."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import reset_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setattr(stage, "ATTEMPTS", 3)
    reset_sessions()


def fetch(hub: Hub, tmp_path: Path, *overrides: str) -> str:
    """stage=fetch in this process; the message of a user's mistake, else nothing."""
    os.environ["HF_ENDPOINT"] = hub.address
    config = compose([f"fetch.{hub.kind}s=[{hub.name}]", f"fetch.directory={tmp_path / 'fetched'}", *overrides])
    validate(config, ["fetch"])
    try:
        stage.run(StageContext(config, "fetch", tmp_path / "runs"))
    except UserError as error:
        return str(error)
    return ""


def command(hub: Hub, tmp_path: Path, token: str | None = None) -> "subprocess.CompletedProcess[str]":
    """The real command, in an environment with HF_HUB_OFFLINE as make sets it."""
    whole = [sys.executable, "-m", "pipelines", "stage=fetch", f"fetch.{hub.kind}s=[{hub.name}]"]
    whole += [f"fetch.directory={tmp_path / 'fetched'}", f"run.directory={tmp_path / 'runs'}"]
    environment = environment_outside_ranks("HF_TOKEN")
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=120)


def written(directory: Path) -> str:
    """All that lies below a directory, as text."""
    return "".join(path.read_bytes().decode(errors="replace") for path in directory.rglob("*") if path.is_file())


def test_a_gated_model_is_fetched_with_the_user_s_token_and_the_token_is_written_nowhere(
    hub: Hub, tmp_path: Path, model: dict[str, bytes]
) -> None:
    hub.gated = True
    done = command(hub, tmp_path, token=TOKEN)
    assert done.returncode == 0, done.stderr
    target = tmp_path / "fetched" / "models" / NAME
    check_model(target, read_shape(target))
    names = {path.name for path in target.iterdir()}
    assert names == model.keys() - PICKLES.keys() - {"consolidated.safetensors"} | {"fetched.json"}
    assert all((target / name).read_bytes() == model[name] for name in names - {"fetched.json"})
    record = json.loads((target / "fetched.json").read_text())
    assert (record["revision"], record["commit"], record["license"], record["gated"]) == (
        *("main", COMMIT, "llama3.1"),
        True,
    )
    assert "gated, licence llama3.1" in done.stdout
    assert TOKEN not in done.stdout + done.stderr + written(tmp_path)


@pytest.mark.usefixtures("online")
def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(hub, tmp_path) == ""
    asked = dict(hub.asked)
    assert fetch(hub, tmp_path) == "" and "there already, at commit 0123456789ab" in capsys.readouterr().out
    assert hub.asked == asked
    other = fetch(hub, tmp_path, f"fetch.models=[{NAME}@v1]")
    assert "expected v1, found main" in other and "overwrite=true" in other


@pytest.mark.usefixtures("online")
def test_other_files_than_are_there_are_not_taken_for_them(tmp_path: Path) -> None:
    with Hub("open/corpus", {"a.jsonl": b"{}", "b.jsonl": b"{}"}, kind="dataset") as hub:
        assert fetch(hub, tmp_path, "fetch.files=[a*]") == "" == fetch(hub, tmp_path, "fetch.files=[a*]")
        other = fetch(hub, tmp_path, "fetch.files=[b*]")
    assert "expected files by ['b*'], found those by ['a*']" in other and "overwrite=true" in other


@pytest.mark.usefixtures("online")
def test_a_broken_connection_is_continued_where_it_broke(hub: Hub, tmp_path: Path, model: dict[str, bytes]) -> None:
    name = next(name for name in sorted(model) if "00001" in name)
    hub.cut = {name: 2}
    assert fetch(hub, tmp_path) == ""
    assert hub.ranges[0] == f"{name} {len(model[name]) // 2}", "the second answer begins where the first ended"
    assert (tmp_path / "fetched" / "models" / NAME / name).read_bytes() == model[name]


@pytest.mark.usefixtures("online")
def test_a_fetch_that_ends_is_continued_by_the_same_command(hub: Hub, tmp_path: Path, model: dict[str, bytes]) -> None:
    name = next(name for name in sorted(model) if "00001" in name)
    hub.cut = {name: 1000}
    assert "the same command continues" in fetch(hub, tmp_path)
    target = tmp_path / "fetched" / "models" / NAME
    assert not target.exists(), "what is not whole has not the model's name"
    hub.cut, before = {}, dict(hub.sent)
    assert fetch(hub, tmp_path) == "" and target.is_dir()
    assert all(hub.sent[other] == before[other] for other in before if other != name), "whole files stay"
    assert hub.sent[name] < len(model[name]) / 2
    assert not target.with_name(target.name + ".partial").exists() and not (target / ".cache").exists()


@pytest.mark.usefixtures("online")
def test_other_bytes_than_the_hub_tells_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = {"config.json"}
    assert "expected config.json with the hash that the hub tells" in fetch(hub, tmp_path)
    assert not (tmp_path / "fetched" / "models" / NAME).exists()


@pytest.mark.usefixtures("online")
def test_weights_that_do_not_fit_the_config_are_refused(hub: Hub, tmp_path: Path) -> None:
    config = json.loads(hub.files["config.json"]) | {"num_hidden_layers": 3}
    hub.files["config.json"] = json.dumps(config).encode()
    assert "expected the tensors that config.json describes, missing" in fetch(hub, tmp_path)


REFUSALS = {
    "gated": ("found that it is gated, without a token. Accept its licence at http://127.0.0.1", None),
    "gated_for_this_account": ("found that it is gated, with the token of HF_TOKEN", "hf_" + "x" * 36),
    "unknown": ("expected nobody/nothing on the hub, found none", None),
    "revision": ("found no v9", None),
    "pickles_only": ("Weights as pickles are not fetched", None),
}


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_told_in_words(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    sign, token = REFUSALS[case]
    hub.gated = case.startswith("gated")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if case == "pickles_only":
        hub.files = {"config.json": b"{}", **PICKLES}
    other = {"unknown": ["fetch.models=[nobody/nothing]"], "revision": [f"fetch.models=[{NAME}@v9]"]}
    found = fetch(hub, tmp_path, *other.get(case, []))
    assert sign in found and (token is None or token not in found)


def test_without_network_it_says_where_to_run_it(tmp_path: Path) -> None:
    """The real command; its message is one, without a traceback."""
    with Hub(NAME, {}) as gone:
        pass
    done = command(gone, tmp_path)
    assert done.returncode == 2 and "login node" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("address", "token", "refused"),
    [
        ("http://mirror.example", "hf_x", True),
        ("HTTP://10.0.0.7:8080", "hf_x", True),
        ("mirror.example", "hf_x", True),
        ("http://localhost.mirror.example", "hf_x", True),
        ("http://localhost:8080", "hf_x", False),
        ("http://127.0.0.1:8080", "hf_x", False),
        ("http://[::1]:8080", "hf_x", False),
        ("https://mirror.example", "hf_x", False),
        ("http://mirror.example", None, False),
    ],
)
@pytest.mark.usefixtures("online")
def test_a_token_is_sent_encrypted_or_not_at_all(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, token: str | None, refused: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(stage, "fetch", lambda kind, name, *rest: asked.append(name))
    monkeypatch.setattr(Hub, "address", address)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = fetch(hub, tmp_path)
    assert ("HF_ENDPOINT: expected https://" in message) is refused and "hf_x" not in message
    assert asked == ([] if refused else [hub.name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert not fetch(hub, tmp_path), "no token is sent then"


def test_a_refusal_says_that_no_token_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def request() -> None:
        error = OSError("refused")
        error.response = SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(UserError, match="found 401 .* without a token, as HF_HUB_DISABLE_IMPLICIT_TOKEN=1 asks"):
        stage._asked("model", NAME, "main", request)


@pytest.mark.usefixtures("online")
def test_a_data_set_s_files_are_chosen_by_pattern(tmp_path: Path) -> None:
    files = {"data/a.jsonl": b'{"text": "one"}\n', "data/b.jsonl": b"", "README.md": b"card", "load.py": b"import os"}
    with Hub("open/corpus", files, kind="dataset") as hub:
        assert fetch(hub, tmp_path, "fetch.files=['data/a*.jsonl']") == ""
        target = tmp_path / "fetched" / "datasets" / "open" / "corpus"
        found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
        assert found == ["data/a.jsonl", "fetched.json"]
        assert "match none of 4" in fetch(hub, tmp_path, "overwrite=true", "fetch.files=['*.arrow']")
        assert found[1] == "fetched.json" and (target / "data" / "a.jsonl").is_file(), "what was there stays"


SETTINGS = {
    "nothing": ([], "fetch.models: expected what to fetch"),
    "no_owner": (["fetch.models=[llama]"], "fetch.models[0]: expected owner/name"),
    "a_path": (["fetch.models=['../../etc/x']"], "fetch.models[0]: expected owner/name"),
    "twice": (["fetch.models=[a/b,a/b@v1]"], "fetch.models[1]: expected each name once"),
    "a_token": ([f"fetch.models=[a/b@{TOKEN}]"], "fetch.models[0]: expected no token"),
    "no_pattern": (["fetch.datasets=[a/b]", "fetch.files=[]"], "fetch.files: expected patterns"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_refused_at_once(case: str) -> None:
    overrides, sign = SETTINGS[case]
    with pytest.raises(UserError) as error:
        validate(compose(overrides), ["fetch"])
    assert sign in str(error.value) and TOKEN not in str(error.value)


def test_no_setting_may_hold_a_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    with pytest.raises(
        UserError, match=r"run.project: expected no token or password, found the value of WANDB_API_KEY"
    ):
        validate(compose(["run.project=${oc.env:WANDB_API_KEY}"]), ["plan"])


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (TOKEN, True),
        ("https://me:secret@host/x", True),
        ("AKIAABCDEFGHIJKLMNOP", True),
        ("hf_hub", False),
        ("meta-llama/Llama-3.1-8B@0123456789abcdef0123456789abcdef01234567", False),
        ("https://host:8080/x", False),
        ("runs/sk-learn", False),
    ],
)
def test_tokens_are_known_by_their_looks(text: str, secret: bool) -> None:
    found = secrets.found_in(text, {})
    assert bool(found) is secret and (not secret or text not in found)


def test_a_variable_that_names_a_file_or_a_switch_is_no_secret(tmp_path: Path) -> None:
    environment = {
        "HF_TOKEN_PATH": str(tmp_path),
        "USE_TOKEN": "1",
        "MY_TOKEN": "abcdefgh1",
        "TOKENIZERS_PARALLELISM": "x" * 9,
    }
    assert secrets.of_environment(environment) == {"MY_TOKEN": "abcdefgh1"}
    names = [*environment, "SITE_CREDENTIALS", "my_apikey"]
    assert [secrets.named_secret(name) for name in names] == [False, True, True, False, True, True]
    values = ("/home/me/key.json", "{key: 1}", "", "k3y/of+mine")
    assert [secrets.named_secret("GOOGLE_APPLICATION_CREDENTIALS", value) for value in values] == [False, *[True] * 3]
    assert secrets.named_secret("MY_TOKEN", "/home/me/token"), "a token may begin with anything"


@pytest.mark.usefixtures("online")
def test_without_network_tasks_are_refused_at_the_first_question(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a name that the harness does not know before any question."""
    monkeypatch.setattr(stage.harness, "download", lambda *_: pytest.fail("asked for data without a hub"))
    hub.__exit__()
    message = fetch(hub, tmp_path, "fetch.models=[]", "fetch.tasks=[winogrande]")
    assert message.startswith("fetch.tasks: expected an answer from http://127.0.0.1")
    assert "ConnectionError" in message and "where there is network" in message
    message = fetch(hub, tmp_path, "fetch.models=[]", "fetch.tasks=[winogrand]")
    assert "found 'winogrand'; there are winogrande" in message
