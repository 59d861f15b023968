"""What runs in the ranks of test_documents.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipelines.model import parallel, quality, scoring
from pipelines.model.documents import separated
from pipelines.model.step import Batch, forward, training_step, wrap
from tests.model.cases_step import STUDENT, TEACHER, build_pair, reference, write_models

END = 3
LENGTHS = ((4, 5, 3), (1, 7, 4))  # of the documents of two rows, each with its end but the third, which the row cuts
STARTS = ((0, 4, 9), (0, 1, 8))
COUNTED = 24 - 5  # tokens


def rows() -> Batch:
    """(2, 12): documents of LENGTHS, every token but the ends of documents counted."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(END + 1, STUDENT.vocab_size, (2, 13), generator=generator)
    for row, place in ((0, 3), (0, 8), (1, 0), (1, 7), (1, 11)):
        ids[row, place] = END
    return as_batch(ids)


def as_batch(ids: torch.Tensor) -> Batch:
    tokens = ids[:, :-1].contiguous()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    mask = (tokens != END).float()
    return {"tokens": tokens, "labels": ids[:, 1:].contiguous(), "position_ids": positions, "loss_mask": mask}


def each_alone(batch: Batch) -> list[Batch]:
    """Every document as a row of its own, in their order."""
    found = []
    for row, (starts, lengths) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        for start, length in zip(starts, lengths, strict=True):
            cut = {name: value[row : row + 1, start : start + length] for name, value in batch.items()}
            found.append({name: value.contiguous() for name, value in cut.items()})
            found[-1]["position_ids"] = torch.arange(length).unsqueeze(0)
    return found


def leaks(directory: Path, tensor: int = 1, sequence_parallel: bool = False) -> dict[str, list[list[int]]]:
    """(row, position) of every counted token whose terms change, in any bit, with another text of the second document,
    by how documents share a row."""
    parallel.initialize(tensor)
    write_models(directory)
    pair = build_pair(directory, STUDENT, TEACHER, {"sequence_parallel": sequence_parallel})
    pair.eval()
    before, after = rows(), rows()
    after["tokens"][0, 4:8] = after["labels"][0, 3:7] = (before["tokens"][0, 4:8] - END) % 60 + END + 1
    found = {}
    for name, made in (("apart", lambda batch: separated(batch, END)), ("together", lambda batch: batch)):
        with torch.no_grad():
            terms = [forward(pair, made(batch)) for batch in (before, after)]
        changed = torch.zeros(2, 12, dtype=torch.bool)
        for term in ("kd", "ce"):
            changed |= (terms[0][term] != terms[1][term]).view(2, 12)
        found[name] = (changed & (before["loss_mask"] > 0)).nonzero().tolist()
    return found


def against_each_alone(directory: Path, tensor: int = 1, recompute: bool = False) -> dict[str, float]:
    """Relative errors of the terms and of every gradient, documents in shared rows against each one by itself."""
    parallel.initialize(tensor)
    write_models(directory)
    pair = build_pair(directory, STUDENT, TEACHER, {"recompute": recompute}, kd_weight=0.7, ce_weight=0.3)
    pair.eval()
    shared, alone = separated(rows(), END), each_alone(rows())
    errors = {}
    with torch.no_grad():
        together, apart = forward(pair, shared), [forward(pair, batch) for batch in alone]
    for term in ("kd", "ce"):
        expected = torch.cat([terms[term] for terms in apart], dim=1)
        errors[term] = ((together[term] - expected).norm() / expected.norm()).item()
    model = wrap(pair)
    gradients = []
    for batches in ([shared], alone):
        means = training_step(model, batches)
        gradients.append({n: p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        errors[f"tokens {len(batches)}"] = means["tokens"] / parallel_state.get_data_parallel_world_size() - COUNTED
    for name, expected in gradients[1].items():
        errors[name] = ((gradients[0][name] - expected).norm() / expected.norm()).item()
    return errors


def figures(directory: Path, tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False) -> dict[str, Any]:
    """Loss, KL and tokens of the student by `quality.evaluate`, and by the reference on rank 0."""
    parallel.initialize(tensor, pipeline)
    write_models(directory)
    pair = build_pair(directory, STUDENT, TEACHER, {"sequence_parallel": sequence_parallel})
    models = {"teacher": pair.teacher, "student": pair.student}
    found = quality.evaluate(models, [separated(rows(), END)], vocab_size=STUDENT.vocab_size)["student"]
    result = {"found": (found.loss, found.kl, found.tokens)}
    if dist.get_rank() == 0:
        weights = {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0, "end_of_document": END}
        batch = rows() | {"loss_mask": torch.ones(2, 12)}
        means = reference(directory, STUDENT, TEACHER, [[batch]], weights).means
        result["expected"] = (means["ce"], means["kd"], means["tokens"])
    return result


def scores(directory: Path, tensor: int = 1, sequence_parallel: bool = False) -> dict[str, list[float]]:
    """Block influence of the teacher's layers, a mean over tokens: rows of documents apart, and each document alone."""
    parallel.initialize(tensor)
    write_models(directory)
    pair = build_pair(directory, STUDENT, TEACHER, {"sequence_parallel": sequence_parallel})
    assert pair.teacher is not None
    row_by_row = [separated({n: v[i : i + 1] for n, v in rows().items()}, END) for i in range(2)]
    cases = {"apart": row_by_row}
    if not sequence_parallel:
        cases["alone"] = each_alone(rows())
    return {
        name: scoring.score(pair.teacher, batches, micro_batch_size=1).block_influence.tolist()
        for name, batches in cases.items()
    }
