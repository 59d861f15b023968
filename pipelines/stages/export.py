"""The student as a verified Hugging Face directory, and optionally as a NeMo 2 checkpoint.

With export.step a checkpoint of distil's training is exported, whose files have the checksums that it was saved with,
also while that training goes on: nothing of its directory is locked or changed.

The copy takes its name only after it has passed: every file has the hash that the distil stage recorded, transformers
opens it, and its logits on held-out text equal those of our sharded model read from distil/hf.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipelines import artifacts, console, files
from pipelines.config import Config, UserError, layout, without_context
from pipelines.families import ModelShape, read_shape
from pipelines.model import parallel, quality
from pipelines.model.build import build_model
from pipelines.model.weights import load_hugging_face
from pipelines.model.windows import Windows, batches, split_prefixes
from pipelines.report import card, summary
from pipelines.report.record import read_run

WINDOWS, WINDOW_TOKENS = 2, 64  # held-out text on which logits are compared


def run(context: artifacts.StageContext) -> dict[str, Any]:
    config = context.config
    source, target = artifacts.student_directory(config), context.directory / "hf"
    if config.export.step:
        source = context.directory / "trained"
        _read_checkpoint(config, source)
    elif console.rank() == 0:
        check_hashes(config, source)
    shape = read_shape(source)
    tokens, reference = _reference_logits(config, source, shape)
    found = parallel.on_first_rank(lambda: _copy(config, source, target, tokens, reference))
    console.say(
        f"export  {target}: {found['bytes']:,} bytes; logits in transformers differ by "
        f"{found['relative_difference']:.1e} (largest {found['largest_difference']:.1e})\n"
        f"export  generated: {found['generated']!r}"
    )
    if config.export.nemo:
        from pipelines.trainer.nemo_checkpoint import save_nemo_checkpoint

        save_nemo_checkpoint(target, context.directory / "nemo", artifacts.corpus_directory(config) / "tokenizer")
        console.say(f"export  {context.directory / 'nemo'}: NeMo 2 checkpoint")
    if config.export.step:
        parallel.on_first_rank(lambda: shutil.rmtree(source))
    return {"model": str(target)} | found


def _read_checkpoint(config: Config, output: Path) -> None:
    """Write what the checkpoint of export.step holds as a Hugging Face directory. Collective."""
    from pipelines.trainer.kept_checkpoint import convert_to_hugging_face

    _initialize(config)
    checkpoint, start = artifacts.kept_checkpoint(config), artifacts.student_start_directory(config)
    console.say(f"export  reading {checkpoint}")
    tokenizer = artifacts.corpus_directory(config) / "tokenizer"
    convert_to_hugging_face(checkpoint, output, read_shape(start), tokenizer)


def _initialize(config: Config) -> None:
    ranks = without_context(layout(config.parallel))
    parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)


def _copy(config: Config, source: Path, target: Path, tokens: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """The directory with its model card, reloaded and compared before it gets its name; what was found. On one rank."""
    found: dict[str, Any] = {}
    with files.new_directory(target) as partial:
        console.say(f"export  copying {source}")
        shutil.copytree(source, partial, dirs_exist_ok=True)
        files.write_atomic(partial / "README.md", _card(config, source))
        model = reload(partial)
        found |= compare(partial, model, tokens, reference, tolerance=config.export.tolerance)
        found["generated"] = generate(partial, model, config.export.prompt, config.export.new_tokens)
    return found | {"bytes": sum(file.stat().st_size for file in target.iterdir())}


def _reference_logits(config: Config, source: Path, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens (windows, sequence), logits (windows, sequence, vocabulary) fp32 on the CPU) of our sharded model."""
    _initialize(config)
    windows = Windows(split_prefixes(artifacts.corpus_directory(config), config.evaluate.split), WINDOW_TOKENS)
    batch = next(batches(windows, WINDOWS, limit=1))
    model = build_model(shape, precision="fp32", sequence_length=WINDOW_TOKENS)
    load_hugging_face(model, source, shape)
    logits = quality.gathered_logits(model, batch, shape.vocab_size)
    return batch["tokens"], logits.float().cpu()


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


def reload(directory: Path) -> PreTrainedModel:
    """Open a directory with transformers, fp32 on the CPU.

    Raises UserError where transformers cannot open it, or where weights are missing or left over.
    """
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{directory}: expected a directory that transformers opens, found: {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes.get(kind):
            raise UserError(f"{directory}: expected weights that fit config.json, found {kind}: {sorted(notes[kind])}")
    return model.eval()


def compare(
    directory: Path, model: PreTrainedModel, tokens: torch.Tensor, reference: torch.Tensor, *, tolerance: float
) -> dict[str, float]:
    """The model's logits on tokens (windows, sequence) against reference (windows, sequence, vocabulary).

    Returns relative_difference norm(a - b) / norm(b) and largest_difference. Raises UserError above the tolerance.
    """
    with torch.no_grad():
        logits = model(tokens).logits.float()
    if logits.shape != reference.shape:
        raise UserError(f"{directory}: expected logits {tuple(reference.shape)}, found {tuple(logits.shape)}.")
    difference = (logits - reference).norm().item() / reference.norm().item()
    if not difference <= tolerance:
        raise UserError(
            f"{directory}: expected transformers' logits within export.tolerance={tolerance:g} of the sharded model's, "
            f"found a relative difference of {difference:.2e}. Its weights or its config.json are not the student's."
        )
    return {"relative_difference": difference, "largest_difference": (logits - reference).abs().max().item()}


def generate(directory: Path, model: PreTrainedModel, prompt: str, new_tokens: int) -> str:
    """The prompt and what transformers' generate writes behind it, with the directory's own generation_config."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=new_tokens)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _card(config: Config, source: Path) -> str:
    record = read_run(config)
    teacher = artifacts.teacher_directory(config)
    results = summary.results(record)
    return card.render(record, results, teacher=teacher, student=source, prompt=config.export.prompt)
