"""Fixtures for all tests, and markers by folder. The fixtures are made with `tests/support.py`."""

# ruff: noqa: E402
from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests import profiles

# Before transformers is imported: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models: a second thread only waits for the first, also in child processes, and for whatever else runs here.
os.environ["OMP_NUM_THREADS"] = "1"
for _name in [name for name in os.environ if name.startswith("PEMA_") or name.lower().endswith("_proxy")]:
    del os.environ[_name]
# Also for the servers that tests start: who runs the tests may be an owner with tenants.
os.environ["PEMA_STORE"] = f"sqlite:///{tempfile.mkdtemp(prefix='pema-tests-')}/owner.db"

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging as transformers_logging

from harness.tiny_models import TinyModels
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.settings import ENGINES
from tests import guard, support

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
profiles.load()
_TESTS = Path(__file__).parent
# Markers of tests of one engine alone.
_ENGINE_MARKERS = {"transformers_only": "transformers", "vllm": "vllm"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", default=support.engine, choices=list(ENGINES), help="of every server")
    parser.addoption("--device", default=support.device, help="of every model of the engine over transformers")
    parser.addoption("--guarded", action="store_true", help="every server with TLS, keys, candidate rows and rotation")


def pytest_configure(config: pytest.Config) -> None:
    support.use_engine(config.getoption("engine"))
    support.use_device(config.getoption("device"))
    if config.getoption("guarded"):
        guard.current = guard.Guard.new(Path(tempfile.mkdtemp(prefix="pema-guard-")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by its folder, then leave out the tests of another engine than the one that is run.

    Guarded, also leave out tests that cannot be guarded, and unit tests, which have no server to guard.
    """
    for item in items:
        item.add_marker(item.path.relative_to(_TESTS).parts[0].removesuffix(".py"))
    others = [marker for marker, engine in _ENGINE_MARKERS.items() if engine != support.engine]
    left_out = {item for item in items if any(map(item.get_closest_marker, others))}
    if guard.current is not None:
        left_out |= {item for item in items if item.get_closest_marker("unguarded") or item.get_closest_marker("unit")}
    config.hook.pytest_deselected(items=list(left_out))
    # The longest tests begin first, and on one worker, which loads the real models once.
    items[:] = sorted(
        (item for item in items if item not in left_out),
        key=lambda item: item.get_closest_marker("real_models") is None,
    )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """`tiny_models["llama"]` is the folder of a tiny model of that architecture (`ARCHITECTURES`)."""
    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def tiny_service(tiny_models: TinyModels) -> PlmService:
    """A service over the tiny Llama with default settings, which also has a chat template."""
    return support.make_service(tiny_models["llama"])


@pytest.fixture(scope="session")
def tiny_server(tiny_service: PlmService) -> Iterator[str]:
    """Base URL of a real HTTP server of `tiny_service`."""
    with support.serve(tiny_service) as url:
        yield url
