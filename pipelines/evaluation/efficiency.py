"""What the models cost to use, in the form they leave in: Hugging Face directories, opened by transformers.

Every request is a batch of prompts of held-out text, read at once and continued greedily, one token of each sequence at
a time, with a cache of keys and values. The models take turns, request by request, so that whatever else the machine
does meets all alike. The median counts: of the requests' first tokens, and of the times between one token and the next.
One process, on one device. vLLM, where it is asked for, answers the same requests afterwards, one model after another.
"""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipelines import artifacts, console, files
from pipelines.choices import Engine
from pipelines.config import Config, UserError
from pipelines.evaluation import vllm_speed
from pipelines.evaluation.hugging_face import DTYPES
from pipelines.model import measure, parallel
from pipelines.model.quality import TEACHER
from pipelines.model.windows import Windows, split_prefixes
from pipelines.safetensors_header import weight_bytes

FIGURES = ("time_to_first_token_ms", "prefill_tokens_per_second", "decode_tokens_per_second")
PERCENTILES = (50, 90, 99)
ROOM = 0.9  # share of a GPU's free memory that vLLM may take, for weights and cache


@dataclass(frozen=True)
class Request:
    """batch: sequences that are continued together. prompt_tokens: of each before, new_tokens: of each after."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Times:
    """Seconds until the first token of every sequence is known, and between one token and the next."""

    first: float
    between: tuple[float, ...]


def of_models(config: Config, directories: Mapping[str, Path], precision: str, device: str) -> dict[str, Any]:
    """What results.json has as "efficiency": what evaluate.efficiency names, on prompts of the evaluated split. On rank
    0, with its device to itself as far as this stage is concerned."""
    settings, place = config.evaluate.efficiency, parallel.torch_device(device)
    corpus = artifacts.corpus_directory(config)
    prefixes = split_prefixes(corpus, config.evaluate.split)

    def prompts(batch: int, length: int) -> Tensor:
        return _prompts(Windows(prefixes, length), batch)

    requests = [
        Request(batch, length, settings.new_tokens)
        for length in settings.prompt_tokens
        for batch in settings.batch_sizes
    ]
    _free()
    threads, rounds = torch.get_num_threads(), settings.rounds
    torch.set_num_threads(settings.threads or threads)
    found = measured_on(precision, place, rounds)
    try:
        if Engine.transformers in settings.engines:
            with console.progress("efficiency", len(requests) * (1 + rounds), "turns") as bar:
                found = compare(
                    directories,
                    prompts,
                    requests,
                    precision=precision,
                    device=place,
                    rounds=rounds,
                    advance=bar.advance,
                )
    finally:
        torch.set_num_threads(threads)
    if Engine.vllm not in settings.engines:
        return found
    _free()
    more = by_vllm(
        directories, prompts, requests, tokenizer=corpus / "tokenizer", precision=precision, device=place,
        rounds=rounds, seed=config.run.seed,
    )  # fmt: skip
    forms = ", ".join(filter(None, (found["form"], more["form"])))
    rows, missing = found["rows"] + more["rows"], found["missing"] | more["missing"]
    return found | {"form": forms, "rows": rows, "missing": missing}


def measured_on(precision: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """What holds for every row, and no row yet."""
    threads = torch.get_num_threads() if device.type == "cpu" else None
    where = {
        "device": measure.device_name(device),
        "threads": threads,
        "dtype": precision,
        "form": "",
        "rounds": rounds,
    }
    return where | {"rows": [], "models": {}, "missing": {}}


def by_vllm(
    directories: Mapping[str, Path],
    prompts: Callable[[int, int], Tensor],
    requests: Sequence[Request],
    *,
    tokenizer: Path,
    precision: str,
    device: torch.device,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """{"form": "vLLM <version>", "rows", "missing"}: as `compare`, without latencies and memory.

    tokenizer: of a directory that has none. Where vLLM is not installed, or fails on a model, that is "missing" with
    the reason, as "vllm" or "vllm.<model>". Rows have no "ratio" where it fails on the teacher. No collective.
    """
    if not vllm_speed.installed():
        reason = (
            "vllm is not installed. Install it into this environment (pip install vllm; it brings its own torch), or "
            "leave it out of evaluate.efficiency.engines."
        )
        return {"form": "", "rows": [], "missing": {"vllm": reason}}
    texts = [prompts(each.batch, each.prompt_tokens) for each in requests]
    share, version = None, ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = round(ROOM * free / total, 3)
    found: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for name, directory in directories.items():
        console.say(f"evaluate  efficiency: {name} in vLLM")
        vocabulary = int(files.read_object(directory / "config.json")["vocab_size"])
        own = (directory / "tokenizer_config.json").is_file()
        asked = [
            ((ids % vocabulary).tolist(), request.new_tokens) for ids, request in zip(texts, requests, strict=True)
        ]
        try:
            answer = vllm_speed.times(
                directory, directory if own else tokenizer, asked, precision=precision, seed=seed, rounds=rounds,
                share=share,
            )  # fmt: skip
            found[name] = [
                vllm_row(name, request, seconds["first"], seconds["whole"])
                for request, seconds in zip(requests, answer["times"], strict=True)
            ]
            version = f"vLLM {answer['version']}"
        except UserError as error:
            missing[f"vllm.{name}"] = str(error)
    by_request = zip(*found.values(), strict=True)
    return {"form": version, "rows": [row for rows in by_request for row in _with_ratios([*rows])], "missing": missing}


def compare(
    directories: Mapping[str, Path],
    prompts: Callable[[int, int], Tensor],
    requests: Sequence[Request],
    *,
    precision: str,
    device: torch.device,
    rounds: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """What results.json has as "efficiency".

    directories: by name. prompts(batch, length): ids (batch, length) int64. precision: "fp32" or "bf16". rounds: of
    timed requests per model, after one that does not count. advance: called after each turn of all models. No
    collective. A model of another vocabulary reads ids of its own, as many. One that does not open is in "missing" with
    the reason. Raises UserError where the teacher does not open, or where together they do not fit into the device.
    """
    models, missing = _all_opened(directories, requests, precision, device)
    rows: list[dict[str, Any]] = []
    try:
        for request in requests:
            times: dict[str, list[Times]] = {name: [] for name in models}
            ids = prompts(request.batch, request.prompt_tokens).to(device)
            asked = {name: ids % model.config.vocab_size for name, model in models.items()}
            for turn in range(1 + rounds):
                for name, model in models.items():
                    found = answer(model, asked[name], request.new_tokens)
                    if turn:
                        times[name].append(found)
                advance()
            rows += _with_ratios([row(name, request, seen) for name, seen in times.items()])
        largest = max(requests, key=lambda each: each.batch * (each.prompt_tokens + each.new_tokens))
        ids = prompts(largest.batch, largest.prompt_tokens).to(device)
        sizes = {
            name: {
                "bytes_on_disk": weight_bytes(directories[name]),
                "peak_bytes": _peak_bytes(model, ids % model.config.vocab_size, largest.new_tokens, device),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
            for name, model in models.items()
        }
    except torch.OutOfMemoryError:
        raise UserError(
            f"evaluate.efficiency: expected {', '.join(models)} to fit into one device together with a batch of "
            f"{max(each.batch for each in requests)}, found its memory too small. Lower "
            "evaluate.efficiency.batch_sizes, or set it to [] to leave this out."
        ) from None
    finally:
        models.clear()
        _free()
    return measured_on(precision, device, rounds) | {
        "form": f"transformers {transformers.__version__}",
        "rows": rows,
        "models": sizes,
        "missing": missing,
    }


@torch.no_grad()
def answer(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Times:
    """Read prompt (batch, length) and continue each sequence greedily by new_tokens, end of text or not."""
    device, marks = prompt.device, []
    measure.synchronize(device)
    start, ids, cache = perf_counter(), prompt, None
    for _ in range(new_tokens):
        found = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = found.logits[:, -1].argmax(-1, keepdim=True), found.past_key_values
        measure.synchronize(device)
        marks.append(perf_counter())
    between = tuple(later - earlier for earlier, later in zip(marks, marks[1:], strict=False))
    return Times(marks[0] - start, between)


def row(name: str, request: Request, times: Sequence[Times]) -> dict[str, Any]:
    """One model's figures at one kind of request. latency_ms: between one token and the next, over all requests."""
    first = statistics.median(each.first for each in times)
    between = torch.tensor([step for each in times for step in each.between], dtype=torch.float64)
    percentiles = {f"p{share}": 1e3 * torch.quantile(between, share / 100).item() for share in PERCENTILES}
    return _row(Engine.transformers, name, request, first, between.median().item()) | {"latency_ms": percentiles}


def vllm_row(name: str, request: Request, first: Sequence[float], whole: Sequence[float]) -> dict[str, Any]:
    """The same by vLLM, from seconds for one new token and for all; it tells no latencies between tokens.

    Raises UserError where all take no longer than the first.
    """
    start, rest = statistics.median(first), statistics.median(whole) - statistics.median(first)
    if rest <= 0:
        raise UserError(
            f"evaluate.efficiency: expected {request.new_tokens} tokens to take vLLM longer than the first of them, "
            "found no difference. Raise evaluate.efficiency.new_tokens or evaluate.efficiency.rounds."
        )
    return _row(Engine.vllm, name, request, start, rest / (request.new_tokens - 1))


def _row(engine: Engine, name: str, request: Request, first: float, between: float) -> dict[str, Any]:
    return {
        "engine": engine.value,
        "model": name,
        "batch": request.batch,
        "prompt_tokens": request.prompt_tokens,
        "new_tokens": request.new_tokens,
        "time_to_first_token_ms": 1e3 * first,
        "prefill_tokens_per_second": request.batch * request.prompt_tokens / first,
        "decode_tokens_per_second": request.batch / between,
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one kind of request, each also with its figures as shares of the teacher's where that is there."""
    teacher = next((each for each in rows if each["model"] == TEACHER), None)
    if teacher is None:
        return rows
    found = []
    for each in rows:
        ratio: dict[str, Any] = {name: each[name] / teacher[name] for name in FIGURES}
        if latency := each.get("latency_ms"):
            ratio["latency_ms"] = {name: value / teacher["latency_ms"][name] for name, value in latency.items()}
        found.append(each | {"ratio": ratio})
    return found


def _all_opened(
    directories: Mapping[str, Path], requests: Sequence[Request], precision: str, device: torch.device
) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """(models by name, reasons for those that cannot answer the requests). Raises UserError for the teacher."""
    models, missing = {}, {}
    for name, directory in directories.items():
        try:
            model = _opened(directory, precision, device)
            _check_lengths(name, model, requests)
            models[name] = model
        except UserError as error:
            if name == TEACHER:
                raise
            missing[name] = str(error)
    return models, missing


def _opened(directory: Path, precision: str, device: torch.device) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[precision], local_files_only=True)
        return model.eval().to(device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"evaluate.efficiency: expected {directory} to fit into one device beside the other models, found its "
            "memory too small. Set evaluate.efficiency.batch_sizes=[] to leave this out."
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{directory}: expected a directory that transformers opens, found: {error}") from None


def _check_lengths(name: str, model: PreTrainedModel, requests: Sequence[Request]) -> None:
    longest = max(each.prompt_tokens + each.new_tokens for each in requests)
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise UserError(
            f"evaluate.efficiency: expected prompt_tokens and new_tokens within the {limit} positions of the {name}, "
            f"found {longest}. Lower one of them."
        )


def _prompts(windows: Windows, batch: int) -> Tensor:
    """(batch, length) ids of held-out text, the same again where there is less of it."""
    return torch.stack([windows[number % len(windows)][:-1] for number in range(batch)])


def _free() -> None:
    """What models that are gone have held on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak_bytes(model: PreTrainedModel, ids: Tensor, new_tokens: int, device: torch.device) -> int:
    """The most that a request holds at a time, weights included."""
    beyond, _ = measure.peak_bytes_here(lambda: answer(model, ids, new_tokens), device)
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}  # a tied head once
    return beyond + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
