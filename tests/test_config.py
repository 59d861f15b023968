"""Mistakes of the command line: one message each, with what was expected, what was found and what to do."""

import json
import re
import shutil
import sys
from dataclasses import fields, is_dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pipelines import config as configuration
from pipelines import planning
from pipelines.compose import compose, conf_directory, known_keys
from pipelines.config import Config, ParallelConfig, UserError, layout
from pipelines.evaluation_settings import GateConfig
from pipelines.prune_settings import OfLayerConfig
from pipelines.site_settings import AcceptPart
from pipelines.validation import numbers, validate
from pipelines.validation.data import check_sources
from pipelines.validation.layouts import check_processes
from pipelines.vocabulary import tokenizer_size

pytestmark = pytest.mark.usefixtures("machine_without_gpu")

# A shape and a batch of this test's own, whatever the quickstart's become.
BASE = [
    "experiment=quickstart",
    "student=custom",
    *(f"model.shape.{name}" for name in ("vocab_size=2048", "hidden_size=256", "intermediate_size=768", "head_dim=32")),
    *(f"model.shape.{name}" for name in ("num_hidden_layers=6", "num_attention_heads=8", "num_key_value_heads=4")),
    "model.shape.max_position_embeddings=512",
    *(f"distil.{name}" for name in ("steps=400", "warmup_steps=20", "sequence_length=128", "micro_batch_size=8")),
    *(f"distil.{name}" for name in ("global_batch_size=16", "learning_rate=2e-3", "min_learning_rate=1e-4")),
]


def refusal(stage: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose(list(overrides)), [stage])
    return str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory as far as validation looks: 8 heads, 4 groups, 6 layers."""
    directory = tmp_path / "model"
    directory.mkdir()
    shape = planning.shape_from_config(compose(BASE).model.shape)
    (directory / "config.json").write_text(json.dumps(shape.to_hugging_face()))
    return directory


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("distil.kd_wieght=1", ["distil.kd_wieght", "no such setting", "Did you mean distil.kd_weight"]),
        ("kd_weight=1", ["Did you mean distil.kd_weight or verify.kd_weight"]),
        ("distl.steps=1", ["distl.steps", "distil.steps"]),
        ("data.sources=[{pth: a}]", ["pth", "Did you mean path"]),
        ("parallel=tp3", ["parallel=tp3", "no such option", "tp2"]),
        ("experiment=quikstart", ["Did you mean quickstart"]),
        ("student=null", ["student=null", "quickstart_width"]),
        ("distil.steps=abc", ["distil.steps=abc", "Expected a whole number"]),
        ("distil.steps=1.5", ["distil.steps=1.5", "Expected a whole number"]),
        ("distil.learning_rate=fast", ["Expected a number"]),
        ("teacher.mode=train", ["teacher.mode=train", "take", "pretrain", "correct"]),
        ("parallel.sequence_parallel=maybe", ["Expected true or false"]),
        ("student.drop_layers=3", ["Expected list[int] or null"]),
        ("model.name=null", ["model.name=null", "Expected a text"]),
        ("run=5", ["run=5", "name, directory, seed"]),
        ("steps", ["'steps'", "expected key=value"]),
        ("stage=prune,distil", ["stage=[prune,distil]"]),
        ("~distil.steps", ["cannot be removed"]),
        ("=5", ["'=5'", "expected key=value"]),
        ("hydra/launcher=x", ["hydra/launcher=x", "no such setting"]),
        ("experiment=quickstart,quickstart_depth", ["expected one value", "Give one of"]),
        ("export.prompt=a, b", ["expected one text", "'export.prompt=\"a, b\"'"]),
        ("distil.steps=1,2", ["expected one value", "Give a whole number"]),
        ("model.shape.rope_scaling=[1]", ["rope_scaling=[1]", "names and values", "or null"]),
        ("model.shape.rope_scaling={", ["rope_scaling={", "expected key=value"]),
        ("model.path=${HOME}/model", ["${HOME}/model", "${oc.env:NAME}"]),
        ("model.path=${oc.env:NO_SUCH_NAME}/model", ["NO_SUCH_NAME", "environment"]),
        ("run.name=a-${now:%H}", ["run.name: ${now:%H}", "the same in every process and at each start"]),
        ("run.name=a-${oc.env:SLURM_JOB_ID}", ["run.name: ${oc.env:SLURM_JOB_ID}", "key=$SLURM_JOB_ID"]),
        ("run.name=a-${oc.env:RANK,0}", ["${oc.env:RANK}", "each has of its own"]),
        ("+cluster.environment.A=1", ["expected a whole list", "'cluster.environment=[{name: NCCL_DEBUG"]),
        ("cluster.environment={A: 1}", ["'cluster.environment=[{name: NCCL_DEBUG"]),
        ("data.sources.A=1", ["expected a whole list", "[{path: text.jsonl}"]),
        ("data.sources=text.jsonl", ["data.sources=text.jsonl", "[{path: text.jsonl}"]),
        ("data.sources=[text.jsonl]", ["data.sources=[text.jsonl]", "[{path: text.jsonl}"]),
        ("student.hidden_size=abc", ["student.hidden_size=abc", "Expected a whole number or null"]),
    ],
)
def test_what_cannot_be_composed_is_named_with_what_could(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose([override])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_variable_of_the_environment_is_read_or_its_default_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEBODY", "me")
    assert compose(["run.name=a-${oc.env:SOMEBODY}"]).run.name == "a-me"
    assert compose(["run.name=a-${oc.env:NOBODY,you}"]).run.name == "a-you"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: x\n\ttime: y\n", "line 2: expected YAML, found: found character '\\t'"),
        ("name: [\n", "line 2: expected YAML"),
        (
            "name: x\nenviroment: []\n",
            "cluster.enviroment: there is no such setting. Did you mean cluster.environment?",
        ),
    ],
)
def test_a_file_that_is_no_yaml_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, part: str
) -> None:
    copied = shutil.copytree(conf_directory(), tmp_path / "conf")
    (copied / "cluster" / "site.yaml").write_text(text)
    monkeypatch.setattr("pipelines.compose.conf_directory", lambda: copied)
    with pytest.raises(UserError) as caught:
        compose(["cluster=site"])
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_of_two_values_for_a_setting_the_wrong_one_is_named() -> None:
    with pytest.raises(UserError, match=r"^student\.hidden_size=abc: "):
        compose(["student.hidden_size=64", "student.hidden_size=abc"])


def test_a_mapping_replaces_the_one_before() -> None:
    scaling = compose(["model=llama31_8b", "model.shape.rope_scaling={rope_type: linear, factor: 2}"]).model.shape
    assert scaling.rope_scaling == {"rope_type": "linear", "factor": 2}
    assert compose(["model=llama31_8b", "model.shape.rope_scaling=null"]).model.shape.rope_scaling is None


def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = ["run.directory", "model.path", "student.path", "data.corpus", "data.tokenizer"]
    for quote in ("", '"'):
        given = [f"{path}={quote}~/x{quote}" for path in paths]
        config = compose([*given, f"data.sources=[{{path: {quote}~/a.txt{quote}}}, {{weight: 2, path: 'b~/c'}}]"])
        found = {config.run.directory, config.model.path, config.student.path, config.data.corpus}
        assert found | {config.data.tokenizer} == {"/home/somebody/x"}
        assert [source.path for source in config.data.sources] == ["/home/somebody/a.txt", "b~/c"]


def test_a_plus_before_a_key_changes_nothing() -> None:
    assert compose(["+experiment=quickstart_depth", "++distil.steps=7"]) == compose(
        ["experiment=quickstart_depth", "distil.steps=7"]
    )
    with pytest.raises(UserError, match="no such setting"):
        compose(["+mine=1"])


def test_composed_values_are_plain_dataclasses_of_the_schema() -> None:
    config = compose(["stage=[prune,distil]", "student.drop_layers=[1,2]"])
    assert type(config) is Config
    assert type(config.stage) is list and type(config.student.drop_layers) is list
    assert {"overwrite", "distil.kd_weight", "model.shape.head_dim"} <= set(known_keys())


@pytest.mark.parametrize(
    ("stage", "overrides", "parts"),
    [
        ("plan", ["parallel.pipeline=4", "distil.hidden=[{kind: mse}]"], ["parallel.pipeline=4", "6 layers"]),
        ("plan", ["distil.global_batch_size=12"], ["distil.global_batch_size", "multiple of 8", "12"]),
        ("plan", ["distil.gradient_filter=1e-5", "distil.top_k=4"], ["distil.gradient_filter", "top_k=4"]),
        ("plan", ["distil.teacher_precision=fp8", "distil.teacher_offload=true"], ["distil.teacher_offload", "fp8"]),
        ("plan", ["parallel.tensor=3"], ["parallel.tensor=3", "8 attention heads"]),
        ("plan", ["plan.gpu=A1000"], ["plan.gpu", "A100, H100 PCIe", "A1000"]),
        ("plan", ["distil.hidden=[{student_layer: 9, teacher_layer: 1}]"], ["distil.hidden[0].student_layer", "9"]),
        ("prune", ["student.hidden_size=512"], ["student.hidden_size", "at most the teacher's 256", "512"]),
        ("prune", ["student.num_attention_heads=6"], ["multiple of the 4 KV groups", "6"]),
        ("prune", ["student.num_key_value_heads=8"], ["student.num_key_value_heads", "at most the teacher's 4"]),
        ("prune", ["student.num_key_value_heads=3"], ["multiple of 2 (parallel.tensor=2)", "3", "Take 2 or 4"]),
        (
            "prune",
            ["student.num_key_value_heads=2", "student.num_attention_heads=6"],
            ["multiple of the 2 KV groups", "at most the teacher's 2", "Take 4"],
        ),
        ("plan", ["student.intermediate_size=255"], ["student.intermediate_size", "parallel.tensor=2", "254 or 256"]),
        (
            "prune",
            ["prune.multiples.intermediate_size=64", "student.intermediate_size=300", "parallel=tp2"],
            ["multiple of 64 (prune.multiples.intermediate_size=64 and parallel.tensor=2)", "300", "Take 256 or 320"],
        ),
        ("prune", ["prune.multiples.hidden_size=64", "student.hidden_size=40"], ["multiple of 64", "Take 64"]),
        ("prune", ["prune.protect.hidden=[256]"], ["prune.protect.hidden", "from 0 to 255", "[256]"]),
        ("prune", ["prune.protect.layers=[0]"], ["prune.protect.layers", "1 or more"]),
        ("prune", ["prune.protect.layers=[2,2]"], ["prune.protect.layers", "[2] more than once"]),
        ("prune", ["prune.protect.heads=[{layer: 7, indices: [1]}]"], ["heads", "layers from 1 to 6", "[7]"]),
        ("prune", ["prune.protect.ffn=[{layer: 1}, {layer: 1}]"], ["ffn", "[1] more than once"]),
        (
            "prune",
            ["prune.protect.layers=[1]", "prune.protect.heads=[{layer: 2, indices: [3]}]", "student.drop_layers=[2]"],
            ["student.drop_layers", "prune.protect names", "[2]"],
        ),
        (
            "prune",
            ["prune.protect.layers=[1,2]", "prune.protect.heads=[{layer: 4}]", "student.num_hidden_layers=2"],
            ["at most the 2 of student.num_hidden_layers", "3 that stay"],
        ),
        (
            "prune",
            ["prune.protect.heads=[{layer: 1, indices: [0, 2, 5]}]", "student.num_key_value_heads=2"],
            ["at most the 2 of student.num_key_value_heads", "3 that stay"],
        ),
        (
            "prune",
            ["prune.protect.heads=[{layer: 1, indices: [4, 5]}]", "student.num_attention_heads=4"],
            ["at most the 4 of student.num_attention_heads", "8 that stay"],
        ),
        ("prune", ["student.drop_layers=[7]"], ["layers from 1 to 6", "7"]),
        ("prune", ["student.drop_layers=[2,2]"], ["each layer once"]),
        ("prune", ["student.drop_layers=[1,2,3,4,5,6]"], ["at least one layer"]),
        ("prune", ["student.drop_layers=[1]", "student.num_hidden_layers=4"], ["expected 5"]),
        ("prune", ["student.hidden_size=0"], ["student.hidden_size", "1 or more"]),
        ("distil", ["parallel.tensor=3", "parallel.processes=3"], ["divisor", "8 attention heads", "3"]),
        ("distil", ["parallel.tensor=8"], ["4 KV groups", "8"]),
        ("distil", ["parallel.processes=3", "parallel.tensor=2"], ["divide the number of processes", "3"]),
        ("distil", ["parallel.pipeline=4", "parallel.tensor=1"], ["6 layers", "4"]),
        ("distil", ["parallel.context=2", "parallel.tensor=1"], ["parallel.context", "Transformer Engine"]),
        ("distil", ["parallel.device=cuda"], ["NVIDIA GPU", "found none"]),
        ("accept", ["parallel.device=cuda"], ["NVIDIA GPU", "found none"]),
        ("distil", ["parallel.tensor=0"], ["parallel.tensor", "1 or more"]),
        ("distil", ["distil.global_batch_size=12"], ["a multiple of 8", "12", "Take 8"]),
        ("distil", ["distil.global_batch_size=8", "parallel=dp2"], ["a multiple of 16", "2 data-parallel ranks"]),
        ("distil", ["distil.kd_weight=0", "distil.ce_weight=0"], ["kd_weight or ce_weight above 0"]),
        ("distil", ["distil.kd_weight=-1"], ["0 or more", "-1"]),
        ("distil", ["distil.temperature=0"], ["distil.temperature", "above 0"]),
        ("distil", ["distil.sequence_length=1024"], ["max_position_embeddings=512", "1024"]),
        ("distil", ["parallel=tp2_sp", "distil.sequence_length=127"], ["a multiple of parallel.tensor=2", "127"]),
        ("distil", ["distil.warmup_steps=400"], ["fewer than distil.steps=400"]),
        ("distil", ["distil.learning_rate=1e-5"], ["distil.min_learning_rate", "at most"]),
        ("distil", ["distil.divergence_parameter=0.5"], ["divergence_parameter", "none with", "forward_kl", "0.5"]),
        ("distil", ["distil.divergence=skew_kl", "distil.divergence_parameter=1"], ["above 0 and below 1", "found 1"]),
        ("distil", ["distil.gradient_filter=1"], ["distil.gradient_filter", "below 1", "found 1"]),
        (
            "distil",
            ["distil.gradient_filter=1e-6", "distil.divergence=reverse_kl"],
            ["distil.gradient_filter", "slope is bounded", "reverse_kl"],
        ),
        ("distil", ["distil.gradient_filter=1e-6", "distil.top_k=9"], ["distil.gradient_filter", "top_k=9"]),
        ("distil", ["distil.top_k=0"], ["distil.top_k", "1 or more"]),
        ("distil", ["distil.top_k=100000"], ["distil.top_k", "fewer than the vocabulary's"]),
        ("verify", ["verify.temperature=-1"], ["verify.temperature"]),
        ("verify", ["verify.divergence_parameter=0.5"], ["verify.divergence_parameter"]),
        ("verify", ["verify.kd_weight=0", "verify.ce_weight=0"], ["verify", "above 0"]),
        ("corpus", ["data=files"], ["data.sources", "one or more"]),
        ("corpus", ["data.sources=[{path: nowhere.jsonl}]"], ["data.sources[0].path", "nowhere.jsonl"]),
        ("corpus", ["data.sources=[{kind: jsonl}]"], ["data.sources[0].path", "a path"]),
        ("corpus", ["data.sources=[{kind: standard_library, weight: 0}]"], ["weight", "above 0"]),
        ("corpus", ["data.test_fraction=0.99"], ["some for training"]),
        ("corpus", ["data.tokenizer=nowhere"], ["data.tokenizer", "nowhere"]),
        ("corpus", ["data.tokenizer_vocab_size=4096"], ["at most the 2048 rows", "4096"]),
        ("teacher", ["model.path=nowhere"], ["model.path", "existing directory", "nowhere"]),
        ("teacher", ["teacher=take"], ["model.path", "none", "teacher=pretrain"]),
        ("distil", ["student.path=nowhere"], ["student.path", "nowhere"]),
        ("distil", ["run.name=a/b"], ["run.name", "slashes"]),
        ("distil", [f"run.directory={__file__}/runs"], ["run.directory", "a directory", "the file"]),
        ("distil", ["model.shape.num_key_value_heads=3"], ["multiple of num_key_value_heads=3"]),
        ("distil", ["model.shape.head_dim=31"], ["even number"]),
        ("plan", ["distil.steps=0"], ["distil.steps", "1 or more", "Raise"]),
        ("plan", ["distil.steps=1000000000000000000"], ["distil.steps", "less than", "Lower"]),
        ("plan", ["distil.kd_weight=nan"], ["distil.kd_weight", "0 or more", "nan", "finite"]),
        ("plan", ["distil.learning_rate=inf"], ["distil.learning_rate", "above 0", "inf", "finite"]),
        ("plan", ["distil.adam_beta1=1"], ["distil.adam_beta1", "from 0 to below 1", "Lower"]),
        ("plan", ["teacher.adam_beta2=-0.1"], ["teacher.adam_beta2", "from 0 to below 1", "Raise"]),
        ("export", ["export.step=40"], ["export.step=40", "a step whose checkpoint is in", "none", "Run stage=distil"]),
        ("evaluate", ["export.step=40"], ["export.step", "stage=export by itself", "evaluate"]),
        ("plan", ["export.quantize=[int8,int8]"], ["export.quantize", "each form once", "int8 twice"]),
        ("plan", ["export.shard_bytes=0"], ["export.shard_bytes", "1 or more"]),
        ("evaluate", ["evaluate.efficiency.new_tokens=1"], ["efficiency.new_tokens", "2 or more", "batch_sizes=[]"]),
        ("evaluate", ["evaluate.efficiency.prompt_tokens=[]"], ["efficiency.prompt_tokens", "one length", "none"]),
        ("evaluate", ["evaluate.efficiency.engines=[]"], ["efficiency.engines", "each once", "none"]),
        ("evaluate", ["evaluate.efficiency.engines=[vllm,vllm]"], ["efficiency.engines", "each once", "vllm, vllm"]),
        ("plan", ["evaluate.efficiency.batch_sizes=[0]"], ["evaluate.efficiency.batch_sizes", "1 or more"]),
        ("plan", ["distil.spike=1"], ["distil.spike", "above 1"]),
        ("plan", ["distil.skip_steps=-1"], ["distil.skip_steps", "0 or more"]),
        ("plan", ["export.tolerance=0"], ["export.tolerance", "above 0"]),
        ("verify", ["verify.tolerance=-1"], ["verify.tolerance", "above 0"]),
        ("plan", ["model.shape.rms_norm_eps=0"], ["model.shape.rms_norm_eps", "above 0"]),
        ("plan", ["model.shape.rope_theta=-1"], ["model.shape.rope_theta", "above 0"]),
        ("plan", ["model.shape.num_hidden_layers=0"], ["model.shape.num_hidden_layers", "1 or more", "Raise"]),
        ("plan", ["model.shape.hidden_size=-4"], ["model.shape.hidden_size", "1 or more"]),
        ("plan", ["model.shape.architecture=GPT2"], ["model.shape.architecture", "LlamaForCausalLM", "GPT2"]),
        ("plan", ["model.shape.rope_scaling={type: yarn}"], ["model.shape.rope_scaling", "llama3", "'yarn'"]),
        ("plan", ["model.shape.rope_scaling={rope_type: linear}"], ["rope_scaling.factor", "none"]),
        ("plan", ["model.shape.rope_scaling={rope_type: linear, factor: nan}"], ["rope_scaling.factor", "nan"]),
        ("plan", ["run.seed=0"], ["run.seed", "from 1"]),
        ("plan", ["evaluate.split=dev"], ["evaluate.split", "validation, test", "dev"]),
        ("verify", ["parallel.tensor=1000"], ["processes", "1000", "Lower"]),
        ("corpus", ["data.sources=[{kind: standard_library, weight: nan}]"], ["data.sources[0].weight", "nan"]),
        ("corpus", ["data.sources=[{kind: standard_library, limit_bytes: 0}]"], ["data.sources[0].limit_bytes", "0"]),
        ("corpus", ["data.sources=[{kind: megatron, path: conf}]"], ["data.sources[0].path", ".bin and .idx", "conf"]),
        ("corpus", ["data.sources=[{kind: datasets, path: conf}]"], ["data.sources[0].path", "save_to_disk", "conf"]),
        ("distil", [f"run.name={'x' * 256}"], ["run.name", "255 bytes", "256", "Shorten"]),
        ("corpus", ["data.tokenizer_vocab_size=100"], ["data.tokenizer_vocab_size", "258", "100"]),
        ("corpus", ["data.test_fraction=-0.1"], ["data.test_fraction", "from 0 to below 1"]),
        ("prune", ["prune.depth_method=layers", "student.num_hidden_layers=4"], ["the 2 layers", "block_influence"]),
        ("evaluate", ["parallel=tp2_sp", "evaluate.sequence_length=127"], ["evaluate.sequence_length", "127"]),
        ("prune", ["parallel=tp2_sp", "prune.sequence_length=127"], ["prune.sequence_length", "127"]),
        ("verify", ["parallel=tp2_sp", "verify.sequence_length=31"], ["verify.sequence_length", "31"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(stage: str, overrides: list[str], parts: list[str]) -> None:
    message = refusal(stage, *BASE, *overrides)
    assert "expected" in message and "found" in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("stages", "fraction"),
    [
        (["corpus", "distil"], "data.validation_fraction"),
        (["corpus", "evaluate"], "data.test_fraction"),
        (["corpus", "prune"], "data.calibration_fraction"),
    ],
)
def test_a_split_that_a_stage_reads_may_not_be_empty(stages: list[str], fraction: str) -> None:
    overrides = [*BASE, "student.hidden_size=64", f"{fraction}=0"]
    with pytest.raises(UserError, match=f"^{fraction}: expected above 0, since stage {stages[1]} reads"):
        validate(compose(overrides), stages)
    validate(compose(overrides), ["corpus"])


def test_a_split_that_a_stage_does_not_read_may_be_empty(tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0}) + "\n")
    deep = [*BASE, "data.calibration_fraction=0", "model.shape.num_hidden_layers=6", "student.num_hidden_layers=4"]
    measured = ["prune.depth_method=greedy", f"prune.task={task}"]
    validate(compose([*deep, *measured, "prune.depth_measure=task"]), ["corpus", "prune"])
    validate(compose([*deep, "prune.depth_method=random"]), ["corpus", "prune"])
    for method in ("greedy", "block_influence"):
        with pytest.raises(UserError, match=r"^data.calibration_fraction: expected above 0"):
            validate(compose([*deep, f"prune.depth_method={method}"]), ["corpus", "prune"])


def test_a_file_where_the_run_is_to_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "corpus").write_text("")
    message = refusal("corpus", *BASE, f"run.directory={tmp_path}", "run.name=mine")
    assert f"the file {tmp_path / 'mine' / 'corpus'}" in message and "run.name" in message


def test_a_corpus_and_a_teacher_can_be_made_whatever_the_student_shall_be(model: Path) -> None:
    larger = [*BASE, "student.hidden_size=512"]
    assert validate(compose(larger), ["corpus", "teacher"]) == []
    with pytest.raises(UserError, match="student.hidden_size.*student=custom"):
        validate(compose(larger), ["corpus", "teacher", "prune"])


def test_what_an_earlier_prune_made_is_what_distil_starts_from(tmp_path: Path) -> None:
    made = tmp_path / "quickstart" / "prune" / "hf"
    made.mkdir(parents=True)
    shape = planning.shape_from_config(compose(BASE).model.shape).replace(intermediate_size=255)
    (made / "config.json").write_text(json.dumps(shape.to_hugging_face()))
    overrides = [*BASE, f"run.directory={tmp_path}"]
    warning = f"student.intermediate_size=768 has no effect without stage=prune: {made} has 255"
    assert validate(compose([*overrides, "parallel=tp1"]), ["distil"]) == [warning]
    with pytest.raises(UserError, match="a divisor of the student's 255 ffn neurons"):
        validate(compose(overrides), ["distil"])
    assert validate(compose([*overrides, "student.intermediate_size=128"]), ["prune", "distil"]) == []


def test_every_number_of_the_schema_has_a_range() -> None:
    def leaves(kind: type) -> set[str]:
        names: set[str] = set()
        for entry in fields(kind):
            if is_dataclass(entry.type):
                names |= leaves(entry.type)
            elif entry.type in (int, float, int | None, float | None, list[int]):
                names.add(entry.name)
        return names

    listed = (configuration.SourceConfig, configuration.HiddenLossConfig, configuration.AttentionLossConfig)
    entries = (*listed, OfLayerConfig, GateConfig)
    assert leaves(Config).union(*map(leaves, entries)) == numbers.RANGES.keys()
    source = Path(numbers.__file__).read_text().partition("RANGES: ")[2].partition("\n}")[0]
    names = [name for line in source.splitlines() for name in re.findall(r'"(\w+)"', line)]
    assert len(names) == len(set(names)), "a second line for a name would win without a word"


def test_a_model_directory_without_config_or_of_another_architecture_is_refused_by_name(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"architectures": ["GPT2LMHeadModel"]}))
    message = refusal("teacher", "teacher=take", f"model.path={model}")
    assert "GPT2LMHeadModel" in message and "LlamaForCausalLM" in message
    (model / "config.json").unlink()
    assert "config.json" in refusal("teacher", "teacher=take", f"model.path={model}")


def test_the_shape_comes_from_the_directory_where_there_is_one(model: Path) -> None:
    assert "at most the teacher's 256" in refusal(
        "prune", "model=llama31_8b", f"model.path={model}", "student=custom", "student.hidden_size=300"
    )


def test_a_sliding_window_shorter_than_the_sequence_is_refused_without_transformer_engine(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    (model / "config.json").write_text(json.dumps(content))
    message = refusal("distil", "teacher=take", f"model.path={model}", "student=custom")
    assert "sliding window 64" in message and "128" in message


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0, "b": 3000}}, "added_tokens": [{"id": 4095}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_size(tmp_path) == 4096
    message = refusal("corpus", *BASE, f"data.tokenizer={tmp_path}")
    assert "2048 rows" in message and "4096 ids" in message
    (tmp_path / "tokenizer.json").write_text("{")
    assert "expected JSON" in refusal("corpus", *BASE, f"data.tokenizer={tmp_path}")


def test_plan_needs_no_file_of_the_teacher() -> None:
    config = compose(["experiment=llama31_8b_to_4b_width", "model.path=nowhere"])
    assert any("model.path=nowhere has no config.json" in warning for warning in validate(config, ["plan"]))


def test_a_setting_without_effect_is_told() -> None:
    warnings = validate(
        compose(["experiment=quickstart", "parallel=tp1", "parallel.sequence_parallel=true"]), ["distil"]
    )
    assert any("sequence_parallel=true has no effect" in warning for warning in warnings)
    assert validate(compose(BASE), ["distil"]) == []


@pytest.mark.parametrize(("tracker", "missing"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "alembic")])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tracker: str, missing: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    there = ModuleSpec("there", None, origin="file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else there)
    message = refusal("distil", *BASE, f"run.trackers=[{tracker}]")
    assert f"run.trackers={tracker}: expected the package {missing}, found none" in message
    assert "stillhouse[trackers]" in message
    validate(compose([*BASE, f"run.trackers=[{tracker}]"]), ["prune"])  # which tracks nothing
    if missing == "alembic":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
        assert validate(compose([*BASE, "run.trackers=[mlflow]"]), ["distil"]) == []


@pytest.mark.parametrize(
    ("stages", "overrides", "part"),
    [
        (["distil"], ["distil.distributed_optimizer=true"], "distil.distributed_optimizer=true has no effect"),
        (["teacher"], ["teacher.distributed_optimizer=true"], "teacher.distributed_optimizer=true has no effect"),
        (["distil"], ["distil.profile=true", "distil.steps=7", "distil.warmup_steps=0"], "distil.profile=true has no"),
        (["export"], ["export.quantize_teacher=true"], "export.quantize_teacher=true has no effect"),
        (["distil"], ["distil.keep_best=1", "distil.checkpoint_interval=99"], "distil.keep_best has no effect"),
        (["export"], ["export.quantize_teacher=true"], "export.quantize_teacher=true has no effect"),
        (["distil"], ["distil.keep_best=1", "signals=taid"], "not the same over training, because of taid"),
        (["distil"], ["distil.temperature_squared=false"], "temperature_squared=false has no effect"),
        (["distil"], ["distil.kd_weight=0", "distil.temperature=2"], "distil.temperature has no effect"),
        (["distil"], ["distil.kd_weight=0", "distil.divergence=reverse_kl"], "distil.divergence has no effect"),
        (["distil"], ["distil.kd_weight=0", "distil.top_k=256"], "distil.top_k has no effect"),
        (["prune"], ["student.hidden_size=64", "iterate.teacher=previous"], "iterate.teacher=previous has no effect"),
        (["corpus"], ["format=json"], "format=json has no effect without stage=plan"),
        (["prune"], ["student.hidden_size=64", "prune.depth_method=layers"], "depth_method=layers has no effect"),
        (["corpus"], ["data.sources=[{kind: standard_library, text_key: body}]"], "text_key has no effect"),
    ],
)
def test_each_setting_without_effect_is_named(stages: list[str], overrides: list[str], part: str) -> None:
    found = validate(compose([*BASE, *overrides]), stages)
    assert len(found) == 1 and part in found[0], found


def test_the_size_of_a_tokenizer_that_is_not_trained_has_no_effect(model: Path) -> None:
    content = {"model": {"vocab": {"a": 0, "b": 1}}}
    (model / "tokenizer.json").write_text(json.dumps(content))
    size = "data.tokenizer_vocab_size=300"
    taken = validate(compose(["teacher=take", f"model.path={model}", "student=custom", size]), ["corpus"])
    assert any("has no effect with the tokenizer of model.path" in warning for warning in taken)
    given = validate(compose([*BASE, f"data.tokenizer={model}", size]), ["corpus"])
    assert given == ["data.tokenizer_vocab_size has no effect with data.tokenizer"]
    pretrained = validate(compose([*BASE, f"model.path={model}", size]), ["corpus"])
    assert pretrained == [f"model.path={model} has no effect with teacher.mode=pretrain"]


def test_the_layout_follows_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout(ParallelConfig()).tensor == 2
    assert layout(ParallelConfig(tensor=1)).processes == 1
    assert layout(ParallelConfig(tensor=4)).processes == 4
    assert layout(ParallelConfig(processes=4, tensor=2)).data == 2
    monkeypatch.setattr(configuration, "gpu_count", lambda: 8)
    gpus = layout(ParallelConfig(tensor=2))
    assert (gpus.device, gpus.processes, gpus.data) == ("cuda", 8, 4)
    assert layout(ParallelConfig(device=configuration.Device.cpu)).device == "cpu"
    with pytest.raises(UserError, match="at most 8 processes, one for each GPU of this machine, found 16"):
        check_processes(layout(ParallelConfig(processes=16)))
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert layout(ParallelConfig(tensor=8)).data == 2
    with pytest.raises(UserError, match="WORLD_SIZE=16"):
        layout(ParallelConfig(processes=8))


def test_hidden_devices_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(configuration.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2"])
    monkeypatch.setattr(configuration.metadata, "version", lambda package: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert configuration.gpu_count() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert configuration.gpu_count() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert configuration.gpu_count() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(configuration.metadata, "version", lambda package: "2.13.0+cpu")
    assert configuration.gpu_count() == 0


def test_quantizing_asks_for_its_library_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(
        UserError, match=r"compressed-tensors, found none installed. pip install 'stillhouse\[quantize\]'"
    ):
        validate(compose(["export.quantize=[int8]", "teacher=pretrain"]), ["export"])
    validate(compose(["export.quantize=[int8]"]), ["plan"])


def test_a_source_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "some"}\n')
    for twice in (
        f"{{path: a.jsonl}}, {{path: b.jsonl}}, {{path: {tmp_path}/a.jsonl, weight: 2}}",
        *["{kind: standard_library}, {path: a.jsonl}, {kind: standard_library}"],
    ):
        with pytest.raises(
            UserError, match=r"data.sources\[2\]: expected each source once, found .* again, as data.sources\[0\]"
        ):
            validate(compose([*BASE, f"data.sources=[{twice}]"]), ["corpus"])
    validate(
        compose([*BASE, "data.sources=[{path: a.jsonl}, {path: b.jsonl}, {path: a.jsonl, text_key: summary}]"]),
        ["corpus"],
    )


def test_a_source_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "train.bin", "train.idx"):
        (tmp_path / name).touch()
    for first, again in (
        ("*.jsonl", "b.jsonl"),
        ("[ab].jsonl", "a*"),
        ("train.bin", "train.idx"),
        ("train", "train.bin"),
    ):
        twice = f"data.sources=[{{path: {first!r}}}, {{path: {again!r}}}]"
        with pytest.raises(UserError, match=r"data.sources\[1\]: expected each source once, found .*data.sources\[0\]"):
            check_sources(compose([*BASE, twice]), ["corpus"])
    check_sources(compose([*BASE, "data.sources=[{path: 'a*'}, {path: 'b*'}, {path: train.bin}]"]), ["corpus"])


def test_a_missing_model_names_the_stage_that_gets_it() -> None:
    taken = ["experiment=quickstart", "teacher=take"]
    for given, name in (("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"), ("/nowhere/at/all", "owner/model")):
        with pytest.raises(UserError, match="model.path: expected an existing directory") as caught:
            validate(compose([*taken, f"model.path={given}"]), ["distil"])
        assert f"stage=fetch fetch.models=[{name}]" in str(caught.value)


def test_an_acceptance_that_a_cpu_cannot_end_is_refused_with_its_cost() -> None:
    large = compose(["experiment=llama31_8b_to_4b_tutorial", "parallel.device=cpu", "parallel.processes=8"])
    with pytest.raises(
        UserError, match=r"accept.parts: .*found \d.\de\+15 FLOPs and \d+ GB for 52 steps of 8,030,261,248"
    ):
        validate(large, ["accept"])
    large.accept.parts = [AcceptPart.node, AcceptPart.verify]
    validate(large, ["accept"])
    validate(compose(["parallel.device=cpu", "accept.steps=3", "accept.sequence_length=64"]), ["accept"])
