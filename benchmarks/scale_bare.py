"""Bare vLLM in its own environment, on prepared texts; reports in JSON as often as it is asked.

It computes the states of all positions by its pooling runner (`encode`), or tokens after prompts (`decode_…`). Only
settings that are needed for correct states are set, such as the block size, to the values of the server's engine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.scale_worker import LOOK_AHEAD

_Rows = Callable[[list[int]], Awaitable[int]]
"""The number of rows that vLLM gives for one text."""


def _pooling(options: dict[str, Any]) -> tuple[Any, _Rows]:
    """vLLM and a function for the states of all positions of a text."""
    from vllm import AsyncEngineArgs
    from vllm.config import PoolerConfig
    from vllm.pooling_params import PoolingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    pooler = PoolerConfig(use_activation=False, seq_pooling_type="LAST", tok_pooling_type="ALL")
    options |= {"runner": "pooling", "convert": "embed", "enable_prefix_caching": False, "pooler_config": pooler}
    llm, names = AsyncLLM.from_engine_args(AsyncEngineArgs(**options)), itertools.count()

    async def rows(ids: list[int]) -> int:
        params = PoolingParams(task="token_embed", use_activation=False)
        async for output in llm.encode({"prompt_token_ids": ids}, params, str(next(names))):
            return len(output.outputs.data)
        return 0

    return llm, rows


def _generating(options: dict[str, Any]) -> tuple[Any, _Rows]:
    """vLLM and a function for as many tokens after a prompt as a draft has rows."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    options |= {"enable_prefix_caching": True}
    llm, names = AsyncLLM.from_engine_args(AsyncEngineArgs(**options)), itertools.count()
    max_prompt = options["max_model_len"] - LOOK_AHEAD - 1

    async def rows(ids: list[int]) -> int:
        params = SamplingParams(
            max_tokens=LOOK_AHEAD + 1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in llm.generate({"prompt_token_ids": ids[:max_prompt]}, params, str(next(names))):
            return len(output.outputs[0].token_ids)
        return 0

    return llm, rows


async def _serve(folder: str, batches: dict[str, list[list[list[int]]]], max_tokens: int, clients: int) -> None:
    """Measure what each line of the standard input asks for: a kind of request, and seconds."""
    options = {
        "model": folder,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": max_tokens,
        "max_num_batched_tokens": max(4096, max_tokens),
        "block_size": 32,
        "kv_cache_memory_bytes": 2**30,
        "disable_log_stats": True,
    }
    llm, rows = (_pooling if "encode" in batches else _generating)(options)

    async def client(kind: str, until: float) -> int:
        count = 0
        for texts in itertools.cycle(batches[kind]):
            if time.perf_counter() >= until:
                break
            count += sum(await asyncio.gather(*map(rows, texts)))
        return count

    for kind_batches in batches.values():  # everything is loaded before a clock starts
        await asyncio.gather(*map(rows, kind_batches[0]))
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        kind, seconds = line.split()
        started = time.perf_counter()
        counts = await asyncio.gather(*(client(kind, started + float(seconds)) for _ in range(clients)))
        print(json.dumps({"rows": sum(counts), "seconds": time.perf_counter() - started}), flush=True)
    llm.shutdown()


def main(folder: str, requests: str, threads: str, clients: str, *kinds: str) -> None:
    """Request texts as `clients` clients at once would."""
    os.environ |= {
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
    }
    prepared = json.loads(Path(requests).read_text(encoding="utf-8"))
    batches = {kind: prepared[kind] for kind in kinds}
    asyncio.run(_serve(folder, batches, prepared["max_tokens"], int(clients)))


if __name__ == "__main__":
    main(*sys.argv[1:])
