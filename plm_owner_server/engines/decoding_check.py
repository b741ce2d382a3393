"""Check at the start that an engine decodes as it encodes, with and without cached states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Engine
from plm_owner_server.engines.model_files.config import ATTENTION_HINT
from protocol.errors import Unsupported

log = logging.getLogger(__name__)

# Prompts of different lengths, so that one of them is padded.
_PROMPT_TOKENS = (9, 4)
_DRAFT_TOKENS = 2
# No tenant's name is like this, so that no tenant uses these cached states.
_TENANT = "\0start"


def check_decoding(engine: Engine) -> None:
    """Decode a few tokens twice, the second time with cached states, and compare with one plain pass over each text.

    Architectures whose layers keep other states than attention's keys and values fail here, at the start.

    Raises:
        Unsupported: the representations differ.
    """
    prompts = [[(7 * i + length) % engine.info.vocab_size for i in range(length)] for length in _PROMPT_TOKENS]

    @cache
    def plain(text: tuple[int, ...]) -> Tensor:
        # From the first position on, so that no cached state is used.
        return engine.encode(EncodeBatch([list(text)], [0])).cr_N_D

    error = max(_difference(prompts, _drafted(engine, prompts), plain) for _ in range(2))
    if not error <= (1e-3 if engine.info.dtype == "float32" else 0.1):
        raise Unsupported(
            f"Decoding step by step differs from one pass over the text: relative difference {error:.1e}.",
            hint=ATTENTION_HINT,
        )
    log.info("check: decoding step by step, with and without cached states, agrees with one pass to %.1e", error)


def _drafted(engine: Engine, prompts: Sequence[list[int]]) -> Decoded:
    """The newest position of each prompt, and of the tokens drafted after it."""
    drafting = engine.drafting(batch_tokens=sum(_PROMPT_TOKENS) + _DRAFT_TOKENS)
    newest = [len(prompt) - 1 for prompt in prompts]
    drafting.join([DraftBatch(list(prompts), newest, [_DRAFT_TOKENS] * len(prompts), tenant=_TENANT)])
    while not (complete := drafting.step()):
        pass
    return complete[0][1]


def _difference(prompts: Sequence[list[int]], drafted: Decoded, plain: Callable[[tuple[int, ...]], Tensor]) -> float:
    """Largest difference of the representations to those of a pass over each text alone, relative to their size."""
    rows = zip(prompts, drafted.cr_N_D.split(drafted.rows), drafted.top1_N.split(drafted.rows), strict=True)
    return max(
        _relative(cr_N_D, plain((*prompt, *top1_N[:-1].tolist()))[len(prompt) - 1 :]) for prompt, cr_N_D, top1_N in rows
    )


def _relative(ours_N_D: Tensor, expected_N_D: Tensor) -> float:
    difference = (ours_N_D.float() - expected_N_D.float()).abs().max() / expected_N_D.float().abs().max()
    return float(torch.nan_to_num(difference, nan=torch.inf))
