"""`pema-server` with an engine that fails when a sequence begins with one of these tokens, to be run with `-m`.

Or one that breaks in its n-th pass, or one that is never loaded.

Whatever it raises quotes the token ids, as an exception of a library may.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plm_owner_server.cli import main, server_process
from plm_owner_server.engines.interface import Decoded, DraftBatch, Drafting, EncodeBatch, Encoded, Engine
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.settings import ServerSettings

FAIL, BREAK, HANG, HOLD = 201, 202, 203, 204
HELD = "PEMA_TEST_HELD"
"""Environment variable with the name of a file: `HOLD` and `HANG` make it, and `HOLD` goes on when it is gone."""

PASSES_LEFT = "PEMA_TEST_PASSES_LEFT"
"""Environment variable with the name of a file: it holds the number of passes until the engine breaks once."""

LOADING = "PEMA_TEST_LOADING"
"""Environment variable with the name of a file, which is made when all is loaded but what never will be."""


class AilingEngine:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.info, self.head, self.stats = engine.info, engine.head, engine.stats
        self.evict_idle, self.is_alive = engine.evict_idle, engine.is_alive
        self._broken = False

    def warm_up(self) -> None:
        self._raise_if(self._broken, [])
        self._engine.warm_up()

    def encode(self, batch: EncodeBatch) -> Encoded:
        self.count_pass()
        first = batch.token_ids[0][0]
        self._broken |= first == BREAK
        self._raise_if(self._broken or first == FAIL, batch.token_ids)
        if first in (HANG, HOLD):
            held = Path(os.environ[HELD])
            held.touch()
            while first == HANG or held.exists():
                time.sleep(0.01)
        return self._engine.encode(batch)

    def drafting(self, batch_tokens: int) -> AilingDrafting:
        return AilingDrafting(self, self._engine.drafting(batch_tokens))

    def count_pass(self) -> None:
        """Break if that was the last pass."""
        left = Path(os.environ.get(PASSES_LEFT, os.devnull))
        if left.is_file():
            passes = int(left.read_text())
            left.write_text(str(passes - 1))
            if passes <= 0:
                left.unlink()
                self._broken = True
        self._raise_if(self._broken, [])

    def _raise_if(self, failing: bool, token_ids: list[list[int]]) -> None:
        if failing:
            raise RuntimeError(f"no luck with {token_ids}")


class AilingDrafting:
    def __init__(self, engine: AilingEngine, drafting: Drafting) -> None:
        self._engine = engine
        self._drafting = drafting
        self.leave = drafting.leave

    def join(self, batches: Sequence[DraftBatch]) -> int:
        self._engine.count_pass()
        return self._drafting.join(batches)

    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        self._engine.count_pass()
        return self._drafting.step()


def load_ailing_engine(folder: Path, settings: ServerSettings) -> AilingEngine:
    engine = load_engine(folder, settings)
    if LOADING in os.environ:
        with ThreadPoolExecutor(1) as pool:  # as libraries load weights; Python waits for its threads
            pool.submit(_never_come_back)
    return AilingEngine(engine)


def _never_come_back() -> None:
    Path(os.environ[LOADING]).touch()
    while True:
        time.sleep(0.01)


if __name__ == "__main__":
    setattr(server_process, "load_engine", load_ailing_engine)  # noqa: B010 - a name that it imports
    main()
