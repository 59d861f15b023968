"""Models and tokenizers that a user gives: what is damaged is told by name before any rank is started."""

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import yaml

from pipelines import index_header, planning
from pipelines.compose import compose
from pipelines.config import Config, TeacherMode, UserError
from pipelines.families import ModelShape, read_shape
from pipelines.safetensors_header import ITEM_BYTES
from pipelines.validation import directories, validate
from pipelines.vocabulary import tokenizer_size

pytestmark = pytest.mark.usefixtures("machine_without_gpu")

SHAPE = ModelShape(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
INDEX = "model.safetensors.index.json"
SHARDS = 3


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> None:
    """A safetensors file of zeros: header length, header, data."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))


def write_model(directory: Path, shape: ModelShape = SHAPE, dtype: str = "F32") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape.to_hugging_face()))
    tokens = {f"t{number}": number for number in range(shape.vocab_size)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    every, weight_map = list(shape.tensor_shapes().items()), {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = dict(every[number::SHARDS])
        write_file(directory / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def overrides(model: Path, *more: str) -> list[str]:
    lengths = [f"{stage}.sequence_length=64" for stage in ("prune", "distil", "evaluate", "teacher")]
    return [
        "teacher=take",
        f"model.path={model}",
        "student=custom",
        f"run.directory={model.parent}/runs",
        *lengths,
        *more,
    ]


def refusal(stages: list[str], *given: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose(list(given)), stages)
    message = str(caught.value)
    assert "expected" in message and "\n" not in message
    return message


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value != "remove"}))

    return change


def shard(directory: Path, number: int) -> Path:
    return directory / f"model-{number:05d}-of-{SHARDS:05d}.safetensors"


def truncate(number: int, size: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = shard(directory, number)
        path.write_bytes(path.read_bytes()[:size])

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a shard of the index is missing": (lambda d: shard(d, 2).unlink(), ["model-00002", "missing", "again"]),
    "truncated data": (truncate(3, -5), ["model-00003", "truncated"]),
    "truncated header": (truncate(1, 40), ["model-00001", "truncated"]),
    "an empty file": (lambda d: shard(d, 1).write_bytes(b""), ["model-00001", "0 bytes"]),
    "a header that is no JSON": (
        lambda d: shard(d, 1).write_bytes((4).to_bytes(8, "little") + b"{{{{"),
        ["model-00001", "header", "corrupt"],
    ),
    "a pointer of Git LFS": (
        lambda d: shard(d, 1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["model-00001", "git lfs pull"],
    ),
    "fewer layers than config.json says": (
        change_config(num_hidden_layers=3),
        ["missing 9 of 30", "model.layers.2.", "config.json"],
    ),
    "more layers than config.json says": (change_config(num_hidden_layers=1), ["found 9 more", "model.layers.1."]),
    "wider weights than config.json says": (
        change_config(intermediate_size=40),
        ["expected [40, 32], found [48, 32]", "config.json"],
    ),
    "an index that is no JSON": (lambda d: (d / INDEX).write_text("{"), ["index.json", "weight_map"]),
    "weights in another format": (
        lambda d: [path.unlink() for path in [*d.glob("*.safetensors"), d / INDEX]],
        ["expected *.safetensors", "save_pretrained"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("setting", ["model.path", "student.path"])
def test_weights_that_are_not_those_of_config_json_are_refused_from_their_headers(
    tmp_path: Path, model: Path, setting: str, damage: str
) -> None:
    change, parts = DAMAGES[damage]
    damaged = write_model(tmp_path / "damaged")
    change(damaged)
    given = overrides(damaged) if setting == "model.path" else overrides(model, f"student.path={damaged}")
    message = refusal(["distil"], *given)
    assert str(damaged) in message and all(part in message for part in parts), message


def test_a_whole_model_passes_and_quantized_weights_do_not(tmp_path: Path, model: Path) -> None:
    assert validate(compose(overrides(model, f"student.path={model}")), ["distil", "evaluate"]) == []
    quantized = write_model(tmp_path / "quantized", dtype="F8_E4M3")
    assert "F8_E4M3" in refusal(["teacher"], *overrides(quantized))


@pytest.mark.parametrize("kind", ["int8", "packed", "scales", "fp4", "config"])
def test_a_quantized_teacher_is_refused_by_name_before_anything_starts(tmp_path: Path, kind: str) -> None:
    directory = write_model(tmp_path / "quantized", dtype="I8" if kind == "int8" else "BF16")
    name = "model.layers.0.mlp.down_proj"
    shapes = SHAPE.tensor_shapes()
    if kind in ("packed", "scales", "fp4"):
        file = shard(directory, list(shapes).index(f"{name}.weight") % SHARDS + 1)
        part = dict(list(shapes.items())[list(shapes).index(f"{name}.weight") % SHARDS :: SHARDS])
        if kind == "packed":
            del part[f"{name}.weight"]
        more = {"packed": {f"{name}.weight_packed": (4, 4)}, "scales": {f"{name}.weight_scale": (32, 1)}}
        write_file(file, part | more.get(kind, {}), "BF16")
        index = json.loads((directory / INDEX).read_text())["weight_map"]
        index.pop(f"{name}.weight" if kind == "packed" else "", None)
        (directory / INDEX).write_text(json.dumps({"weight_map": index}))
        if kind == "fp4":
            file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F4"  ', 1))
    if kind == "config":
        change_config(quantization_config={"quant_method": "fp8"})(directory)
    message = refusal(["prune"], *overrides(directory))
    found = {
        "int8": "found model.embed_tokens.weight in I8",
        "packed": f"found 1 tensors of a quantization: {name}.weight_packed",
        "scales": f"found 1 tensors of a quantization: {name}.weight_scale",
        "fp4": f"{shard(directory, 1).parent}/model-",
        "config": "quantization_config: expected unquantized weights, found a model quantized by fp8",
    }
    assert found[kind] in message and "Dequantize" in message, message
    assert kind != "fp4" or "found tensors in F4" in message
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_reads_no_model_does_not_look_at_its_weights(model: Path) -> None:
    shard(model, 1).unlink()
    assert validate(compose(overrides(model)), ["plan"]) == []


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, tuple[object, list[str]]] = {
    "no hidden_size": ({"hidden_size": "remove"}, ["hidden_size", "none"]),
    "a size as text": ({"hidden_size": "32"}, ["hidden_size", "whole number", "'32'"]),
    "a size of words": ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
    "a size of 0": ({"num_hidden_layers": 0}, ["num_hidden_layers", "1 or more", "0"]),
    "a negative size": ({"intermediate_size": -4}, ["intermediate_size", "1 or more", "-4"]),
    "half a head": ({"num_attention_heads": 4.5}, ["num_attention_heads", "4.5"]),
    "heads that do not divide": ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads=3", "4"]),
    "an odd head_dim": ({"head_dim": 7}, ["head_dim", "even", "7"]),
    "no epsilon": ({"rms_norm_eps": 0}, ["rms_norm_eps", "above 0"]),
    "a negative theta": ({"rope_theta": -1}, ["rope_theta", "above 0", "-1"]),
    "yarn": ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling.rope_type", "'yarn'", "llama3"]),
    "linear without factor": ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor", "none"]),
    "a factor in words": ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, ["factor", "'two'"]),
    "llama3 without the original length": ({"rope_scaling": LLAMA3}, ["original_max_position_embeddings", "none"]),
    "rope_scaling that is a list": ({"rope_scaling": [1]}, ["rope_scaling", "names and values"]),
    "an architecture as text": ({"architectures": "GPT2LMHeadModel"}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    "no architecture": ({"architectures": []}, ["(none)", "LlamaForCausalLM"]),
    "biases": ({"attention_bias": True}, ["attention_bias"]),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_mistake_in_a_given_config_is_blamed_on_that_file(model: Path, mistake: str) -> None:
    changes, parts = CONFIGS[mistake]
    assert isinstance(changes, dict)
    change_config(**changes)(model)
    message = refusal(["teacher"], *overrides(model))
    assert message.startswith(f"{model / 'config.json'}: ") and "model.shape" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "an empty file"), (b"{", "line 1"), (b"[]", "list"), (b"\xff\xfe{", "UTF-8"), (b"[" * 100_000, "deeply")],
)
def test_a_config_that_is_no_json_object_is_one_message(model: Path, content: bytes, part: str) -> None:
    (model / "config.json").write_bytes(content)
    message = refusal(["teacher"], *overrides(model))
    assert str(model / "config.json") in message and part in message and "Fetch it again" in message


@pytest.mark.parametrize(
    "content",
    [[], {}, {"model": None}, {"model": []}, {"model": {}}, {"model": {"vocab": 3}}, {"model": {"vocab": {"a": "b"}}}]
    + [{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}, {"model": {"vocab": {"a": 0}}, "added_tokens": {"a": 1}}],
)
def test_a_tokenizer_of_odd_content_is_one_message(model: Path, content: object) -> None:
    (model / "tokenizer.json").write_text(json.dumps(content))
    message = refusal(["corpus"], *overrides(model))
    assert str(model / "tokenizer.json") in message and "Fetch it again" in message


def test_the_size_of_a_unigram_tokenizer_is_its_number_of_pieces(tmp_path: Path) -> None:
    content = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 7}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_size(tmp_path) == 8


def test_a_teacher_without_tokenizer_is_told_before_the_corpus_starts(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    message = refusal(["corpus"], *overrides(model))
    assert "tokenizer" in message and str(model) in message and "data.tokenizer" in message


def test_a_given_student_needs_the_teachers_vocabulary_and_no_other_size(tmp_path: Path, model: Path) -> None:
    other = write_model(tmp_path / "other", SHAPE.replace(vocab_size=500))
    assert "vocabulary of 512" in refusal(["distil"], *overrides(model, f"student.path={other}"))
    wider = write_model(tmp_path / "wider", SHAPE.replace(intermediate_size=64))
    assert validate(compose(overrides(model, f"student.path={wider}")), ["distil"]) == []


def test_a_file_in_place_of_a_directory_is_named(model: Path) -> None:
    message = refusal(["teacher"], *overrides(model / "config.json"))
    assert "existing directory" in message and "the file" in message


def test_a_corpus_of_other_splits_or_another_vocabulary_is_refused(tmp_path: Path, model: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "tokenizer").mkdir(parents=True)
    parts = [{"prefix": "data/x", "weight": 1.0}]
    blend = {"splits": {"train": parts, "validation": [], "test": parts}, "vocab_size": 512}
    (corpus / "blend.json").write_text(json.dumps(blend))
    (corpus / "data").mkdir()
    for ending in (".bin", ".idx"):
        (corpus / "data" / f"x{ending}").write_bytes(b"")
    given = overrides(model, f"data.corpus={corpus}", "student.hidden_size=16")
    assert all(part in refusal(["distil"], *given) for part in ("validation split", "train, test"))
    assert "calibration split" in refusal(["prune"], *given)
    assert "train split" not in refusal(["evaluate"], *given, "evaluate.split=validation")
    (corpus / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    assert "another one of 1" in refusal(["evaluate"], *given)
    (corpus / "blend.json").write_text(json.dumps(blend | {"vocab_size": 600}))
    assert "at most the 512 ids" in refusal(["evaluate"], *given)


def test_a_corpus_with_too_little_to_calibrate_on_or_a_missing_file_is_told_before_ranks_start(
    tmp_path: Path, model: Path
) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "data").mkdir(parents=True)
    blend = {"splits": {"calibration": [{"prefix": "data/x", "weight": 1.0}]}, "vocab_size": 512}
    (corpus / "blend.json").write_text(json.dumps(blend))
    given = overrides(model, f"data.corpus={corpus}", "student.hidden_size=16", "prune.calibration_samples=11")
    (corpus / "data" / "x.idx").write_bytes(b"")
    assert "the file data/x.bin" in refusal(["prune"], *given)
    (corpus / "data" / "x.bin").write_bytes(b"")
    assert "found another kind of file" in refusal(["prune"], *given)
    sequences = [10 * 64, 2]
    head = index_header.HEADER.pack(1, 8, len(sequences), len(sequences) + 1)
    rest = struct.pack("<2i2q3q", *sequences, 0, 1280, 0, 1, 2)
    (corpus / "data" / "x.idx").write_bytes(index_header.MAGIC + head + rest)
    assert validate(compose(given), ["prune"]) == []
    message = refusal(["prune"], *given, "prune.calibration_samples=12")
    assert "12 sequences of 64 tokens" in message and "found 11" in message


# NeMo 2 checkpoints

NEMO = {
    "_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
    "seq_length": 2048,
    "share_embeddings_and_output_weights": False,
    "normalization": "RMSNorm",
    "vocab_size": 512,
    "scale_factor": 8.0,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "old_context_len": 8192,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "nemo"
    (directory / "context").mkdir(parents=True)
    (directory / "weights").mkdir()
    (directory / "weights" / "metadata.json").write_text("{}")
    write_settings(directory, NEMO)
    return directory


def write_settings(checkpoint: Path, config: dict[str, object]) -> None:
    (checkpoint / "context" / "model.yaml").write_text(yaml.safe_dump({"config": config}))


def test_the_shape_of_a_nemo_checkpoint_is_that_of_its_settings(checkpoint: Path) -> None:
    config = compose([f"model.path={checkpoint}", "model=llama31_8b", "student=custom"])
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    assert planning.teacher_shape(config) == SHAPE.replace(rope_scaling=scaling)
    assert validate(config, ["plan"]) == []
    narrower = [f"model.path={checkpoint}", "teacher=take", "student=custom", "student.hidden_size=64"]
    assert "at most the teacher's 32" in refusal(["prune"], *narrower)


def test_a_nemo_checkpoint_is_taken_with_a_warning(checkpoint: Path) -> None:
    """Megatron opens its common.pt, a pickle: only the user can tell where it comes from."""
    config = Config()
    config.model.path = str(checkpoint)
    (warning,) = directories.warnings(config, ["teacher", "prune"])
    assert "common.pt is a pickle" in warning and "trust" in warning
    assert directories.warnings(config, ["plan"]) == []
    config.teacher.mode = TeacherMode.pretrain
    assert directories.warnings(config, ["teacher"]) == []


def test_classes_that_a_nemo_checkpoint_names_are_not_made(checkpoint: Path) -> None:
    path = checkpoint / "context" / "model.yaml"
    path.write_text(
        path.read_text().replace("num_layers: 2", "num_layers: 2\n  made: !!python/object/apply:os._exit [7]")
    )
    assert planning.teacher_shape(compose([f"model.path={checkpoint}"])).num_hidden_layers == 2


def test_without_vocab_size_the_tokenizers_ids_are_padded_as_nemo_pads_them(checkpoint: Path) -> None:
    write_settings(checkpoint, NEMO | {"vocab_size": None, "make_vocab_size_divisible_by": 64})
    given = ["teacher=take", f"model.path={checkpoint}", "student=custom"]
    message = refusal(["plan"], *given)
    assert "model.yaml" in message and "vocab_size" in message and "nemo_tokenizer" in message
    (checkpoint / "context" / "nemo_tokenizer").mkdir()
    tokens = {f"t{number}": number for number in range(500)}
    content = json.dumps({"model": {"vocab": tokens}})
    (checkpoint / "context" / "nemo_tokenizer" / "tokenizer.json").write_text(content)
    assert planning.teacher_shape(compose(given)).vocab_size == 512


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaConfig"}, ["Llama", "GemmaConfig"]),
        ({"ffn_hidden_size": None}, ["no ffn_hidden_size", "Hugging Face"]),
        ({"hidden_size": "wide"}, ["hidden_size='wide'", "whole numbers"]),
        ({"normalization": "LayerNorm"}, ["normalization", "RMSNorm", "LayerNorm"]),
        ({"num_query_groups": 3}, ["num_attention_heads", "num_key_value_heads=3"]),
        ({"layernorm_epsilon": "tiny"}, ["layernorm_epsilon", "'tiny'"]),
        ({"scale_factor": None}, ["factor", "None"]),
    ],
)
def test_nemo_settings_that_are_no_llamas_are_refused_by_name(
    checkpoint: Path, changes: dict[str, object], parts: list[str]
) -> None:
    write_settings(checkpoint, NEMO | changes)
    message = refusal(["teacher"], "teacher=take", f"model.path={checkpoint}", "student=custom")
    assert str(checkpoint / "context" / "model.yaml") in message and all(part in message for part in parts), message


def test_a_nemo_checkpoint_without_its_parts_is_refused(checkpoint: Path) -> None:
    given = ["teacher=take", f"model.path={checkpoint}", "student=custom"]
    path = checkpoint / "context" / "model.yaml"
    for content in ("", "[1, 2]", "config: 3", "a: b: c", "config: {"):
        path.write_text(content)
        assert str(path) in refusal(["teacher"], *given)
    path.unlink()
    assert "context/model.yaml and weights/" in refusal(["teacher"], *given)


def test_read_shape_is_what_was_written(model: Path) -> None:
    assert read_shape(model) == SHAPE
