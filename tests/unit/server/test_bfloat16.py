"""Rows of a model in bfloat16 against the same weights in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.tiny_models import TinyModels
from plm_owner_server.service.plm_service import PlmService
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, EncodeRequest
from tests.support import make_service, random_ids

# bfloat16 has eight bits, and every layer rounds several times.
_RELATIVE = 0.1
TEXTS = random_ids(51, [40, 7, 23, 23], shared=5)


@pytest.fixture(scope="module")
def exact(architecture: str, tiny_models: TinyModels) -> PreTrainedModel:
    """The model with its weights rounded to bfloat16, in float64."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.bfloat16)
    return model.double().eval()


@pytest.fixture(scope="module")
def service(architecture: str, tiny_models: TinyModels) -> PlmService:
    return make_service(tiny_models[architecture], dtype="bfloat16")


@torch.inference_mode()
def exact_states(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Last hidden states [T, D] and logits [T, V], float64."""
    output: Any = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0], output.logits[0]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs).norm() <= _RELATIVE * theirs.norm()


def test_encoded_rows_are_the_models(exact: PreTrainedModel, service: PlmService) -> None:
    answer = service.encode(EncodeRequest(token_ids=TEXTS, from_position=[0] * 4, dtype="bfloat16"))
    assert answer.cr_N_D.dtype == torch.bfloat16
    assert answer.echo == token_crc32s(TEXTS)
    for ids, cr_T_D in zip(TEXTS, answer.cr_N_D.split(answer.rows_B.tolist()), strict=True):
        assert_near(cr_T_D, exact_states(exact, ids)[0])


def test_rows_in_float32_have_no_more_bits(service: PlmService) -> None:
    narrow, wide = (
        service.encode(EncodeRequest(token_ids=TEXTS, from_position=[0] * 4, dtype=dtype)).cr_N_D
        for dtype in ("bfloat16", "float32")
    )
    assert torch.equal(narrow.float(), wide)


def test_each_draft_is_all_but_the_most_probable_token(exact: PreTrainedModel, service: PlmService) -> None:
    answer = service.decode(DecodeRequest(token_ids=TEXTS, look_ahead=[6, 0, 9, 3], dtype="bfloat16"))
    assert answer.cr_N_D.dtype == torch.bfloat16
    assert answer.rows_B.tolist() == [7, 1, 10, 4]
    columns = (answer.cr_N_D, answer.top1_N, answer.logsumexp_N)
    parts = zip(*(column.split(answer.rows_B.tolist()) for column in columns), strict=True)
    for ids, (cr_K_D, top1_K, logsumexp_K) in zip(TEXTS, parts, strict=True):
        ran = [*ids, *top1_K.tolist()[:-1]]
        hidden_K_D, logits_K_V = (each[len(ids) - 1 :] for each in exact_states(exact, ran))
        assert_near(cr_K_D, hidden_K_D)
        tolerance = _RELATIVE * logits_K_V.abs().max()
        assert (logsumexp_K.double() - logits_K_V.logsumexp(-1)).abs().max() <= tolerance
        behind_K = logits_K_V.amax(-1) - logits_K_V.gather(-1, top1_K[:, None])[:, 0]
        assert behind_K.max() <= tolerance
