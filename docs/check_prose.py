"""Check the prose of docstrings and Markdown pages: `python -m docs.check_prose`.

Two rules are checked, and the rest of the style is left to readers (see CONTRIBUTING.md).

1. A docstring's summary does not begin with a headless clause (What, Who, How, Whether, Of, Where, Which).
2. No sentence of a Markdown page has more than 30 words. Code, tables and links' addresses do not count as prose.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

MAX_WORDS = 30
_HEADLESS = re.compile(r"(What|Who|Whose|How|Whether|Of|Where|Which|That which)\b(?!.*\?$)")
_GENERATED = ("docs/reference/", "protocol/pema_pb2")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def headless_summaries(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each docstring summary that begins with a headless clause."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            summary = docstring.splitlines()[0]
            if _HEADLESS.match(summary):
                yield node.body[0].lineno, summary


def sentences(markdown: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each sentence of a Markdown page."""
    in_code = False
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        if in_code or line.startswith(("|", "    ", "```", "#", "<")):
            continue
        text = re.sub(r"`[^`]*`", "Code", line)
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"^\s*([-*>]|\d+\.)\s+", "", text).replace("**", "")
        for sentence in re.split(r"(?<=[.!?])[)\"*]*\s+(?=[A-Z0-9(*\"'κλ])", text):
            if sentence.strip():
                yield number, sentence.strip()


def _words(sentence: str) -> int:
    return len(re.findall(r"[\w'’−.,%×/@+-]*\w[\w'’%]*", sentence))


def _tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", pattern], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return [
        Path(name) for name in listed.stdout.splitlines() if not name.startswith(_GENERATED) and Path(name).exists()
    ]


def main() -> int:
    """Print every violation and the mean sentence length. Return 1 if there is a violation."""
    complaints: list[str] = []
    for path in _tracked("*.py"):
        complaints += [f"{path}:{line}: headless summary: {text}" for line, text in headless_summaries(path)]
    lengths: list[int] = []
    for path in _tracked("*.md"):
        for line, sentence in sentences(path.read_text(encoding="utf-8")):
            lengths.append(_words(sentence))
            if lengths[-1] > MAX_WORDS:
                complaints.append(f"{path}:{line}: {lengths[-1]} words: {sentence[:80]}…")
    print("\n".join(complaints))
    print(f"{len(complaints)} complaints; {len(lengths)} sentences of {mean(lengths or [0]):.1f} words on average")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
