"""Directions of imports, and names that the packages export."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import data_owner_client
from protocol import errors

pytestmark = pytest.mark.unguarded("no server")

_PROBE = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.startswith({without!r}):
        importlib.import_module(module.name)
found = sorted(name for name in {forbidden!r} if name in sys.modules)
sys.exit(f"{{found}} imported by {package}" if found else 0)
"""


@pytest.mark.parametrize(
    ("package", "without", "forbidden"),
    [
        # Without the extra `gateway`, all but this room is there.
        ("data_owner_client", "data_owner_client.gateway", ["transformers", "plm_owner_server", "fastapi", "uvicorn"]),
        ("data_owner_client", "-", ["transformers", "plm_owner_server"]),
        ("plm_owner_server", "-", ["data_owner_client", "sacrebleu", "matplotlib"]),
        ("protocol", "-", ["data_owner_client", "plm_owner_server", "transformers", "httpx", "fastapi"]),
    ],
)
def test_imports_point_one_way(package: str, without: str, forbidden: list[str]) -> None:
    probe = _PROBE.format(package=package, without=without, forbidden=forbidden)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_exported_names() -> None:
    assert sorted(data_owner_client.__all__) == data_owner_client.__all__
    assert set(data_owner_client.__all__) == set(data_owner_client._HOMES) == _imported_for_checkers()
    assert {name for name, each in vars(errors).items() if _is_error(each)} <= set(data_owner_client.__all__)
    for name in data_owner_client.__all__:
        exported = getattr(data_owner_client, name)
        # The tree of errors is described as a whole.
        assert exported.__doc__ or _is_error(exported), name
    assert set(data_owner_client.__all__) <= set(dir(data_owner_client))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        data_owner_client.nonsense  # noqa: B018


def _imported_for_checkers() -> set[str]:
    """Names that type checkers see: those imported under TYPE_CHECKING."""
    tree = ast.parse(Path(data_owner_client.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, errors.PemaError)


@pytest.mark.parametrize(
    "code",
    [
        "import data_owner_client",
        "from data_owner_client.cli import run; run(['--help'])",
        "from data_owner_client.cli import run; run(['train', '--help'])",
        "from data_owner_client import ConnectionSettings, DecodingSettings, SamplingSettings, TrainingSettings",
    ],
)
def test_help_and_settings_import_nothing_heavy(code: str) -> None:
    heavy = ["torch", "numpy", "httpx", "grpc", "matplotlib", "sacrebleu", "sklearn", "tokenizers", "safetensors"]
    probe = f"{code}\nimport sys\nsys.exit(str([name for name in {heavy!r} if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_files_are_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": "b"}')
    program = f"""
import sys
from data_owner_client.cli import run
run(["data", "check", {str(tmp_path / "a.jsonl")!r}])
sys.exit(str([name for name in ["torch", "scipy", "sklearn", "pyarrow", "tokenizers"] if name in sys.modules] or ""))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "1 pair" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("arguments", [[], ["serve"], ["tenants"], ["tenants", "add"]], ids=" ".join)
def test_the_servers_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["alembic", "anyio", "fastapi", "grpc", "numpy", "sqlalchemy", "torch", "transformers", "uvicorn"]
    program = f"""
import sys
from plm_owner_server.cli import main
try:
    main()
finally:
    sys.stderr.write(" ".join(name for name in {heavy!r} if name in sys.modules))
"""
    command = [sys.executable, "-c", program, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: pema-server" in done.stdout
    assert done.stderr == ""
