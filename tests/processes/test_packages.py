"""Which way the imports point, and what the packages offer."""

import subprocess
import sys

import pytest

import data_owner_client

pytestmark = pytest.mark.unguarded("no server")

_PROBE = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
found = sorted(name for name in {forbidden!r} if name in sys.modules)
sys.exit(f"{{found}} imported by {package}" if found else 0)
"""


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("data_owner_client", ["transformers", "plm_owner_server", "fastapi", "uvicorn"]),
        ("plm_owner_server", ["data_owner_client", "sacrebleu", "matplotlib"]),
        ("protocol", ["data_owner_client", "plm_owner_server", "transformers", "httpx", "fastapi"]),
    ],
)
def test_imports_point_one_way(package: str, forbidden: list[str]) -> None:
    probe = _PROBE.format(package=package, forbidden=forbidden)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_exported_names() -> None:
    assert sorted(data_owner_client.__all__) == data_owner_client.__all__
    for name in data_owner_client.__all__:
        assert hasattr(data_owner_client, name)
        assert getattr(data_owner_client, name).__doc__, name
