"""Models behind the owner's service and a client, in one process."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from data_owner_client import InProcessConnection, Pair, RemotePlm, Task
from data_owner_client.adapter.candidates import token_set
from data_owner_client.memory.encode import encode_all
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.tokenized_pairs import tokenize_pairs
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.likelihood import plm_target_logprobs
from plm_owner_server.cli.server_process import load_service
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.settings import ServerSettings
from protocol.errors import NotReady


def model_folder(name: str) -> Path:
    """The folder of a model that `pema-server --model` takes."""
    return resolve(name, ServerSettings(_env_file=None).cache_dir).folder


def save_model(model: PreTrainedModel, like: Path, folder: Path) -> None:
    """Write a model that takes the tokenizer of the model in `like`."""
    model.save_pretrained(folder)
    load_tokenizer(like).save_pretrained(folder)


@contextmanager
def served(model: str | Path) -> Iterator[RemotePlm]:
    """The model of a name or a folder, in float32 on the CPU, as a client sees it."""
    service = load_service(ServerSettings(_env_file=None, model=str(model), device="cpu", dtype="float32"))
    try:
        yield RemotePlm(InProcessConnection(service))
    finally:
        service.scheduler.close(NotReady("The benchmark has ended.", hint="Start it again."))
        del service
        gc.collect()  # the model, before the next one is loaded


def rows_of(plm: RemotePlm, task: Task, pairs: Sequence[Pair]) -> MemoryRows:
    """Teacher-forced rows of the pairs with log-sum-exp."""
    tokenized = tokenize_pairs(plm, [task] * len(pairs), pairs, label="pair")
    return encode_all(plm, tokenized, Reporter())


def perplexity(plm: RemotePlm, task: Task, pairs: Sequence[Pair]) -> float:
    """Perplexity of the targets under the model alone, per token, their ends included."""
    rows = rows_of(plm, task, pairs)
    ids_K = token_set([rows.target_N])
    return math.exp(-plm_target_logprobs(plm.head_rows(ids_K), ids_K, rows).mean().item())
