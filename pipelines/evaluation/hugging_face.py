"""The models of an evaluation in transformers, whole, each on this rank's device."""

import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipelines import processes
from pipelines.config import UserError
from pipelines.safetensors_header import read_entries
from pipelines.serving.reloaded import reload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROOM = 0.8  # share of a device's free memory that weights may take: activations and caches need the rest
FEW_IDS = 8  # on which a model is tried


def open_tokenizer(directory: Path, corpus: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, or the corpus's where its directory has none. Raises UserError."""
    place = directory if (directory / "tokenizer_config.json").is_file() else corpus / "tokenizer"
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{place}: expected a tokenizer that transformers opens, found: {error}") from None


def load(directory: Path, *, precision: str, device: str, spread: bool = False) -> PreTrainedModel:
    """The model on this rank's device ("cpu" or "cuda"), or with `spread` its layers over all devices of the machine
    (accelerate's device map).

    Raises UserError where it does not fit, cannot be opened, or computes what is not finite.
    """
    dtype = DTYPES[precision]
    if spread:
        model = reload(directory, dtype, device_map="auto")
    elif device == "cuda":
        torch.cuda.empty_cache()
        place = torch.device("cuda", processes.local_rank())
        sizes = (entry.shape for entry in read_entries(directory).values())
        needed, (free, _) = sum(map(math.prod, sizes)) * dtype.itemsize, torch.cuda.mem_get_info(place)
        if needed > ROOM * free:
            raise UserError(
                f"{directory}: expected room for {needed / 1e9:.1f} GB of weights on one device, found "
                f"{free / 1e9:.1f} GB free. With evaluate.tasks.parallelize=true its layers lie on all devices of a "
                "machine, one behind the other."
            )
        model = reload(directory, dtype).to(place)  # type: ignore[arg-type]
    else:
        model = reload(directory, dtype)
    ids = torch.arange(FEW_IDS, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        if not bool(model(ids).logits.isfinite().all()):
            raise UserError(
                f"{directory}: expected finite logits, found NaN or infinity. Check the weights; with bf16 try fp32."
            )
    return model
