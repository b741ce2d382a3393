"""Rows in bfloat16 arrive over both transports as the service has them, bit for bit."""

from __future__ import annotations

import pytest
import torch

from harness.tiny_models import TinyModels
from protocol.messages import DecodeRequest, EncodeRequest
from tests import guard
from tests.support import connection_over, make_service, random_ids

TEXTS = random_ids(51, [40, 7, 23, 23], shared=5)


@pytest.mark.transformers_only("the processes behind another engine have one dtype in all tests")
@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_rows_in_bfloat16_arrive_bit_for_bit(transport: str, tiny_models: TinyModels) -> None:
    # Without cached states, which change the last bits of what is asked for twice.
    service = make_service(tiny_models["llama"], dtype="bfloat16", prefix_cache_mib=0)
    encode = EncodeRequest(token_ids=TEXTS, from_position=[0] * 4, dtype="bfloat16")
    decode = DecodeRequest(token_ids=TEXTS, look_ahead=[6, 0, 9, 3], dtype="bfloat16")
    expected = service.encode(encode, guard.caller()), service.decode(decode, guard.caller())
    with connection_over(transport, service) as connection:
        for ours, theirs in zip((connection.encode(encode), connection.decode(decode)), expected, strict=True):
            assert ours.cr_N_D.dtype == torch.bfloat16
            assert torch.equal(ours.cr_N_D, theirs.cr_N_D)
