"""The LM head of a large model, V 131,072 and D 8,192 (2 GiB in bfloat16), over both transports, with a cut inside."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tcp_proxy import Fault, faulty_proxy
from harness.tiny_models import tiny_tokenizer
from plm_owner_server.engines.interface import EngineInfo
from plm_owner_server.service.plm_service import PlmService
from protocol.codec import raw_bytes
from protocol.errors import ConnectionFailed
from protocol.head import LMHead
from tests.support import MASTER_SECRET, make_settings, serve, serve_over_grpc

V, D = 2**17, 2**13
GIB = 2**30


class _HeadOnly:
    """An engine that has nothing but a head."""

    info = EngineInfo(
        hidden_size=D,
        vocab_size=V,
        max_tokens=None,
        dtype="bfloat16",
        cr_kind="last_hidden_state",
        eos_token_ids=(),
    )

    def __init__(self) -> None:
        weight_V_D = torch.empty(V, D, dtype=torch.bfloat16)
        # No two rows are the same, or rows in the wrong place would go unnoticed; a random tensor takes too long.
        weight_V_D.copy_(torch.randn(1, D))
        weight_V_D[:, :2] = torch.stack([torch.arange(V) // 256, torch.arange(V) % 256], dim=1)
        self.head = LMHead(weight_V_D)

    def drafting(self, batch_tokens: int) -> None: ...


@pytest.fixture(scope="module")
def service() -> PlmService:
    return PlmService(
        _HeadOnly(),  # type: ignore[arg-type]
        tiny_tokenizer(),
        name="large",
        weights_digest="large",
        settings=make_settings(),
        master_secret=lambda: MASTER_SECRET,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # two GiB, which pytest would keep


@pytest.mark.unguarded("needs the whole head")
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_large_head_passes_in_pieces_and_resumes_after_a_cut(service: PlmService, cache: Path, scheme: str) -> None:
    with (
        (serve if scheme == "http" else serve_over_grpc)(service) as url,
        faulty_proxy(int(url.rpartition(":")[2]), [Fault("cut", GIB)]) as port,
    ):
        proxied = f"{scheme}://127.0.0.1:{port}"
        connection = open_connection(proxied, retry_for=0)
        plm = RemotePlm(connection, cache=cache)
        before = psutil.Process().memory_info().rss
        with pytest.raises(ConnectionFailed):
            plm.fetch_head()
        connection.close()
        had = plm.cached_head().rows
        assert 0.4 * V < had < 0.6 * V
        connection = open_connection(proxied)
        head = RemotePlm(connection, cache=cache).fetch_head()
        connection.close()
        # Client and server together hold a few pieces at a time, never the head.
        assert psutil.Process().memory_info().rss - before < GIB
    assert head.complete
    digest = hashlib.sha256(raw_bytes(service.engine.head.weight_V_D))
    digest.update(b"[1.0, null]")  # scale and soft-cap
    assert plm.card.head_digest == digest.hexdigest() == head.folder.name
