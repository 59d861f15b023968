"""The student as a verified Hugging Face directory, and optionally as a NeMo 2 checkpoint and with quantized weights.

With export.step a checkpoint of distil's training is exported, whose files have the checksums that it was saved with,
also while that training goes on: nothing of its directory is locked or changed.

The copy takes its name only after it has passed: every file has the hash that the distil stage recorded, transformers
opens it, and its logits on held-out text equal those of our sharded model read from distil/hf.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipelines import artifacts, console, files
from pipelines.config import Config, UserError
from pipelines.families import read_shape
from pipelines.model import parallel
from pipelines.model.safetensors_stream import Tensors, Writer
from pipelines.report import card, summary
from pipelines.report.record import read_run
from pipelines.safetensors_header import INDEX
from pipelines.serving import tools, variants
from pipelines.serving.reloaded import compare, generate, greedy, initialize, reference_logits, reload

PROMPT_TOKENS = 16  # that a serving tool reads, and writes, where one is installed


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config = context.config
    source, target = artifacts.student_directory(config), context.directory / "hf"
    if config.export.step:
        source = context.directory / "trained"
        _read_checkpoint(config, source)
    elif console.rank() == 0:
        check_hashes(config, source)
    shape = read_shape(source)
    tokens, reference = reference_logits(config, source, shape)
    found = parallel.on_first_rank(lambda: _copy(config, source, target, tokens, reference))
    console.say(
        f"export  {target}: {found['bytes']:,} bytes; logits in transformers differ by "
        f"{found['relative_difference']:.1e} (largest {found['largest_difference']:.1e})\n"
        f"export  generated: {found['generated']!r}"
    )
    for line in [*found["obstacles"], *tools.in_words(found["opens"])]:
        console.say(f"export  {line}")
    for line in card.terms_of(config).asks():
        console.say(f"export  terms: {line}")
    if config.export.nemo:
        from pipelines.trainer.nemo_checkpoint import save_nemo_checkpoint

        save_nemo_checkpoint(target, context.directory / "nemo", artifacts.corpus_directory(config) / "tokenizer")
        console.say(f"export  {context.directory / 'nemo'}: NeMo 2 checkpoint")
    if config.export.step:
        parallel.on_first_rank(lambda: shutil.rmtree(source))
    if config.export.quantize:
        found["quantized"] = _quantized(config, context.directory, target)
    return {"model": str(target)} | found


def _read_checkpoint(config: Config, output: Path) -> None:
    """Write what the checkpoint of export.step holds as a Hugging Face directory. Collective."""
    from pipelines.trainer.kept_checkpoint import convert_to_hugging_face

    initialize(config)
    checkpoint, start = artifacts.kept_checkpoint(config), artifacts.student_start_directory(config)
    console.say(f"export  reading {checkpoint}")
    tokenizer = artifacts.corpus_directory(config) / "tokenizer"
    convert_to_hugging_face(checkpoint, output, read_shape(start), tokenizer, start)


def _copy(config: Config, source: Path, target: Path, tokens: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """The directory with its model card, reloaded and compared before it gets its name; what was found. On one rank."""
    found: dict[str, Any] = {}
    console.say(f"export  copying {source}")
    with _copied(source, target, config.export.shard_bytes) as partial:
        for text, content in _words(config, source).items():
            files.write_atomic(partial / text, content)
        model = reload(partial)
        found |= compare(partial, model, tokens, reference, tolerance=config.export.tolerance)
        found["generated"] = generate(partial, model, config.export.prompt, config.export.new_tokens)
        found["obstacles"] = tools.obstacles(partial)
        prompt = tokens[0, :PROMPT_TOKENS].tolist()
        found["opens"] = tools.opened(partial, prompt, lambda: greedy(model, prompt, PROMPT_TOKENS))
    return found | {"bytes": sum(file.stat().st_size for file in target.iterdir())}


@contextmanager
def _copied(source: Path, target: Path, shard_bytes: float | None) -> Iterator[Path]:
    """A directory under construction with the files of `source`; its weights cut anew with shard_bytes."""
    if shard_bytes is None:
        with files.new_directory(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
            yield partial
        return
    tensors = Tensors(source)
    announced = {name: (tensors.shape(name), tensors.dtype(name)) for name in tensors.names}
    with Writer(target, announced, shard_bytes) as writer:
        weights = shutil.ignore_patterns("*.safetensors", INDEX)
        shutil.copytree(source, writer.partial, dirs_exist_ok=True, ignore=weights)
        for name in tensors.names:
            writer.write(name, tensors[name])
        yield writer.partial


def check_hashes(config: Config, source: Path) -> None:
    """Raises UserError where a file of distil/hf is not the one that the distil stage finished with."""
    stage = source.parent
    recorded = artifacts.read_manifest(stage).get("outputs", {})
    prefix = f"{source.name}/"
    expected = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    if not expected:
        raise UserError(f"{stage}: expected a finished distil stage with the hashes of its files, found none.")
    found = files.fingerprint(source, artifacts.sidecar_directory(config))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            now = "is missing" if name not in found else "was added" if name not in expected else "has changed"
            raise UserError(
                f"{source}: expected the files that distil wrote, found that {name} {now} since. "
                "Restore it, or run stage=distil overwrite=true again."
            )


def _words(config: Config, student: Path, quantized: dict[str, Any] | None = None, form: str = "") -> dict[str, bytes]:
    """{name: content} of the model card and of the texts that its terms ask for. quantized: what quantized.json has of
    its forms; form: the one of them that the card is of."""
    record = read_run(config)
    results, under = summary.results(record) | {"quantized": quantized or {}}, card.terms_of(config)
    row = next((row for row in (quantized or {}).get("variants", []) if row["name"] == form), None)
    teacher = artifacts.teacher_directory(config)
    text = card.render(
        record, results, teacher=teacher, student=student, prompt=config.export.prompt, under=under, form=row
    )
    words = {file.name: file.read_bytes() for file in under.files}
    if under.notice and not any(name.lower().startswith("notice") for name in words):
        words["NOTICE"] = f"{under.notice}\n".encode()
    return words | {"README.md": text.encode()}


def _quantized(config: Config, place: Path, student: Path) -> list[str]:
    """Write the quantized forms beside the student, quantized.json, and their cards; the names of those that were made.
    Collective."""
    found = variants.measure(config, student, place)
    names = [row["name"] for row in found["variants"] if "refused" not in row]

    def write() -> None:
        files.write_json(place / "quantized.json", found)
        for name in [
            "",
            *(row["name"] for row in found["variants"] if row["of"] == "student" and row["name"] in names),
        ]:
            card_ = _words(config, student, found, name)["README.md"]
            files.write_atomic(place / (name or student.name) / "README.md", card_)

    parallel.on_first_rank(write)
    return names
