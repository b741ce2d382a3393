"""Expected answers from transformers for a fixed pool of texts, and their comparison with answers in any basis.

N positions of a text and of its greedy continuation, D hidden size, V vocabulary, M rows of an answer, C candidates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from protocol.head import LMHead
from protocol.integrity import token_crc32s
from protocol.messages import DecodeResponse, DistributionResponse, EncodeResponse, HeadRows

MAX_DRAFTS = 8
_WORDS = "the thin shine of a stone and her die Tür on another hen in their den".split()  # noqa: SIM905
# With a smaller margin, either of the two tokens could be drafted.
_MIN_MARGIN = 1e-2
# Relative, of norms, inner products and logits; float16 adds its rounding.
_TOLERANCE = {"float32": 5e-4, "float16": 5e-3}
_LOG_TOLERANCE = 1e-3


class WrongAnswer(Exception):
    """Raised for an answer that differs from that of transformers."""


@dataclass(frozen=True)
class PoolText:
    """A text and the model's results for it and for MAX_DRAFTS greedy tokens after it.

    Attributes:
        text: the text.
        ids: its token ids.
        hidden_N_D: the head's input at all positions.
        logprob_N_V: log-probabilities of the next token at all positions.
        logits_N_V: logits of the next token at all positions.
    """

    text: str
    ids: list[int]
    hidden_N_D: Tensor
    logprob_N_V: Tensor
    logits_N_V: Tensor


@dataclass(frozen=True)
class Span:
    """Rows of an answer: positions [start, stop) of a text of the pool."""

    text: int
    start: int
    stop: int


@dataclass(frozen=True)
class Sight:
    """A tenant's view of the model.

    Attributes:
        digest: digest of the tenant's model card.
        rotated: whether the tenant has a secret basis.
        head_ids: tokens whose head rows the tenant has; empty if the owner discloses none.
        head: those rows; None if the owner discloses none.
    """

    digest: str
    rotated: bool
    head_ids: Sequence[int] = ()
    head: LMHead | None = None


class Truth:
    """The bare model in float32, run once over each text of the pool.

    Args:
        folder: folder of the model.
        size: number of texts in the pool.
    """

    def __init__(self, folder: Path, size: int = 48) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.head_V_D: Tensor = self._model.get_output_embeddings().weight.detach()
        chance, self.pool = random.Random(0), list[PoolText]()
        while len(self.pool) < size:
            text = " ".join(chance.choices(_WORDS, k=chance.randint(2, 14)))
            if (result := self._run(text, list(tokenizer(text).input_ids))) is not None:
                self.pool.append(result)

    @torch.inference_mode()
    def _run(self, text: str, ids: list[int]) -> PoolText | None:
        tokens = list(ids)
        for _ in range(MAX_DRAFTS):
            logits_V = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            best, second = logits_V.topk(2).values.tolist()
            if best - second < _MIN_MARGIN:
                return None
            tokens.append(int(logits_V.argmax()))
        out = self._model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        logits_N_V = out.logits[0]
        return PoolText(text, ids, out.hidden_states[-1][0], logits_N_V.log_softmax(-1), logits_N_V)

    def check_rows(
        self, answer: EncodeResponse | DecodeResponse, spans: Sequence[Span], dtype: str, sight: Sight
    ) -> None:
        """Check the answer of an encode or decode call for these spans.

        Raises:
            WrongAnswer: the answer differs from that of transformers.
        """
        _require(answer.digest == sight.digest, "digest")
        _require(answer.echo == token_crc32s(self.pool[span.text].ids for span in spans), "echo")
        _require(answer.rows_B.tolist() == [span.stop - span.start for span in spans], "number of rows")
        hidden_M_D, logprob_M_V, logits_M_V = (
            torch.cat([getattr(self.pool[span.text], name)[span.start : span.stop] for span in spans])
            for name in ("hidden_N_D", "logprob_N_V", "logits_N_V")
        )
        tolerance = _TOLERANCE[dtype]
        cr_M_D = answer.cr_N_D.float()
        _check_vectors(cr_M_D, hidden_M_D, tolerance, rotated=sight.rotated)
        if sight.head is not None:
            seen_M_C, true_M_C = sight.head.logits(cr_M_D), logits_M_V[:, list(sight.head_ids)]
            _require_near(seen_M_C, true_M_C, tolerance * (1 + float(logits_M_V.abs().max())), "candidates' logits")
        if answer.logsumexp_N is not None:
            _require_near(answer.logsumexp_N, logits_M_V.logsumexp(-1), _LOG_TOLERANCE, "log-sum-exp")
        if isinstance(answer, DecodeResponse):
            # Of two equally probable tokens, either may be the top one.
            theirs_M = logprob_M_V.gather(1, answer.top1_N.long()[:, None])[:, 0]
            _require_near(theirs_M, logprob_M_V.amax(-1), _LOG_TOLERANCE, "top-1")
            _require_near(answer.top1_logprob_N, theirs_M, _LOG_TOLERANCE, "top-1 log-probability")

    def check_head(self, answer: HeadRows, ids: Sequence[int], sight: Sight) -> None:
        """Check rows of the LM head.

        Raises:
            WrongAnswer: the rows differ from the model's.
        """
        _require(answer.digest == sight.digest, "digest")
        weight_C_D = self.head_V_D[list(ids)]
        _require(answer.weight_N_D.shape == weight_C_D.shape, "number of rows")
        _check_vectors(answer.weight_N_D.float(), weight_C_D, _TOLERANCE["float32"], rotated=sight.rotated)

    def check_distribution(self, answer: DistributionResponse, text: int, top_k: int, sight: Sight) -> None:
        """Check the distribution after a text of the pool.

        Raises:
            WrongAnswer: the distribution differs from the model's.
        """
        expected = self.pool[text]
        logprob_V = expected.logprob_N_V[len(expected.ids) - 1]
        _require(answer.digest == sight.digest, "digest")
        ids_K = answer.token_ids_K.long()
        _require(len(ids_K) == len(set(ids_K.tolist())) == (top_k or len(logprob_V)), "number of tokens")
        _require_near(answer.logprob_K, logprob_V[ids_K], _LOG_TOLERANCE, "log-probabilities")
        if top_k:
            _require_near(answer.logprob_K, logprob_V.topk(top_k).values, _LOG_TOLERANCE, "most probable tokens")


def _check_vectors(seen_M_D: Tensor, true_M_D: Tensor, tolerance: float, *, rotated: bool) -> None:
    """Compare vectors; in a secret basis, compare their norms and inner products."""
    norm_M = true_M_D.norm(dim=1)
    if not rotated:
        _require(bool(((seen_M_D - true_M_D).norm(dim=1) <= tolerance * norm_M).all()), "vectors")
        return
    scale_M_M = norm_M[:, None] * norm_M
    error_M_M = (seen_M_D @ seen_M_D.T - true_M_D @ true_M_D.T).abs()
    _require(bool((error_M_M <= 2 * tolerance * scale_M_M).all()), "norms and inner products")
    _require(bool(torch.cosine_similarity(seen_M_D, true_M_D).mean() < 0.9), "the model's own basis")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongAnswer(what)


def _require_near(seen: Tensor, true: Tensor, tolerance: float, what: str) -> None:
    _require(seen.shape == true.shape and bool(((seen.float() - true).abs() <= tolerance).all()), what)
