"""Process of `benchmarks.gateway`: answers texts by `translate`, or asks a gateway for them as concurrent clients.

It prints `ready`, waits for a line on standard input, and reports its seconds and its texts in JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

_TIMEOUT_SECONDS = 600.0


def main(what: str, *arguments: str) -> None:
    """Do the one or the other."""
    record = _translate(*arguments) if what == "translate" else _ask(*arguments)
    print(json.dumps(record))


def _translate(url: str, adapter: str, texts: str, batch_size: str, threads: str) -> dict[str, Any]:
    """Translate all texts in batches, as the command does."""
    import torch

    from data_owner_client import DecodingSettings, TrainedAdapter, connect, translate

    torch.set_num_threads(int(threads))
    trained, settings = TrainedAdapter.load(Path(adapter)), DecodingSettings(batch_size=int(batch_size))
    sources = json.loads(Path(texts).read_text(encoding="utf-8"))
    with connect(url) as plm:
        translate(plm, sources[:1], adapter=trained, decoding=settings)  # loads everything before the clock starts
        started = _started()
        generation = translate(plm, sources, adapter=trained, decoding=settings)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "texts": generation.texts, "tokens": sum(map(len, generation.token_ids))}


def _ask(url: str, model: str, texts: str, clients: str, kind: str) -> dict[str, Any]:
    """Ask for all texts, so many at a time."""
    sources = json.loads(Path(texts).read_text(encoding="utf-8"))
    return asyncio.run(_ask_all(url, model, sources, int(clients), streamed=kind == "streamed"))


async def _ask_all(url: str, model: str, sources: Sequence[str], clients: int, *, streamed: bool) -> dict[str, Any]:
    answers, left = [""] * len(sources), iter(enumerate(sources))
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, limits=limits, trust_env=False) as client:

        async def ask_in_turn() -> None:
            for number, source in left:
                answers[number] = await ask(client, model, source, streamed=streamed)

        await ask(client, model, sources[0], streamed=streamed)
        started = _started()
        await asyncio.gather(*(ask_in_turn() for _ in range(clients)))
        return {"seconds": time.perf_counter() - started, "texts": answers}


def _started() -> float:
    """The time when the benchmark says that the work may begin."""
    print("ready", flush=True)
    sys.stdin.readline()
    return time.perf_counter()


async def ask(client: httpx.AsyncClient, model: str, source: str, *, streamed: bool) -> str:
    """The adapted model's answer to a text, whole or as a stream.

    Raises:
        httpx.HTTPError: the gateway refused it, or broke off.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": source}]}
    if not streamed:
        response = await client.post("/v1/chat/completions", json=body)
        return str(response.raise_for_status().json()["choices"][0]["message"]["content"])
    pieces = list[str]()
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                pieces.append(choice["delta"].get("content") or "")
    return "".join(pieces)


if __name__ == "__main__":
    main(*sys.argv[1:])
