"""Fill the tables and draw the pictures of `docs/findings.md`: `python -m benchmarks.findings`.

What stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced; the prose around it stays.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.compare import FOLDER as COMPARISONS
from benchmarks.findings import comparisons, sensitivity
from benchmarks.sensitivity.results import Results
from data_owner_client.evaluation.comparison.results import Comparison
from data_owner_client.runtime.atomic_files import write_atomically
from protocol import standard_streams

_PAGE, _IMAGES = Path("docs/findings.md"), Path("docs/images")


def main() -> None:
    """Write tables and pictures of everything that was measured."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    standard_streams.use_utf8()
    results = Results.load()
    if not list(results):
        sys.exit("Nothing was measured: run `python -m benchmarks.sensitivity` first.")
    sections = sensitivity.tables(results)
    measured = [Comparison.model_validate_json(path.read_bytes()) for path in sorted(COMPARISONS.glob("*.json"))]
    sections |= comparisons.tables(measured)
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in sections.items():
        page = with_section(page, name, text)
    write_atomically(_PAGE, page.encode())
    pictures = sensitivity.draw(results, _IMAGES)
    for path in (_PAGE, *pictures):
        print(f"{path} written")


def with_section(page: str, name: str, text: str) -> str:
    """The page with another text between the marks of a section.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
    if not pattern.search(page):
        raise ValueError(f"The page has no section {begin}.")
    return pattern.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", page)


if __name__ == "__main__":
    main()
