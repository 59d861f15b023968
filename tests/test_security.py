"""Nothing of a directory that somebody else made is executed: no pickle, no code of a model's repository."""

import ast
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.families import ModelShape, read_shape
from pipelines.model.random_model import write_random_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.safetensors_header import check_model
from pipelines.serving.reloaded import reload
from pipelines.validation import directories

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for room in ("pipelines", "launchers", "containers") for path in (ROOT / room).rglob("*.py"))
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.jit.load", "torch.package", "io.load_context", "io.load", "eval", "exec", "os.system"}
SWITCHES = {"trust_remote_code", "allow_pickle", "shell"}


def executes(tree: ast.AST) -> Iterator[str]:
    """What in a module can execute what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or (name == "yaml.load" and "Loader" not in ast.unparse(node)):
                yield name
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in SWITCHES and not off:
                    yield f"{name}({keyword.arg}=...)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_executes_what_it_reads(path: Path) -> None:
    assert list(executes(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load('x')",
        "import pickle",
        "from cloudpickle import loads",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "yaml.load(text)",
        "io.load_context(path)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(executes(ast.parse(code)))


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _touch, (str(self.mark),)


def _touch(path: str) -> None:
    Path(path).touch()


def lay(directory: Path, mark: Path) -> None:
    """Bombs under the names by which others load pickles, and code as a model's repository may bring."""
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "consolidated.00.pth", "optimizer.pkl"):
        (directory / name).write_bytes(pickle.dumps(Bomb(mark)))
    (directory / "modeling_llama.py").write_text(f"open({str(mark)!r}, 'w')\n")


def test_a_bomb_goes_off_where_pickles_are_opened(tmp_path: Path) -> None:
    lay(tmp_path, tmp_path / "mark")
    pickle.loads((tmp_path / "model.pt").read_bytes())
    assert (tmp_path / "mark").exists()


def test_a_model_with_pickles_and_code_beside_its_safetensors_is_read_without_them(tmp_path: Path) -> None:
    directory, mark = tmp_path / "model", tmp_path / "mark"
    write_random_model(directory, ModelShape(301, 32, 48, 2, 4, 2, 8), 1)
    lay(directory, mark)
    shape = read_shape(directory)
    check_model(directory, shape)
    tensors = Tensors(directory)
    assert all(tensors[name].isfinite().all() for name in tensors.names)
    reload(directory)
    assert not mark.exists()


def test_a_model_of_pickles_alone_is_refused(tmp_path: Path) -> None:
    directory, mark = tmp_path / "model", tmp_path / "mark"
    write_random_model(directory, ModelShape(301, 32, 48, 2, 4, 2, 8), 1)
    (directory / "model.safetensors").unlink()
    lay(directory, mark)
    with pytest.raises(UserError, match="expected \\*.safetensors files, found none"):
        check_model(directory, read_shape(directory))
    with pytest.raises(UserError, match="safetensors"):
        directories.check_weights(compose([f"model.path={directory}", "teacher=take"]), ["prune"])
    assert not mark.exists()
