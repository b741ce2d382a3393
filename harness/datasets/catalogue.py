"""All data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from data_owner_client.data.tasks import Kind
from harness.datasets import archaic_english, chitchat, cwe, home_assistant, intents, spam, web_interfaces, wordnet

_BIBLES = (archaic_english.ARCHAIC, archaic_english.CONTEMPORARY)


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
        kind: kind of its task.
        content: source and target in a few words.
        packages: packages that it comes from.
        licence: licence of the texts.
        prepare: writes `train.jsonl`, `validation.jsonl`, `test.jsonl` and `task.toml` into a folder, unless they are
            there already; takes the folder, and perhaps the number of training examples as `train`.
    """

    kind: Kind
    content: str
    packages: tuple[str, ...]
    licence: str
    prepare: Callable[..., None]


def _interfaces(language: str) -> DataSet:
    content = f"interface text, English → {web_interfaces.LANGUAGES[language]}"
    prepare = partial(web_interfaces.prepare, language=language)
    return DataSet("rewrite", content, web_interfaces.PACKAGES, "BSD-3-Clause", prepare)


def _frames(language: str, name: str) -> DataSet:
    content, prepare = f"command → intent and slots, {name}", partial(intents.prepare, language=language)
    return DataSet("extract", content, (intents.PACKAGE,), "Apache-2.0", prepare)


def _intent_names(language: str, name: str) -> DataSet:
    content = f"command → one of 42 intents, {name}"
    prepare = partial(intents.prepare, language=language, kind="classify")
    return DataSet("classify", content, (intents.PACKAGE,), "Apache-2.0", prepare)


def _nouns(kind: Literal["classify", "answer"], content: str) -> DataSet:
    return DataSet(kind, content, (wordnet.PACKAGE,), "WordNet", partial(wordnet.prepare, kind=kind))


DATA_SETS: Mapping[str, DataSet] = MappingProxyType(
    {
        "home-assistant": DataSet(
            "rewrite",
            "interface text, English → German",
            (home_assistant.PACKAGE,),
            "Apache-2.0",
            home_assistant.prepare,
        ),
        "web-interfaces-fr": _interfaces("fr"),
        "web-interfaces-pl": _interfaces("pl"),
        "archaic-english": DataSet(
            "rewrite", "verse, archaic → contemporary English", _BIBLES, "public domain", archaic_english.prepare
        ),
        "intent-names-en": _intent_names("en", "English"),
        "intent-names-de": _intent_names("de", "German"),
        "spam": DataSet("classify", "mail → spam or ham", (spam.PACKAGE,), "PDDL-1.0 and CC0-1.0", spam.prepare),
        "wordnet-classes": _nouns("classify", "noun with gloss → one of 25 classes"),
        "intents-en": _frames("en", "English"),
        "intents-de": _frames("de", "German"),
        "wordnet-hypernyms": _nouns("answer", "noun with gloss → more general noun"),
        "cwe": DataSet("summarise", "software weakness → title", (cwe.PACKAGE,), "MIT, CWE terms of use", cwe.prepare),
        "chitchat": DataSet("chat", "conversation → next turn", (chitchat.PACKAGE,), "MIT", chitchat.prepare),
    }
)
