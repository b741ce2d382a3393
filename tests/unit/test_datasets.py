"""The data sets' preparation, on small texts of their packages' forms; nothing is downloaded."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hassil import Intents, recognize_all
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client import load_task, read_pairs
from harness.datasets import chitchat, cwe, intents, spam, web_interfaces, wordnet
from harness.datasets.catalogue import DATA_SETS
from harness.datasets.drawing import draw_evenly, without_near_duplicates
from harness.datasets.files import write_splits
from harness.datasets.packages import keep_licences
from harness.datasets.sentence_templates import Household

_TEMPLATES: dict[str, Any] = {
    "language": "en",
    "intents": {
        "HassTurnOn": {
            "data": [
                {
                    "sentences": [
                        "<turn> on [the] {area} (light|lights)",
                        "[please] <turn> on [the] (light|lights) in [the] {area}",
                        "activate [the] {area} (light|lights)",
                        "(light|lights) on in [the] {area}",
                    ],
                    "slots": {"domain": "light"},
                },
                {"sentences": ["<turn> on {name}", "activate {name}", "{name} on", "(start;{name})"]},
            ]
        },
        "HassSetVolume": {
            "data": [
                {
                    "sentences": [
                        "set [the] volume to {volume:volume_level} [percent]",
                        "volume {volume:volume_level}",
                        "make it {volume:volume_level} percent loud",
                        "volume at {volume:volume_level} [percent]",
                    ]
                },
            ]
        },
        "HassListAddItem": {"data": [{"sentences": ["put {item} on my list", "my list needs {item}"]}]},
        "HassGetWeather": {
            "data": [
                {
                    "sentences": ["weather in {name}", "is it raining in {name}", "how (hot|cold) is {name}"],
                    "requires_context": {"domain": ["weather"]},
                }
            ]
        },
    },
    "lists": {"volume": {"range": {"from": 0, "to": 100}}, "item": {"wildcard": True}},
    "expansion_rules": {"turn": "(turn|switch)"},
}
_HOUSEHOLD = Household(
    areas=["kitchen", "attic", "study"],
    floors=[],
    names={"light": ["desk lamp", "pendant"], "weather": ["Oslo", "Lisbon"]},
    wildcards={"item": ["oat milk", "six eggs"]},
)
_COUNTS = {"train": 40, "validation": 8, "test": 12, "shots": 2}


def _commands(seed: int = 1) -> dict[str, list[intents.Command]]:
    return intents.draw_commands(Intents.from_dict(_TEMPLATES), _HOUSEHOLD, _COUNTS, random.Random(seed))


def test_every_command_has_a_reading_of_hassil_with_its_frame() -> None:
    parsed = Intents.from_dict(_TEMPLATES)
    for command in (command for commands in _commands().values() for command in commands):
        readings = recognize_all(command.text, parsed, slot_lists=_HOUSEHOLD.slot_lists())
        frames = [
            (found.intent.name, {name: entity.value for name, entity in found.entities.items()}) for found in readings
        ]
        assert (command.intent, command.slots) in frames


def test_no_sentence_is_drawn_twice_and_the_seed_decides() -> None:
    splits = _commands()
    texts = [command.text.casefold() for commands in splits.values() for command in commands]
    assert len(texts) == len(set(texts))
    assert splits == _commands()
    assert splits != _commands(seed=2)
    assert {command.intent for command in splits["test"]} >= {"HassTurnOn", "HassSetVolume"}


@given(st.integers())
def test_no_template_is_in_two_splits(seed: int) -> None:
    splits = intents.split_templates(Intents.from_dict(_TEMPLATES), 2, random.Random(seed))
    texts = [
        {template.text for listed in templates.values() for template, _ in listed} for templates in splits.values()
    ]
    assert sum(map(len, texts)) == len(set[str | None]().union(*texts)) == 17
    # Too few templates to hold any out.
    assert "HassListAddItem" not in splits["test"].keys() | splits["validation"].keys()


def test_names_are_those_of_the_domain_that_a_template_asks_for() -> None:
    weather = [command for command in _commands()["train"] if command.intent == "HassGetWeather"]
    assert {command.slots["name"] for command in weather} <= {"Oslo", "Lisbon"}


def test_the_schema_of_frames_takes_frames_alone() -> None:
    commands = [command for commands in _commands().values() for command in commands]
    schema = intents.frame_schema(Intents.from_dict(_TEMPLATES), commands)
    validator = jsonschema.Draft202012Validator(schema)
    assert all(validator.is_valid({"intent": command.intent, **command.slots}) for command in commands)
    for wrong in ({"intent": "HassFly"}, {"area": "kitchen"}, {"intent": "HassTurnOn", "domain": "lock"}):
        assert not validator.is_valid(wrong)
    assert next(iter(schema["properties"])) == "intent"


@pytest.mark.parametrize("kind", ["extract", "classify"])
def test_prepared_intents_are_read_by_the_client(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "home_assistant_intents-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("home_assistant_intents/data/en.json", json.dumps(_TEMPLATES))
        wheel.writestr("home_assistant_intents-1.dist-info/LICENSE", "the licence")
    monkeypatch.setattr(Household, "load", classmethod(lambda cls, language: _HOUSEHOLD))
    intents.prepare(tmp_path, train=30, kind=kind)
    task, pairs = load_task(tmp_path / "task.toml"), read_pairs(tmp_path / "train.jsonl")
    assert task.kind == kind
    assert len(task.examples) == intents.SHOTS
    for pair in [*pairs, *read_pairs(tmp_path / "test.jsonl")]:
        assert pair.target is not None
        if kind == "classify":
            assert pair.target in task.labels
        else:
            assert json.loads(pair.target)["intent"] in _TEMPLATES["intents"]
    assert [path.read_text() for path in (tmp_path / "licences").rglob("*LICENSE")] == ["the licence"]


@given(st.dictionaries(st.integers(), st.lists(st.integers(), max_size=9), max_size=5), st.integers(0, 30))
def test_classes_have_equal_shares_until_they_run_out(classes: dict[int, list[int]], count: int) -> None:
    pools = {name: [(name, place) for place in range(len(pool))] for name, pool in classes.items()}
    drawn = draw_evenly(pools, count, random.Random(0))
    assert len(drawn) == len(set(drawn)) == min(count, sum(map(len, pools.values())))
    shares = {name: sum(item[0] == name for item in drawn) for name in pools}
    most = max(shares.values(), default=0)
    assert all(share >= min(most - 1, len(pools[name])) for name, share in shares.items())


def test_near_duplicates_are_left_out() -> None:
    texts = ["The parcel was sent on Monday.", "a quite different sentence", "the parcel was sent on Monday!"]
    assert without_near_duplicates(texts, 0.8) == [0, 1]


def test_texts_of_mails_show_neither_headers_nor_addresses() -> None:
    mail = EmailMessage()
    mail["From"], mail["Subject"] = "anna@example.org", "Grüße"
    mail.set_content("Write to me@example.org or see http://example.org/a?b.\n\n" + "word " * 300)
    text = spam.short_text(mail.as_string())
    assert text.startswith("Grüße | Write to (address) or see (link) word")
    assert len(text) <= spam.LONGEST
    assert text.endswith("word")
    page = EmailMessage()
    page.set_content("<html><head><title>t</title></head><style>p {}</style><p>Fish &amp; <b>chips</b>", subtype="html")
    assert spam.short_text(page.as_string()) == "| Fish & chips"


def test_mails_are_drawn_half_and_half() -> None:
    mails = [(f"Subject: {word}\n\n{word} " + f"{word}{word} " * 9, group) for word, group in _words_and_groups()]
    drawn = spam.draw_mails(mails, 6)
    assert sorted(label for _, label in drawn) == ["ham"] * 3 + ["spam"] * 3


def _words_and_groups() -> list[tuple[str, str]]:
    words = ["alphabet", "butterfly", "chocolate", "dandelion", "elephant", "firework", "grammar", "hospital"]
    return [(word, "spam-1" if number % 2 else "easy-ham-2") for number, word in enumerate(words)]


_SYNSETS = """  1 This software and database is being provided to you, the LICENSEE
02085998 05 n 02 canine 0 canid 0 001 ~ 02086723 n 0000 | any of various fissiped mammals; "of the canines"
02086723 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02085998 n 0000 ~ 02115335 n 0000 | a member of the \
genus Canis; occurs in many breeds; "the dog barked all night"  \n"""


def test_nouns_of_wordnet_have_words_gloss_and_hypernyms() -> None:
    nouns = wordnet.read_nouns(_SYNSETS)
    assert nouns["02086723"] == wordnet.Noun(
        words=("dog", "domestic dog", "Canis familiaris"),
        number=5,
        gloss="a member of the genus Canis; occurs in many breeds",
        hypernyms=("02085998",),
    )
    assert wordnet.CLASSES[5] == "animal"
    assert wordnet.CLASSES[28] == "time"


def test_titles_of_weaknesses_leave_out_deprecated_ones() -> None:
    table = (
        "CWE-ID,Name,Status,Description\n"
        '1,Missing Lock,Draft,"The product has no  lock."\n'
        "2,Old,Deprecated,Gone and never seen again.\n"
        "3,Weak Hash,Stable,A digest can be guessed by anybody.\n"
    )
    assert sorted(cwe.titles([table, table])) == [
        ("A digest can be guessed by anybody.", "Weak Hash"),
        ("The product has no lock.", "Missing Lock"),
    ]


def test_conversations_have_turns_of_user_and_assistant() -> None:
    said = ["What would you do with wings?", "Fly home.", "And then?", "Sleep", ""]
    record = {"messages": [[{"text": text, "sender": "x"}, {"text": "  "}] for text in said]}
    short = {"messages": [[{"text": "Hi"}], [{"text": "Hello you"}]]}
    (turns,) = chitchat.conversations([record, short, record])
    assert [turn["content"] for turn in turns] == said[:4]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2


def test_translations_are_of_one_line() -> None:
    texts = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n > 1);\n",
        "Save the page": "Enregistrer la page",
        "month\x04May": "mai",
        "%d entry\x00%d entries": "%d entrée\x00%d entrées",
        "Two\nlines": "Deux\nlignes",
        "OK": "OK",
    }
    assert sorted(web_interfaces.translations([_compiled(texts)])) == [
        ("%d entry", "%d entrée"),
        ("May", "mai"),
        ("Save the page", "Enregistrer la page"),
    ]


def _compiled(texts: dict[str, str]) -> bytes:
    """A catalogue in the format of GNU gettext's `.mo` files."""
    pairs = sorted((source.encode(), target.encode()) for source, target in texts.items())
    head, blob = 28, b""
    tables: tuple[list[int], list[int]] = ([], [])
    start = head + 16 * len(pairs)
    for column, table in enumerate(tables):
        for pair in pairs:
            table += [len(pair[column]), start + len(blob)]
            blob += pair[column] + b"\0"
    index = struct.pack(f"<{4 * len(pairs)}I", *tables[0], *tables[1])
    return struct.pack("<7I", 0x950412DE, 0, len(pairs), head, head + 8 * len(pairs), 0, start) + index + blob


def test_only_a_packages_own_licences_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "pack-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("pack-1.dist-info/LICENSE", "pack/cwe.NOTICE", "pack/static/js/LICENSE.txt", "pack/license.py"):
            wheel.writestr(name, "text")
    keep_licences(path, tmp_path)
    kept = {found.name for found in (tmp_path / "licences" / path.stem).iterdir()}
    assert kept == {"pack-1.dist-info_LICENSE", "pack_cwe.NOTICE"}


def test_texts_survive_the_splits(tmp_path: Path) -> None:
    question = {"question": "What is a dog?", "answers": ["canine", "canid"]}
    write_splits(tmp_path, train=[("Größe", 'a "b"')], validation=[question], test=[])
    (pair,) = read_pairs(tmp_path / "train.jsonl")
    assert (pair.source, pair.target) == ("Größe", 'a "b"')
    assert (tmp_path / "test.jsonl").read_bytes() == b""


def test_every_kind_of_task_has_a_data_set() -> None:
    kinds = {data.kind for data in DATA_SETS.values()}
    assert kinds == {"rewrite", "classify", "extract", "answer", "summarise", "chat"}
