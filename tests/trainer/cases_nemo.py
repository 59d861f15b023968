"""Run in ranks: NeMo 2 checkpoints from and to Hugging Face directories."""

from pathlib import Path


def write_and_read_back(hugging_face: str, checkpoint: str, output: str, tokenizer: str, tensor: int) -> None:
    from pipelines.model import parallel

    parallel.initialize(tensor)
    from pipelines.trainer import cpu_runtime

    cpu_runtime.install()
    from pipelines.trainer.nemo_checkpoint import convert_to_hugging_face, save_nemo_checkpoint

    save_nemo_checkpoint(Path(hugging_face), Path(checkpoint), Path(tokenizer))
    convert_to_hugging_face(Path(checkpoint), Path(output), Path(tokenizer))
