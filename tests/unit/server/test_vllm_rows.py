"""Rows of vLLM's passes: their selection, scores and bytes, against float64, and the scheduler's ledger of them."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from plm_owner_server.engines.vllm import internals
from plm_owner_server.engines.vllm.row_selection import RowLedger, compute_rows, select_rows
from plm_owner_server.engines.vllm.rows import SAMPLED, RowRequest, Rows, pack_rows, reduce_logits, unpack_rows
from protocol.errors import Unsupported

D, V = 6, 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_survive_their_bytes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    floats = (torch.randn(4), torch.tensor([torch.nan, -1.0, torch.inf, 0.0]))
    tokens = (torch.tensor([SAMPLED, 0, 5, 2**31 - 1]).int(), torch.arange(4).int())
    rows = Rows(torch.randn(4, D).to(dtype), *floats, *tokens)
    packed_N_B = pack_rows(rows).numpy()
    assert packed_N_B.shape == (4, D * dtype.itemsize + 16)
    found = unpack_rows(np.concatenate([packed_N_B[:1], packed_N_B[1:]]), dtype)
    for name, column in vars(rows).items():
        torch.testing.assert_close(getattr(found, name), column, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (3, 300_000), (600, 1000)])
def test_reduced_logits_are_those_of_float64(rows: int, vocab: int) -> None:
    torch.manual_seed(2)
    logits_N_V = 30 * torch.randn(rows, vocab)
    logsumexp_N, top_logit_N = reduce_logits(logits_N_V)
    torch.testing.assert_close(logsumexp_N.double(), logits_N_V.double().logsumexp(dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(top_logit_N, logits_N_V.max(dim=-1).values)


def test_sampling_parameters_carry_a_request() -> None:
    for scored_from in (None, 3):
        request = RowRequest(3, scored_from, 9)
        assert RowRequest.of(SimpleNamespace(extra_args=request.to_extra_args())) == request
    assert RowRequest.of(SimpleNamespace(extra_args=None)) is None
    assert RowRequest.of(None) is None  # a pooling request


class Text:
    """A prompt with drafts, run in any pieces: the truth of each position."""

    def __init__(self, seed: int, prompt: int, drafts: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.prompt, self.length = prompt, prompt + drafts
        self.token_ids_T = torch.randint(0, V, (self.length,), generator=generator)
        self.hidden_T_D = torch.randn(self.length, D, generator=generator)


def test_any_pieces_of_prompts_give_the_rows_of_each_position() -> None:
    """Passes of random composition, some of them computed again, as after a preemption."""
    torch.manual_seed(3)
    weight_V_D, rng = torch.randn(V, D), random.Random(3)

    def logits(hidden_N_D: Tensor) -> Tensor:
        return hidden_N_D @ weight_V_D.T

    for trial in range(60):
        texts = {str(i): Text(100 * trial + i, rng.randint(1, 9), rng.randint(0, 5)) for i in range(4)}
        requests = {}
        for name, text in texts.items():
            start = rng.randrange(text.prompt)
            requests[name] = RowRequest(start, rng.choice([None, start, text.prompt - 1]), text.prompt)
        computed, ledger = dict.fromkeys(texts, 0), RowLedger()
        while any(computed[name] < text.length for name, text in texts.items()):
            names = rng.sample(sorted(texts), rng.randint(1, 4))
            names = [name for name in names if computed[name] < texts[name].length]
            if not names:
                continue
            if rng.random() < 0.2:
                computed[names[0]] = 0  # preempted
            counts = []
            for name in names:
                most = texts[name].prompt - computed[name]
                counts.append(rng.randint(1, most) if most > 0 else 1)
            spans = [slice(computed[name], computed[name] + count) for name, count in zip(names, counts, strict=True)]
            hidden_T_D = torch.cat([texts[name].hidden_T_D[span] for name, span in zip(names, spans, strict=True)])
            ids_T = torch.cat([texts[name].token_ids_T[span] for name, span in zip(names, spans, strict=True)])
            offsets = np.cumsum([0, *counts])
            selection = select_rows(names, requests, np.array([computed[name] for name in names]), offsets)
            newest_B_V = logits(hidden_T_D[offsets[1:] - 1])
            for name, count in zip(names, counts, strict=True):
                computed[name] += count
            if selection.indices:
                packed_N_B = pack_rows(compute_rows(selection, hidden_T_D, ids_T, newest_B_V, logits, V)).numpy()
                end = 0
                for name, span in selection.spans.items():
                    begin, end = end, end + span[1]
                    ledger.accept(name, requests[name], span, packed_N_B[begin:end], texts[name].length)
        for name, text in texts.items():
            request, taken_N_B = requests[name], ledger.take(name)
            assert taken_N_B is not None
            rows = unpack_rows(taken_N_B, torch.float32)
            assert torch.equal(rows.token_ids_N.long(), text.token_ids_T[request.start :])
            assert torch.equal(rows.hidden_N_D, text.hidden_T_D[request.start :])
            if request.scored_from is None:
                assert rows.logsumexp_N.isnan().all()
                continue
            scored = slice(request.scored_from - request.start, None)
            expected_N_V = logits(text.hidden_T_D[request.start :].double().float())[scored].double()
            torch.testing.assert_close(
                rows.logsumexp_N[scored].double(), expected_N_V.logsumexp(-1), rtol=1e-5, atol=1e-5
            )
            is_sampled = torch.arange(request.start, text.length)[scored] >= text.prompt - 1
            expected_top1 = torch.where(is_sampled, SAMPLED, expected_N_V.argmax(-1))
            assert torch.equal(rows.top1_N[scored].long(), expected_top1)


def rows_of(*positions: int) -> np.ndarray:
    return np.array(positions, dtype=np.uint8)[:, None]


def test_the_ledger_accepts_each_committed_position_once() -> None:
    ledger, request = RowLedger(), RowRequest(2, None, 4)
    ledger.accept("a", request, (3, 1), rows_of(3), 9)  # before position 2: a row that no one may miss
    assert ledger.take("a") is None
    ledger.accept("a", request, (2, 2), rows_of(2, 3), 9)
    ledger.accept("a", request, (2, 3), rows_of(2, 3, 4), 4)  # computed again, and a token that is taken back
    ledger.accept("a", request, (4, 1), rows_of(104), 4)
    ledger.accept("a", request, (4, 1), rows_of(4), 5)
    ledger.accept("b", request, (2, 1), rows_of(102), 9)
    found = ledger.take("a")
    assert found is not None
    assert found.ravel().tolist() == [2, 3, 4]
    assert ledger.take("a") is None


def test_the_ledger_holds_nothing_of_requests_that_are_gone() -> None:
    ledger, request = RowLedger(), RowRequest(0, None, 4)
    for name in "abc":
        ledger.accept(name, request, (0, 2), rows_of(0, 1), 9)
    ledger.keep_only({"b"})
    assert [ledger.take(name) is None for name in "abc"] == [True, False, True]
    assert not ledger._rows
    assert not ledger._next


def test_a_row_does_not_hold_the_memory_of_its_pass() -> None:
    ledger, packed_N_B = RowLedger(), np.zeros((1000, 8), dtype=np.uint8)
    ledger.accept("a", RowRequest(0, None, 1), (0, 1), packed_N_B[:1], 9)
    (rows,) = ledger._rows["a"]
    assert rows.base is None


@pytest.mark.parametrize(("version", "fits"), [("0.32.0", True), ("0.32.4", True), ("0.33.0", False), ("0.3.2", False)])
def test_another_version_of_vllm_is_refused(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    if fits:
        internals.check_version()
        return
    with pytest.raises(Unsupported, match=version) as caught:
        internals.check_version()
    assert "vllm==0.32" in caught.value.hint
