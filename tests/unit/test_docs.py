"""The documentation: links lead somewhere, named files exist, and samples are valid."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import data_owner_client
from data_owner_client.data.redaction.rules import RedactionRules
from data_owner_client.data.tasks import Task
from docs.check_prose import headless_summaries, sentences

_ROOT = Path(__file__).parents[2]
_LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=_ROOT, capture_output=True, text=True, check=True)  # noqa: S607
_PAGES = [_ROOT / name for name in _LISTED.stdout.splitlines() if (_ROOT / name).exists()]
_REFERENCE = _ROOT / "docs" / "reference"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_PATH = re.compile(r"`((?:\w[\w.-]*/)+[\w.-]+\.(?:py|md|toml|proto|yml|json))`")


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M)}


def _samples(language: str) -> Iterator[tuple[Path, str]]:
    for page in _PAGES:
        for name, code in _FENCE.findall(page.read_text()):
            if name == language:
                yield page, code


def _commands() -> Iterator[tuple[Path, list[str]]]:
    """Every call of the two programs in a shell sample, as words."""
    for page, code in _samples("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for program in ("pema-client", "pema-server"):
                if program in words:
                    yield page, words[words.index(program) :]


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(re.sub(_FENCE, "", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked), target


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_named_files_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it also names what is gone
    for name in _PATH.findall(page.read_text()):
        roots = (_ROOT, page.parent, _ROOT / "plm_owner_server", _ROOT / "data_owner_client")
        assert name.startswith("runs/") or any((root / name).exists() for root in roots), name


def test_no_page_has_a_placeholder() -> None:
    assert not [page.name for page in _PAGES if "@@" in page.read_text()]


def test_python_samples_name_what_exists() -> None:
    samples = list(_samples("python"))
    assert samples
    for page, code in samples:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "data_owner_client":
                assert {alias.name for alias in node.names} <= set(data_owner_client.__all__), page


def test_task_and_rule_samples_are_what_they_say() -> None:
    samples = [tomllib.loads(code) for _, code in _samples("toml")]
    tasks, rules = [each for each in samples if "name" in each], [each for each in samples if "name" not in each]
    assert tasks
    assert rules
    for fields in tasks:
        assert Task.model_validate(fields).name
    for fields in rules:
        assert RedactionRules.model_validate(fields)


def test_shell_samples_use_options_that_exist() -> None:
    options = set(re.findall(r"--[a-z][\w-]+", "".join(page.read_text() for page in _REFERENCE.glob("*.md"))))
    commands = list(_commands())
    assert len(commands) > 20
    for page, words in commands:
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{page.name}: {word}"


def test_the_prose_check_finds_what_it_should(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""What a thing is."""\n\n\ndef f() -> None:\n    """Return the thing."""\n')
    assert list(headless_summaries(module)) == [(1, "What a thing is.")]
    page = "# Heading\n\nOne sentence. Another `one with code` here.\n\n```sh\nno prose at all\n```\n| no | prose |\n"
    assert [text for _, text in sentences(page)] == ["One sentence.", "Another Code here."]
