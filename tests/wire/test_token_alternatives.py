"""Alternatives of each token against the whole softmax, and answers that go on from given tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from data_owner_client import TrainedAdapter, TrainingSettings, build_memories, generate, train, translate
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.decoding.adapter_mixture import previous_tokens
from data_owner_client.decoding.settings import SamplingSettings
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import InvalidData
from tests import guard
from tests.wire.test_round_loop import PAIRS, SOURCES, TASK

CONSTANT = Interpolation(schedule="constant", lambda_max=0.6)
COUNT = 4


@pytest.fixture(scope="module")
def plm(tiny_server: str) -> Iterator[RemotePlm]:
    with guard.remote_plm(tiny_server) as remote:
        yield remote


@pytest.fixture(scope="module")
def adapter(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> TrainedAdapter:
    folder = tmp_path_factory.mktemp("memory")
    build_memories(plm, TASK, PAIRS, folder, validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True)
    settings = TrainingSettings(
        rank=16, epochs=3, batch_rows=16, learning_rate=0.02, retrieved_examples=0, selection_texts=0, minutes=0
    )
    return train(plm, folder, folder / "adapter", settings=settings)[0]


@pytest.mark.parametrize("sampling", [None, SamplingSettings(temperature=1.0, seed=2)])
def test_alternatives_are_those_of_the_whole_softmax(
    plm: RemotePlm, adapter: TrainedAdapter, sampling: SamplingSettings | None
) -> None:
    head = plm.full_head().to(torch.float32)
    results = translate(plm, SOURCES, adapter=adapter, interpolation=CONSTANT, alternatives=COUNT, sampling=sampling)
    for source, choices in zip(SOURCES, results.choices, strict=True):
        prompt = plm.tokenizer.encode_prompt(TASK.prompt(source, plm.tokenizer))
        ids = [choice.token for choice in choices]
        rows = plm.encode([prompt + ids[:-1]], [len(prompt) - 1])
        plm_N_V = head.logits(rows.cr_N_D).double().log_softmax(dim=-1)
        pema_N_C = adapter.logprobs(rows.cr_N_D, previous_tokens([ids[:t] for t in range(len(ids))]))
        pema_N_V = torch.full_like(plm_N_V, -torch.inf)
        pema_N_V[:, adapter.candidate_ids_C] = pema_N_C.double()
        mixture_N_V = mix(plm_N_V, pema_N_V, torch.tensor(CONSTANT.lambda_max, dtype=torch.float64))
        for t, choice in enumerate(choices):
            found = choice.alternatives
            assert found is not None
            assert found.mixture
            top_K, ids_K = mixture_N_V[t].topk(len(found.mixture))
            assert [token for token, _ in found.mixture] == ids_K.tolist()
            assert [logprob for _, logprob in found.mixture] == pytest.approx(top_K.tolist(), abs=1e-4)
            ids, logprobs = _top(pema_N_V[t], COUNT)
            assert [token for token, _ in found.pema] == ids
            assert [logprob for _, logprob in found.pema] == pytest.approx(logprobs, abs=1e-4)
            assert found.plm[0][0] == int(plm_N_V[t].argmax())
            assert found.plm[0][1] == pytest.approx(float(plm_N_V[t].max()), abs=1e-4)
            for token, logprob in found.plm:
                assert logprob == pytest.approx(float(plm_N_V[t, token]), abs=1e-4)
            if sampling is None:
                compared = {*adapter.candidate_ids_C.tolist(), choice.plm_token}
                listed = float(plm_N_V[t, sorted(compared)].exp().sum())
                assert found.unlisted == pytest.approx(1 - listed, abs=1e-4)
            assert choice.share == pytest.approx(
                CONSTANT.lambda_max * float((pema_N_V[t, choice.token] - mixture_N_V[t, choice.token]).exp()), abs=1e-4
            )


def _top(logprob_V: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    top_K, ids_K = logprob_V.topk(count)
    return ids_K.tolist(), top_K.tolist()


@pytest.mark.parametrize("adapted", [True, False])
def test_an_answer_goes_on_from_its_own_beginning(plm: RemotePlm, adapter: TrainedAdapter, adapted: bool) -> None:
    for source in SOURCES[:3]:
        answer = partial(translate, adapter=adapter) if adapted else generate
        whole = answer(plm, [source])
        ids = whole.token_ids[0]
        for cut in range(0, len(ids) - 1, 5):
            rest = answer(plm, [source], prefix=ids[:cut])
            assert rest.token_ids == whole.token_ids
            assert rest.texts == whole.texts


def test_a_prefix_that_ends_the_answer_is_refused(plm: RemotePlm) -> None:
    with pytest.raises(InvalidData, match="ends the answer"):
        generate(plm, ["the"], prefix=[plm.card.eos_token_ids[0]])
