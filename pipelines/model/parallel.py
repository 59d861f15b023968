"""Process groups: torch.distributed and Megatron's tensor x pipeline x context x data layout."""

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from pipelines import console, processes, stopping
from pipelines.config import UserError
from pipelines.model import cpu_runtime, engine

T = TypeVar("T")
_turns = itertools.count()


def initialize_distributed(device: str) -> None:
    """torch.distributed over the processes of torchrun or srun: gloo for "cpu", nccl for "cuda". Idempotent.

    Reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and what `processes` reads. Raises UserError where one is missing.
    """
    local = processes.local_rank()
    processes.local_world_size()  # which a training asks for later
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"{', '.join(missing)}: expected in the environment of every rank, found nothing. Start the ranks with "
            "torchrun, or set them from SLURM's own variables under srun."
        )
    if device == "cpu":
        cpu_runtime.install()
    else:
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        console.say(f"engine  {engine.description()}")


def initialize(tensor: int, pipeline: int = 1, context: int = 1, *, device: str = "cpu", seed: int = 1234) -> None:
    """Lay the processes out as tensor x context x data x pipeline (Megatron's order), replacing an earlier layout.

    The data-parallel size is what remains of the world size. Raises UserError where the layout does not divide it.
    """
    initialize_distributed(device)
    world = torch.distributed.get_world_size()
    if world % (tensor * pipeline * context):
        raise UserError(
            f"layout: expected tensor * pipeline * context to divide the {world} processes, "
            f"found {tensor} * {pipeline} * {context}."
        )
    if not _is_laid_out(tensor, pipeline, context):
        _destroy()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context
        )
    model_parallel_cuda_manual_seed(seed)


def _is_laid_out(tensor: int, pipeline: int, context: int) -> bool:
    return parallel_state.model_parallel_is_initialized() and (tensor, pipeline, context) == (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def _destroy() -> None:
    """Megatron forgets most of its groups without closing them; an open gloo group keeps its threads and sockets."""
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    if groups:
        torch.distributed.barrier()
    for group in groups:
        if group in torch.distributed.distributed_c10d._world.pg_map:
            torch.distributed.destroy_process_group(group)


def on_first_rank(action: Callable[[], T]) -> T:
    """Run on global rank 0 while the others wait, however long it takes. Every rank gets what it returned, as JSON.

    To slice, reload or remove a large model on a slow disk can outlast the timeout of any collective. So the others are
    in none while they wait: they look into the store of the process group. Every rank calls it; one barrier over all
    ranks at the end. Where it fails on rank 0 it fails on every rank: UserError as UserError, all else as RuntimeError.
    """
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    key = f"on_first_rank-{next(_turns)}"
    if torch.distributed.get_rank() == 0:
        try:
            result = action()
            store.set(key, json.dumps({"result": result}))
        except BaseException as error:
            store.set(key, json.dumps({"error": str(error), "user": isinstance(error, UserError)}))
            raise
        torch.distributed.barrier()
        return result
    while not store.check([key]):
        time.sleep(0.05)
    word = json.loads(store.get(key))
    if "error" in word:
        raise UserError(word["error"]) if word["user"] else RuntimeError(f"rank 0: {word['error']}")
    torch.distributed.barrier()
    return word["result"]


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Run on every rank, each at its own work, however long it takes. Every rank gets what all returned, by rank.

    Results pass as JSON. As in on_first_rank, and for the same reason, the ranks wait for each other in no collective.
    Every rank calls it; one barrier over all ranks at the end. Where it fails on one rank it fails on every rank:
    UserError as UserError, all else as RuntimeError on the others.
    """
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    key = f"on_every_rank-{next(_turns)}"
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        store.set(f"{key}-{rank}", json.dumps({"result": action()}))
    except BaseException as error:
        store.set(f"{key}-{rank}", json.dumps({"error": str(error), "user": isinstance(error, UserError)}))
        raise
    found = []
    for other in range(world):
        while not store.check([f"{key}-{other}"]):
            time.sleep(0.05)
        word = json.loads(store.get(f"{key}-{other}"))
        if "error" in word:
            raise UserError(word["error"]) if word["user"] else RuntimeError(f"rank {other}: {word['error']}")
        found.append(word["result"])
    torch.distributed.barrier()
    return found


def stop_where_asked(kept: str) -> None:
    """Raises Stopped on every rank where the first one was asked to stop. kept: the file from which the stage goes on.

    For work that lasts and keeps what it has measured. Every rank calls it; one barrier over all ranks.
    """
    if on_first_rank(stopping.asked):
        raise stopping.Stopped(f"stopped as asked: {kept} holds what is measured, and the same command continues.")


def torch_device(device: str) -> torch.device:
    return torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
