"""Adapters of the tiny PLM, and a gateway that serves them to real applications."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from data_owner_client import TrainedAdapter
from tests import profiles
from tests.gateways import gateway
from tests.served_adapters import INTERPOLATIONS
from tests.served_adapters import adapters as adapters
from tests.served_adapters import plm as plm

CLIENTS = Path(__file__).parents[3] / ".venv-clients" / "bin" / "python"


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """Interpreter of the environment of applications."""
    if profiles.NO_CLIENTS:
        pytest.skip("PEMA_TEST_NO_CLIENTS is set")
    if not CLIENTS.exists():
        pytest.fail(f"There is no {CLIENTS}: `make .venv-clients/ready`, or set PEMA_TEST_NO_CLIENTS=1.")
    return CLIENTS


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Environment of an application that reaches nothing but this machine, with caches of its own."""
    caches = str(tmp_path_factory.mktemp("caches"))
    return {
        "PATH": os.environ["PATH"],
        "HOME": caches,
        "HF_HOME": caches,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LANGSMITH_TRACING": "false",
        "OMP_NUM_THREADS": "1",
        "OPENAI_API_KEY": "none",
        "TIKTOKEN_CACHE_DIR": caches,
    }


@pytest.fixture(scope="session")
def url(tiny_server: str, adapters: dict[str, Path]) -> Iterator[str]:
    """Address of a gateway of all adapters."""
    with gateway(tiny_server, adapters) as address:
        yield address


@pytest.fixture(params=INTERPOLATIONS)
def adapter_name(request: pytest.FixtureRequest) -> str:
    """The name of an adapter."""
    return str(request.param)


@pytest.fixture
def adapter(adapter_name: str, adapters: dict[str, Path]) -> TrainedAdapter:
    """The adapter of that name."""
    return TrainedAdapter.load(adapters[adapter_name])
