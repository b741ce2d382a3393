"""Sentences from the templates of `home-assistant-intents`, drawn by a random walk.

`hassil.sample` enumerates all sentences of a template, of which there may be millions; a walk draws one.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hassil import (
    Alternative,
    Expression,
    Group,
    IntentData,
    Intents,
    ListReference,
    Permutation,
    RangeSlotList,
    RuleReference,
    Sentence,
    SlotList,
    TextChunk,
    TextSlotList,
    WildcardSlotList,
    normalize_whitespace,
)

Value = str | int | float
Slots = dict[str, Value]
_HOUSEHOLDS = Path(__file__).parent / "household"


@dataclass(frozen=True)
class Household:
    """Words for the lists that templates leave open.

    Attributes:
        areas: rooms.
        floors: floors.
        names: names of devices, persons and lists, by domain.
        wildcards: texts for lists that take any text, by list.
    """

    areas: Sequence[str]
    floors: Sequence[str]
    names: Mapping[str, Sequence[str]]
    wildcards: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, language: str) -> Household:
        """The words of a language; names that are written alike in many languages, if it has no file of its own."""
        path = _HOUSEHOLDS / f"{language}.toml"
        return cls(**tomllib.loads((path if path.exists() else _HOUSEHOLDS / "any.toml").read_text(encoding="utf-8")))

    def slot_lists(self) -> dict[str, SlotList]:
        """The lists that home-assistant-intents leaves open; each name with its domain as context."""
        named = [(name, name, {"domain": domain}) for domain, names in self.names.items() for name in names]
        return {
            "area": TextSlotList.from_strings(self.areas, name="area"),
            "floor": TextSlotList.from_strings(self.floors, name="floor"),
            "name": TextSlotList.from_tuples(named, name="name"),
        }


@dataclass
class _Walk:
    """One walk: the block that the template belongs to, and the slots that it has filled."""

    block: IntentData
    slots: Slots = field(default_factory=dict)


class SentenceSampler:
    """Draws sentences with the slots that they fill.

    Args:
        intents: templates, lists and rules of a language.
        household: words for open lists.
        rng: source of the choices.
    """

    def __init__(self, intents: Intents, household: Household, rng: random.Random) -> None:
        self._rules = intents.expansion_rules
        self._lists = {**intents.slot_lists, **household.slot_lists()}
        self._wildcards = household.wildcards
        self._rng = rng

    def draw(self, template: Sentence, block: IntentData) -> tuple[str, Slots] | None:
        """A random sentence of a template and its slots; None if the household has no word for a list of it.

        Args:
            template: the template.
            block: the block that it belongs to, with slots that all sentences of the block have.
        """
        walk = _Walk(block)
        try:
            text = normalize_whitespace(self._text(template.expression, walk)).strip()
        except IndexError:  # nothing to choose from
            return None
        return text, {**walk.slots, **block.slots}

    def _text(self, expression: Expression, walk: _Walk) -> str:
        match expression:
            case TextChunk():
                return str(expression.original_text)
            case Alternative():
                # Authors write the usual wording first: weights 1, 1/2, 1/3, … for all but optional words.
                ranks = [1 if expression.is_optional else rank for rank in range(1, len(expression.items) + 1)]
                (item,) = self._rng.choices(expression.items, [1 / rank for rank in ranks])
                return self._text(item, walk)
            case Permutation():
                items = self._rng.sample(expression.items, len(expression.items))
                return "".join(self._text(item, walk) for item in items)
            case Group():
                return "".join(self._text(item, walk) for item in expression.items)
            case RuleReference():
                rules = {**self._rules, **walk.block.expansion_rules}
                return self._text(rules[expression.rule_name].expression, walk)
            case ListReference():
                return self._value(expression, walk)
        raise TypeError(f"A template has a {type(expression).__name__}.")

    def _value(self, reference: ListReference, walk: _Walk) -> str:
        text: str
        listed = {**self._lists, **walk.block.slot_lists}[reference.list_name]
        value: Value
        match listed:
            case TextSlotList():
                chosen = self._rng.choice([entry for entry in listed.values if _fits(entry.context, walk.block)])
                text = normalize_whitespace(self._text(chosen.text_in, walk)).strip()
                value = chosen.value_out
            case RangeSlotList():
                number = self._rng.randrange(listed.start, listed.stop + 1, listed.step)
                text, value = str(number), int(number * (listed.multiplier or 1))
            case WildcardSlotList():
                text = value = self._rng.choice(self._wildcards.get(reference.list_name, ()))
            case _:
                raise TypeError(f"A template has a {type(listed).__name__}.")
        walk.slots[reference.slot_name] = value
        return text


def _fits(context: Mapping[str, Any] | None, block: IntentData) -> bool:
    """Return True if a list's entry is of a domain that the block asks for."""
    domains = block.requires_context.get("domain")
    return domains is None or not context or context.get("domain") in domains
