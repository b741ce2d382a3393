"""The generated reference pages are those that the code gives."""

import pytest

from docs.build_reference import FOLDER, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_fresh(name: str) -> None:
    page = PAGES[name]()
    assert page == PAGES[name]()
    assert (FOLDER / name).read_text(encoding="utf-8") == page, "run python -m docs.build_reference"
