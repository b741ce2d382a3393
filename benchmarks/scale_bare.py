"""Bare vLLM in its own environment: computes the states of all positions of prepared texts, reports in JSON.

Only settings that are needed for correct states are set, such as the block size, to the values of the server's engine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


async def _run(
    folder: str, batches: list[list[list[int]]], max_tokens: int, seconds: float, clients: int
) -> dict[str, Any]:
    from vllm import AsyncEngineArgs
    from vllm.config import PoolerConfig
    from vllm.pooling_params import PoolingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            runner="pooling",
            convert="embed",
            dtype="float32",
            max_model_len=max_tokens,
            max_num_batched_tokens=max(4096, max_tokens),
            block_size=32,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**30,
            disable_log_stats=True,
            pooler_config=PoolerConfig(use_activation=False, seq_pooling_type="LAST", tok_pooling_type="ALL"),
        )
    )
    names = itertools.count()

    async def rows(ids: list[int]) -> int:
        params = PoolingParams(task="token_embed", use_activation=False)
        async for output in llm.encode({"prompt_token_ids": ids}, params, str(next(names))):
            return len(output.outputs.data)
        return 0

    async def client() -> int:
        count = 0
        for texts in itertools.cycle(batches):
            if time.perf_counter() - started >= seconds:
                break
            count += sum(await asyncio.gather(*map(rows, texts)))
        return count

    await asyncio.gather(*map(rows, batches[0]))
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    counts = await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = time.perf_counter() - started
    llm.shutdown()
    return {"rows": sum(counts), "seconds": elapsed}


def main(folder: str, requests: str, seconds: str, threads: str, clients: str) -> None:
    """Request texts as `clients` clients at once would."""
    os.environ |= {
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
    }
    prepared = json.loads(Path(requests).read_text(encoding="utf-8"))
    print(
        json.dumps(asyncio.run(_run(folder, prepared["encode"], prepared["max_tokens"], float(seconds), int(clients))))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
