"""Arguments of the Python functions as notebooks give them: refused with the thing to do, or taken as meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidRequest


@pytest.mark.parametrize("dtype", ["fp16", torch.float16, None, ["float16"]])
def test_unknown_number_formats_are_refused(tiny_service: PlmService, dtype: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"dtype is .* must be one of float16, bfloat16, float32, int8"):
        RemotePlm(InProcessConnection(tiny_service), dtype=dtype, cache=None)
