"""Real data for extraction and classification: sentences to a smart home, with their intents and slots.

The templates are Home Assistant's own, from `home-assistant-intents` (Apache-2.0) in 65 languages. `hassil`
(Apache-2.0) parses them, and checks each label: a sentence stays only if Home Assistant would understand it alike.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema
from hassil import IntentData, Intents, Sentence, TextSlotList, recognize_best

from data_owner_client.data.tasks import Task
from harness.datasets.drawing import draw_evenly
from harness.datasets.files import SourceAndTarget, is_prepared, shots, write_splits, write_task
from harness.datasets.packages import fetch_wheel, keep_licences, read_members
from harness.datasets.sentence_templates import Household, SentenceSampler, Slots

PACKAGE = "home-assistant-intents==2026.10.27"
TRAIN, VALIDATION, TEST, SHOTS = 2000, 200, 250, 4
# Shares of an intent's templates that only validation, or only test, has sentences of.
_HELD_OUT = {"test": 0.2, "validation": 0.15}
_ROUNDS = 30
_SEED = 20261127
# A room that sentences may leave to the context, as "turn on the lights" does. It is in no sentence.
_CONTEXT_AREA = "\u2060here"
_INSTRUCTIONS = {
    "extract": "Write the command to a smart home as JSON: its intent and its slots.",
    "classify": "Name the intent of the command to a smart home.",
}


@dataclass(frozen=True)
class Command:
    """A sentence and its frame.

    Attributes:
        text: the sentence.
        intent: name of its intent.
        slots: values of its slots.
    """

    text: str
    intent: str
    slots: Slots


Templates = Mapping[str, Sequence[tuple[Sentence, IntentData]]]
"""The templates of each intent."""


def prepare(
    folder: Path,
    train: int = TRAIN,
    validation: int = VALIDATION,
    test: int = TEST,
    language: str = "en",
    kind: Literal["extract", "classify"] = "extract",
) -> None:
    """Write sentences and their frames, or their intents alone, unless they are there already.

    No template has sentences in two of the splits, nor among the worked examples.

    Args:
        folder: folder of the data set.
        train: number of training sentences.
        validation: number of validation sentences.
        test: number of test sentences.
        language: a language of the package; English and German have words of their own for rooms and devices.
        kind: `extract` for frames as JSON, `classify` for intents.
    """
    if is_prepared(folder):
        return
    wheel = fetch_wheel(PACKAGE, folder)
    keep_licences(wheel, folder)
    name = f"home_assistant_intents/data/{language}.json"
    intents = Intents.from_dict(json.loads(read_members(wheel, name.__eq__)[name]))
    counts = {"test": test, "validation": validation, "shots": SHOTS, "train": train}
    splits = draw_commands(intents, Household.load(language), counts, random.Random(_SEED))
    everything = [command for commands in splits.values() for command in commands]
    schema = frame_schema(intents, everything)
    form = (lambda command: (command.text, command.intent)) if kind == "classify" else _Frames(schema)
    pairs = {split: [form(command) for command in commands] for split, commands in splits.items()}
    write_splits(folder, train=pairs["train"], validation=pairs["validation"], test=pairs["test"])
    write_task(
        folder / "task.toml",
        Task(
            name=f"home-assistant-intents-{language}" + ("-classify" if kind == "classify" else ""),
            kind=kind,
            labels=tuple(schema["properties"]["intent"]["enum"]) if kind == "classify" else (),
            answer_schema=schema if kind == "extract" else None,
            language=None if language == "en" else language,
            instruction=_INSTRUCTIONS[kind],
            source_label="Command",
            target_label="Intent" if kind == "classify" else "JSON",
            stop="\n",
            examples=shots(pairs["shots"]),
        ),
    )


def draw_commands(
    intents: Intents, household: Household, counts: Mapping[str, int], rng: random.Random
) -> dict[str, list[Command]]:
    """Commands of each split, as evenly over the intents as their templates allow; no sentence is drawn twice.

    Args:
        intents: templates, lists and rules of a language.
        household: words for open lists.
        counts: number of commands of each split.
        rng: source of the choices.
    """
    sampler, recogniser, seen = SentenceSampler(intents, household, rng), _Recogniser(intents, household), set[str]()

    def commands(intent: str, templates: Sequence[tuple[Sentence, IntentData]]) -> Iterator[Command]:
        for command in _draw_all(intent, templates, sampler):
            if command.text.casefold() not in seen and recogniser.agrees(command):
                seen.add(command.text.casefold())
                yield command

    drawn: dict[str, list[Command]] = {}
    for split, templates in split_templates(intents, counts["shots"], rng).items():
        pools = {intent: commands(intent, listed) for intent, listed in templates.items()}
        drawn[split] = draw_evenly(pools, counts[split], rng)
    return drawn


def split_templates(intents: Intents, shot_count: int, rng: random.Random) -> dict[str, Templates]:
    """The templates of each split. Equal templates of several blocks stay together; few ones are for training alone.

    The worked examples have one template each, of the intents with most templates.
    """
    splits: dict[str, dict[str, list[tuple[Sentence, IntentData]]]] = {
        split: defaultdict(list) for split in ("test", "validation", "shots", "train")
    }
    by_text = {name: _by_text(intent.data) for name, intent in sorted(intents.intents.items())}
    largest = sorted(by_text, key=lambda name: -len(by_text[name]))[:shot_count]
    for name, templates in by_text.items():
        texts = sorted(templates)
        rng.shuffle(texts)
        parts = {"shots": [texts.pop()] if name in largest else []}
        for split, share in _HELD_OUT.items():
            size = max(1, round(share * len(texts))) if len(texts) >= 3 else 0
            parts[split], texts = texts[:size], texts[size:]
        for split, part in (parts | {"train": texts}).items():
            for text in part:
                splits[split][name] += templates[text]
    return dict(splits)


def frame_schema(intents: Intents, commands: Iterable[Command]) -> dict[str, Any]:
    """The JSON schema of frames: the intents, and for each slot the values of its closed list, or its type."""
    values: dict[str, list[Any]] = defaultdict(list)
    for command in commands:
        for slot, value in command.slots.items():
            values[slot].append(value)
    closed = _closed_values(intents)
    properties = {slot: _value_schema(closed.get(slot), values[slot]) for slot in sorted(values)}
    names = sorted({command.intent for command in commands} | set(intents.intents))
    return {
        "type": "object",
        "properties": {"intent": {"enum": names}, **properties},
        "required": ["intent"],
        "additionalProperties": False,
    }


def _draw_all(
    intent: str, templates: Sequence[tuple[Sentence, IntentData]], sampler: SentenceSampler
) -> Iterator[Command]:
    """Draw from each template in turn, some rounds long."""
    for _ in range(_ROUNDS):
        for template, block in templates:
            if drawn := sampler.draw(template, block):
                yield Command(drawn[0], intent, drawn[1])


def _by_text(blocks: Sequence[IntentData]) -> dict[str, list[tuple[Sentence, IntentData]]]:
    templates: dict[str, list[tuple[Sentence, IntentData]]] = defaultdict(list)
    for block in blocks:
        for template in block.sentences:
            templates[template.text or ""].append((template, block))
    return templates


class _Recogniser:
    """Home Assistant's own understanding of sentences."""

    def __init__(self, intents: Intents, household: Household) -> None:
        self._intents = intents
        self._lists = household.slot_lists()

    def agrees(self, command: Command) -> bool:
        """Return True if hassil reads the same intent and slots in the sentence."""
        found = recognize_best(
            command.text,
            self._intents,
            slot_lists=self._lists,
            intent_context={"area": _CONTEXT_AREA},
            language=self._intents.language,
            best_slot_name="name",
        )
        if found is None:
            return False
        slots = {name: entity.value for name, entity in found.entities.items() if entity.value != _CONTEXT_AREA}
        return found.intent.name == command.intent and slots == command.slots


class _Frames:
    """Writes commands as JSON, with the keys in the order of a schema, which it checks."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._keys = list(schema["properties"])
        self._validator = jsonschema.Draft202012Validator(schema)

    def __call__(self, command: Command) -> SourceAndTarget:
        values = {"intent": command.intent, **command.slots}
        frame = {key: values[key] for key in self._keys if key in values}
        self._validator.validate(frame)
        return command.text, json.dumps(frame, ensure_ascii=False)


def _closed_values(intents: Intents) -> dict[str, list[Any]]:
    """The values of each slot that only closed lists and fixed values fill."""
    values: dict[str, list[Any]] = defaultdict(list)
    is_open: set[str] = set()
    for intent in intents.intents.values():
        for block in intent.data:
            for slot, value in block.slots.items():
                values[slot].append(value)
            for template in block.sentences:
                for reference in template.expression.list_references(intents.expansion_rules):
                    listed = intents.slot_lists.get(reference.list_name)
                    if isinstance(listed, TextSlotList):
                        values[reference.slot_name] += [entry.value_out for entry in listed.values]
                    else:
                        is_open.add(reference.slot_name)
    return {slot: listed for slot, listed in values.items() if slot not in is_open}


def _value_schema(closed: Sequence[Any] | None, values: Sequence[Any]) -> dict[str, Any]:
    if closed is not None:
        return {"enum": sorted(set(closed), key=str)}
    types = sorted({"integer" if isinstance(value, int) else "string" for value in values})
    return {"type": types[0] if len(types) == 1 else types}
