"""Rows of a model in bfloat16, over every way of calling, against the same weights in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_owner_client.plm.connection.base import Connection
from harness.tiny_models import TELLING, TinyModels
from plm_owner_server.service.plm_service import PlmService
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, EncodeRequest
from tests import guard
from tests.support import make_service, random_ids, serve, serve_over_grpc

# bfloat16 has eight bits; every layer rounds several times.
_RELATIVE = 0.1
TEXTS = random_ids(51, [40, 7, 23, 23], shared=5)
pytestmark = pytest.mark.transformers_only("vLLM has a check of its own for its dtypes")


@pytest.fixture(scope="module", params=TELLING)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exact(architecture: str, tiny_models: TinyModels) -> PreTrainedModel:
    """The model with the weights rounded to bfloat16, in float64."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.bfloat16)
    return model.double().eval()


@pytest.fixture(scope="module")
def service(architecture: str, tiny_models: TinyModels) -> PlmService:
    return make_service(tiny_models[architecture], dtype="bfloat16")


@pytest.fixture(scope="module")
def connections(service: PlmService) -> Iterator[list[Connection]]:
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(service)) for serving in (serve, serve_over_grpc)]
        yield [stack.enter_context(closing(guard.connection(url))) for url in urls]


@torch.inference_mode()
def truth(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Last hidden states [T, D] and logits [T, V], float64."""
    output: Any = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0], output.logits[0]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs).norm() <= _RELATIVE * theirs.norm()


def test_encoded_rows_are_bfloat16_from_the_model_to_the_client(
    exact: PreTrainedModel, service: PlmService, connections: list[Connection]
) -> None:
    request = EncodeRequest(token_ids=TEXTS, from_position=[0] * 4, dtype="bfloat16", with_logsumexp=True)
    answers = [one.encode(request) for one in connections]
    if guard.current is None:
        answers.append(service.encode(request))
    for answer in answers:
        assert answer.cr_N_D.dtype == torch.bfloat16
        assert answer.echo == token_crc32s(TEXTS)
        assert torch.equal(answer.cr_N_D, answers[0].cr_N_D)
    for number, cr_T_D in enumerate(answers[0].cr_N_D.split(answers[0].rows_B.tolist())):
        if guard.current is None:  # else in a basis that nobody knows
            assert_near(cr_T_D, truth(exact, TEXTS[number])[0])


def test_the_conversion_to_float32_changes_no_bit(connections: list[Connection]) -> None:
    narrow, wide = (
        connections[1].encode(EncodeRequest(token_ids=TEXTS, from_position=[0] * 4, dtype=dtype)).cr_N_D
        for dtype in ("bfloat16", "float32")
    )
    assert torch.equal(narrow, wide.bfloat16())


def test_each_draft_is_all_but_the_most_probable_token(exact: PreTrainedModel, connections: list[Connection]) -> None:
    request = DecodeRequest(token_ids=TEXTS, look_ahead=[6, 0, 9, 3], dtype="bfloat16")
    for answer in [one.decode(request) for one in connections]:
        assert answer.cr_N_D.dtype == torch.bfloat16
        assert answer.rows_B.tolist() == [7, 1, 10, 4]
        columns = (answer.cr_N_D, answer.top1_N, answer.logsumexp_N)
        parts = zip(*(column.split(answer.rows_B.tolist()) for column in columns), strict=True)
        for ids, (cr_K_D, top1_K, logsumexp_K) in zip(TEXTS, parts, strict=True):
            ran = [*ids, *top1_K.tolist()[:-1]]
            hidden_K_D, logits_K_V = (each[len(ids) - 1 :] for each in truth(exact, ran))
            if guard.current is None:
                assert_near(cr_K_D, hidden_K_D)
            error = (logsumexp_K.double() - logits_K_V.logsumexp(-1)).abs().max()
            assert error <= _RELATIVE * logits_K_V.abs().max()
            behind_K = logits_K_V.amax(-1) - logits_K_V.gather(-1, top1_K[:, None])[:, 0]
            assert behind_K.max() <= _RELATIVE * logits_K_V.abs().max()
