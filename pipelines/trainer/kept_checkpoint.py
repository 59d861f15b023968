"""A checkpoint of a training as a Hugging Face directory, also while the training goes on and removes it."""

import shutil
from pathlib import Path

from megatron.core import dist_checkpointing

from pipelines import files
from pipelines.config import UserError
from pipelines.families import ModelShape
from pipelines.model import build, parallel
from pipelines.model.export import save_hugging_face
from pipelines.nemo_context import WEIGHTS
from pipelines.trainer import checkpoints, nemo_checkpoint


def convert_to_hugging_face(
    checkpoint: Path, output: Path, shape: ModelShape, tokenizer: Path, origin: Path | None = None
) -> None:
    """Write the trained model in `checkpoint`, checkpoints/step-NNNNNNN, as the directory `output`. Collective.

    origin: the model that the training started from, as `write_hub_files` takes it.

    Read as shards of the current layout, whatever the training's is. bf16 weights stay bf16; all others become fp32.
    Its files get second names beside `output` first, so that a training may remove its own meanwhile; nothing is
    written where the training writes. Raises UserError where the checkpoint is not there, or not as it was written.
    """
    held = output.with_name(output.name + ".checkpoint")
    parallel.on_first_rank(lambda: _hold(checkpoint, held))
    try:
        if changed := checkpoints.changed(held):
            raise UserError(
                f"{checkpoint}: expected its files as they were written, found {', '.join(changed)} changed. Choose "
                "another step."
            )
        metadata = dist_checkpointing.load_tensors_metadata(str(held / WEIGHTS))
        model = build.build_model(shape, precision=nemo_checkpoint.stored_precision(metadata))
        nemo_checkpoint.load_weights(model, held, shape, nemo_checkpoint.stored_shapes(metadata))
        save_hugging_face(model, output, shape, tokenizer=tokenizer, origin=origin)
    finally:
        parallel.on_first_rank(lambda: shutil.rmtree(held, ignore_errors=True))


def _hold(checkpoint: Path, held: Path) -> None:
    shutil.rmtree(held, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, held, copy_function=files.link_or_copy)
        whole = files.read_object(held / checkpoints.SIZES) == checkpoints.sizes(held)
    except OSError:  # shutil.Error is one
        whole = False
    if not whole:
        raise UserError(
            f"{checkpoint}: expected a whole checkpoint, found that the training has removed it. Choose a later step, "
            "or let it keep more with distil.keep_checkpoints."
        )
