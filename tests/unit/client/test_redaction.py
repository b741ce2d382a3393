"""Redaction: rules, spans, surrogates, what the owner sees of pairs and tasks, and contexts of redacted targets."""

from __future__ import annotations

import json
import re
import stat
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_owner_client import Redaction, RedactionRules, load_redaction
from data_owner_client.data.pairs import Conversation, Pair
from data_owner_client.data.redaction.key import KEY_FILE, new_key, open_key, replace_key
from data_owner_client.data.redaction.redactor import Redactor
from data_owner_client.data.redaction.report import report_redaction
from data_owner_client.data.redaction.spans import Span, TermFinder, find_spans
from data_owner_client.data.redaction.surrogates import SurrogateMap, masked
from data_owner_client.data.tasks import Task
from data_owner_client.memory.surrogate_target import SurrogateTarget
from data_owner_client.memory.tokenized_pairs import with_surrogates
from data_owner_client.plm.tokenizer import MarkedText, PlmTokenizer
from protocol.errors import InvalidData, Unsupported
from tests.small_tokenizers import KINDS, LOSSLESS, PREFIXED, bundle

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
NO_TERMS = TermFinder(())
TOKENIZERS = {kind: PlmTokenizer(bundle(KINDS[kind]())) for kind in KINDS}
NAME = SurrogateMap(KEY, None, TermFinder(["Anna"]))["Anna"]
SPANS = st.text(
    st.one_of(st.sampled_from("abcXYZ 019-.,@Äßéжλ東한٣½"), st.characters(exclude_categories=["Cs", "Cc"])), min_size=1
).filter(lambda text: text.strip() != "")


def rules(**fields: Any) -> Redaction:
    return Redaction.from_rules(RedactionRules(**fields))


def shape(sign: str) -> object:
    """The kind of a sign: its category and script; of accents and signs, the sign itself."""
    category = unicodedata.category(sign)
    script = unicodedata.name(sign, "").split(" ")[0].split("-")[0]
    if category[0] not in "LN" and (category not in ("Mn", "Mc") or script in ("COMBINING", "VARIATION")):
        return sign
    cased = "upper" if sign.isupper() else "lower" if sign.islower() else category
    return category[0], cased, script


@given(SPANS)
def test_a_surrogate_has_the_shape_of_its_span_and_is_another_text(span: str) -> None:
    surrogate = SurrogateMap(KEY, None, NO_TERMS)[span]
    assert len(surrogate) == len(span)
    assert surrogate != span
    assert surrogate == SurrogateMap(KEY, None, NO_TERMS)[span]
    assert [sign.isspace() for sign in surrogate] == [sign.isspace() for sign in span]
    if surrogate != masked(span):
        assert list(map(shape, surrogate)) == list(map(shape, span))
    else:
        # Nothing in it has another of its shape.
        assert not re.search("[A-Za-z0-9]", span)


@given(st.text("abcdefghijklmnop0123456789", min_size=12, max_size=30))
def test_another_key_gives_another_surrogate(span: str) -> None:
    # Two draws of twelve signs are equal with a probability below 5⁻¹².
    assert SurrogateMap(KEY, None, NO_TERMS)[span] != SurrogateMap(OTHER_KEY, None, NO_TERMS)[span]


@given(st.integers(-(10**12), 10**12))
def test_a_number_in_json_stays_a_number_in_json(number: int) -> None:
    redacted = SurrogateMap(KEY, None, NO_TERMS)[str(number)]
    assert str(int(redacted)) == redacted


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_surrogates_keep_token_boundaries_where_they_can(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    surrogates = SurrogateMap(KEY, tokenizer, NO_TERMS)
    for span in ("1234", "qx"):  # of no token with others, in any of these tokenizers
        lengths = [len(tokenizer.encode_continuation(f" {text}")) for text in (span, surrogates[span])]
        assert lengths[0] == lengths[1]


def test_no_surrogate_is_a_term() -> None:
    letters = TermFinder("bcdfghjklmnpqrstvwxyzaei")  # all but two
    assert {SurrogateMap(bytes([key]) * 32, None, letters)["a"] for key in range(50)} == {"o", "u"}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.sampled_from("xyz")), max_size=8), st.randoms())
def test_spans_are_merged_whatever_their_order(found: list[tuple[int, int, str]], random: Any) -> None:
    text = "".join(chr(ord("a") + at % 26) for at in range(30))
    spans = [(min(a, b), max(a, b), kind) for a, b, kind in found]
    merged = find_spans(text, [lambda _: spans])
    covered = {at for start, end, _ in spans for at in range(start, end)}
    assert {at for span in merged for at in range(span.start, span.end)} == covered
    assert all(one.end <= other.start for one, other in pairwise(merged))
    random.shuffle(spans)
    again = find_spans(text, [lambda _: spans[:3], lambda _: spans[3:]])
    assert [span[:2] for span in again] == [span[:2] for span in merged]


@pytest.mark.parametrize("found", [(0, 99, "x"), (2, 1, "x"), (0, 1, 2), (0,), None, (0.0, 1.0, "x"), ("a", "b", "c")])
def test_a_finder_that_gives_no_spans_is_explained(found: Any) -> None:
    with pytest.raises(InvalidData, match="must give \\(start, end, kind\\)"):
        find_spans("text", [lambda _: [found]])


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        ({"words": ["Anna", "New York", "C++"]}, "ANNA's C++ in new\n york, Annas", ["ANNA", "C++", "new\n york"]),
        ({"words": ["New", "New York City"]}, "New York New York City", ["New", "New York City"]),
        ({"words": ["Zoë"]}, "Zoe\u0308 and Zoë", ["Zoe\u0308", "Zoë"]),
        ({"builtin": ["numbers"]}, "7 of 1,250.50 in 2024.", ["7", "1,250.50", "2024"]),
        ({"builtin": ["dates"]}, "12.03.2024, 2024-03-12, 1/2/24, 1.5", ["12.03.2024", "2024-03-12", "1/2/24"]),
        ({"words": ["Anna"]}, "_Anna_, An\u00adna, \u200bANNA\ufeff", ["Anna", "An\u00adna", "ANNA"]),
        ({"words": ["O'Brien"]}, "O’Brien, O\u02bcBrien", ["O’Brien", "O\u02bcBrien"]),
        ({"words": ["Jean-Luc"]}, "Jean\u2011Luc, Jean–Luc", ["Jean\u2011Luc", "Jean–Luc"]),
        ({"words": ["Işık", "İpek"]}, "IŞIK ışık ipek İPEK", ["IŞIK", "ışık", "ipek", "İPEK"]),
        ({"words": ["田中", "สมชาย", "철수"]}, "田中さん ชื่อสมชายครับ 철수가", ["田中", "สมชาย", "철수"]),
        ({"words": ["バハ", "철"]}, "ハ\u3099ハ ﾊﾞﾊ \u110e\u1165\u11af가", ["ハ\u3099ハ", "ﾊﾞﾊ", "\u110e\u1165\u11af"]),
        ({"words": ["محمد"]}, "مُحَمَّد", ["مُحَمَّد"]),
        ({"builtin": ["dates"]}, "on2024-03-12T10:00", ["2024-03-12"]),
        ({"builtin": ["emails"]}, "to a.b+c@d-e.co.uk.", ["a.b+c@d-e.co.uk"]),
        ({"builtin": ["emails"]}, "jane.o'neil@x.ie", ["jane.o'neil@x.ie"]),
        ({"builtin": ["urls"]}, "see https://a.b/c?d=1 or www.e.f", ["a.b/c?d=1", "www.e.f"]),
        ({"builtin": ["urls"]}, "HTTPS://A.B ftp://c.d WWW.e.f", ["A.B", "c.d", "WWW.e.f"]),
        ({"patterns": [{"kind": "id", "regex": r"C-\d+"}]}, "C-12 and C-x", ["C-12"]),
        ({"words": ["b c"], "patterns": [{"kind": "id", "regex": "a b"}]}, "a b c d", ["a b c"]),
    ],
)
def test_rules_find_their_spans(fields: dict[str, Any], text: str, expected: list[str]) -> None:
    assert [text[span.start : span.end] for span in rules(**fields).spans(text)] == expected


def test_finders_are_fast_on_long_texts_and_lists() -> None:
    # Each takes minutes where the time grows with the square of the length, and fractions of a second as it is.
    assert not rules(builtin=["numbers", "dates", "emails", "urls"]).spans("a" * 1_000_000)
    terms = TermFinder(f"Dr {number}" for number in range(50_000))
    assert [*terms("Dr 1 Dr X " * 2_000)] == [Span(at, at + 4, "word") for at in range(0, 20_000, 10)]


@given(st.text("aN0 .-@w/:", max_size=40))
def test_everything_that_the_rules_find_is_replaced(text: str) -> None:
    redaction = rules(builtin=["numbers", "dates", "emails", "urls"], words=["an"])
    redacted = Redactor(redaction, KEY).redact(text)
    at = 0
    for span in redaction.spans(text):
        assert redacted[at : span.start] == text[at : span.start]
        assert redacted[span.start : span.end] != text[span.start : span.end]
        at = span.end
    assert redacted[at:] == text[at:]


def test_rules_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Anna\n\n  Bob \n", encoding="utf-8")
    path = tmp_path / "rules.toml"
    path.write_text(
        "builtin = ['numbers']\nword_files = ['names.txt']\nsources = true\n"
        "[[patterns]]\nkind = 'id'\nregex = 'C-\\d'\n"
    )
    redaction = load_redaction(path)
    text = "Anna and bob: C-1, 23"
    assert [text[span.start : span.end] for span in redaction.spans(text)] == ["Anna", "bob", "C-1", "23"]
    assert redaction.sources
    (tmp_path / "names.txt").write_text("Anna")
    assert load_redaction(path).digest != redaction.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "these rules find nothing"),
        ("word = ['a']", "Rules have: words, word_files"),
        ("words = [' ']", "blank word"),
        ("words = 1", "rules.toml: words"),
        ("words = [", "is not TOML"),
        ("builtin = ['names']", "builtin.0"),
        ("word_files = ['none.txt']", "none.txt cannot be read"),
        ("words = ['a']\nword_files = ['empty.txt']", "empty.txt has no words"),
        ("[[patterns]]\nkind = 'x'\nregex = '('", "is no regular expression"),
        ("[[patterns]]\nkind = 'x'\nregex = 'a*'", "matches the empty text"),
        ("python = 'a b'", "python"),
        ("python = 'nowhere_at_all:f'", "cannot be imported"),
        ("python = 'sys:path'", "is no function"),
    ],
)
def test_wrong_rules_are_explained(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rules.toml").write_text(content)
    (tmp_path / "empty.txt").write_text("\ufeff\r\n \r\n", encoding="utf-8")
    with pytest.raises(InvalidData, match=re.escape(message)):
        load_redaction(tmp_path / "rules.toml")


def test_rules_that_are_nowhere_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="neither a readable file nor module:function"):
        load_redaction(tmp_path / "none.toml")


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("own_finders")
    vars(module)["find"] = lambda text: [(match.start(), match.end(), "v") for match in re.finditer("[aeiou]", text)]
    monkeypatch.setitem(sys.modules, "own_finders", module)
    return module


def test_rules_may_be_a_function(own_module: ModuleType) -> None:
    expected = [Span(1, 2, "v"), Span(3, 4, "v")]
    assert load_redaction("own_finders:find").spans("hale") == expected
    assert Redaction.from_function(own_module.find).spans("hale") == expected
    assert rules(python="own_finders:find").spans("hale") == expected


def test_presidio_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(Unsupported, match=r"pip install .*redaction"):
        rules(presidio={})


def test_presidio_finds_entities() -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra `redaction` is not installed")
    redaction = rules(presidio={"entities": ["PHONE_NUMBER", "EMAIL_ADDRESS"]})
    text = "write to jane.doe@example.com or call (212) 555-0187"
    assert [(text[span.start : span.end], span.kind) for span in redaction.spans(text)] == [
        ("jane.doe@example.com", "email_address"),
        ("(212) 555-0187", "phone_number"),
    ]
    with pytest.raises(Unsupported, match="presidio finds no PERSON in this language without a model"):
        rules(presidio={"entities": ["PERSON"]})
    with pytest.raises(Unsupported, match="python -m spacy download xx_none"):
        rules(presidio={"model": "xx_none"})


def test_the_key_is_the_users_alone_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    key = open_key(folder)
    assert len(key) == 32
    path = folder / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert open_key(folder) == key
    replace_key(folder, other := new_key())
    assert open_key(folder) == other != key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in folder.iterdir()] == [KEY_FILE]
    path.write_bytes(b"short")
    with pytest.raises(InvalidData, match="is damaged"):
        open_key(folder)


def test_targets_and_sources_have_the_same_surrogates() -> None:
    redactor = Redactor(rules(words=["Anna"], sources=True), KEY)
    shown = redactor.redact_pair(Task(name="t"), Pair("Where is Anna?", "Anna is out. Ask Anna."))
    (name,) = set(re.findall(r"\b[A-Z][a-z]{3}\b", f"{shown.source} {shown.target}".replace("Where", "")))
    assert (shown.source, shown.target) == (f"Where is {name}?", f"{name} is out. Ask {name}.")
    assert redactor.replaced == {"word": 3}
    targets_only = Redactor(rules(words=["Anna"]), KEY)
    assert targets_only.redact_pair(Task(name="t"), Pair("Anna?", "Anna.")).source == "Anna?"


def test_held_out_texts_have_surrogates_of_their_own() -> None:
    redactor = Redactor(rules(words=["Anna", "Ottilie"], sources=True), KEY)
    pair = Pair(
        "Where is Anna?",
        "Ottilie is out. Ask Ottilie.",
        conversation=Conversation(({"role": "assistant", "content": "Anna"}, {"role": "user", "content": "Ottilie"})),
    )
    shown, held_out = (redactor.redact_pair(Task(name="t"), pair, held_out=each) for each in (False, True))
    for each in (shown, held_out):
        assert each.conversation is not None
        anna, ottilie = (str(turn["content"]) for turn in each.conversation.turns)
        assert (each.source, each.target) == (f"Where is {anna}?", f"{ottilie} is out. Ask {ottilie}.")
        assert (len(anna), len(ottilie)) == (4, 7)
        assert {anna, ottilie}.isdisjoint({"Anna", "Ottilie"})
        assert each == Redactor(redactor.redaction, KEY).redact_pair(Task(name="t"), pair, held_out=each is held_out)
    assert shown.source != held_out.source
    assert shown.target != held_out.target


@pytest.mark.parametrize("sources", [False, True])
def test_earlier_answers_are_redacted_as_targets_are(sources: bool) -> None:
    calls = [{"type": "function", "function": {"name": "call", "arguments": {"who": "Anna", "times": 41}}}]
    turns = (
        {"role": "user", "content": "Call Anna"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "user", "content": "Anna again"},
    )
    redactor = Redactor(rules(words=["Anna"], builtin=["numbers"], sources=sources), KEY)
    pair = Pair("Anna again", "Anna is called", conversation=Conversation(turns))
    shown = redactor.redact_pair(Task(name="t", kind="chat"), pair)
    assert shown.conversation is not None
    user, assistant, last = shown.conversation.turns
    arguments = assistant["tool_calls"][0]["function"]["arguments"]
    assert "Anna" not in str(assistant)
    assert arguments["times"] != 41
    assert isinstance(arguments["times"], int)
    assert ("Anna" in user["content"], "Anna" in last["content"], "Anna" in shown.source) == (not sources,) * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"type": "Anna", "role": "Anna"}, {"type": NAME, "role": NAME}),
        ({"Anna": {"Anna": True}}, {NAME: {NAME: True}}),
        # Templates get the parsed arguments.
        ('{"who": "\\u0041nna"}', {"who": NAME}),
        ({"by": -1}, {"by": "#1"}),
    ],
)
@pytest.mark.parametrize("sources", [False, True])
def test_all_parts_of_calls_are_redacted(arguments: Any, expected: Any, sources: bool) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = ({"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "user", "content": "x"})
    redactor = Redactor(rules(words=["Anna", "function", "-"], sources=sources), KEY)
    shown = redactor.redact_pair(Task(name="t", kind="chat"), Pair("x", "y", conversation=Conversation(turns)))
    assert shown.conversation is not None
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "f", "arguments": expected}}],
    }
    assert shown.conversation.turns[0] == turn


def test_a_redacted_number_stays_finite() -> None:
    call = {"function": {"name": "f", "arguments": {"by": 1e300}}}
    turns = ({"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "user", "content": "x"})
    for key in range(20):
        redactor = Redactor(rules(builtin=["numbers"]), bytes([key]) * 32)
        shown = redactor.redact_pair(Task(name="t", kind="chat"), Pair("x", "y", conversation=Conversation(turns)))
        assert shown.conversation is not None
        assert "1e+300" not in str(shown.conversation.turns[0])
        json.dumps(shown.conversation.turns, allow_nan=False)


def test_escapes_in_an_example_of_json_hide_nothing() -> None:
    schema = {"type": "object", "properties": {"who": {"type": "string"}}}
    example = {"source": "a", "target": '{"who": "\\u0041nna"}'}
    task = Task(name="t", kind="extract", answer_schema=schema, examples=(example,))
    prompt = Redactor(rules(words=["Anna"]), KEY).redact_task(task).prompt("b", TOKENIZERS["gpt2"]).text
    assert "Anna" not in prompt
    assert NAME in prompt


def test_an_answer_that_the_template_has_beside_it_is_refused() -> None:
    target = MarkedText("<think>\n</think>\nthink</s>")
    with pytest.raises(InvalidData, match="cannot be redacted"):
        with_surrogates(target, "think", Pair("a", "vorpi"))
    assert with_surrogates(target, "think", Pair("a", "think")) == target


def test_surrogates_of_east_asian_names_tell_nothing_of_their_radicals_and_initials() -> None:
    surrogates = [SurrogateMap(bytes([key]) * 32, None, NO_TERMS)["田철"] for key in range(40)]
    for at, (first, last) in enumerate([(0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]):
        codes = [ord(surrogate[at]) for surrogate in surrogates]
        assert all(first <= code <= last for code in codes)
        assert len({code // 64 for code in codes}) > 15


def test_vowel_signs_are_replaced() -> None:
    signs = "ेोि\u0e34\u0e38\u064e"
    surrogates = [SurrogateMap(bytes([key]) * 32, None, NO_TERMS)[f"न{signs}"] for key in range(20)]
    assert all(len({each[at] for each in surrogates}) > 3 for at in range(1, len(signs) + 1))


def test_a_task_shows_redacted_examples() -> None:
    task = Task(name="t", instruction="Ask Anna.", examples=({"source": "Anna?", "target": "Anna!"},))
    redacted = Redactor(rules(words=["Anna"]), KEY).redact_task(task)
    assert redacted.examples[0].source == "Anna?"
    assert "Anna" not in redacted.examples[0].target
    with pytest.raises(InvalidData, match=r"Ask Anna.*sources = false"):
        Redactor(rules(words=["Anna"], sources=True), KEY).redact_task(task)
    schema = {"type": "object", "properties": {"who": {"enum": ["Anna"]}}}
    extract = Task(
        name="t", kind="extract", answer_schema=schema, examples=({"source": "a", "target": '{"who": "Anna"}'},)
    )
    with pytest.raises(InvalidData, match="Example 1 of the task t is no answer once it is redacted"):
        Redactor(rules(words=["Anna"]), KEY).redact_task(extract)


def test_a_report_counts_what_is_replaced() -> None:
    pairs = [Pair("Anna", "Anna has 12"), Pair("x", "y")]
    report = report_redaction(rules(words=["Anna"], builtin=["numbers"]), pairs)
    assert (report.spans, report.pairs, report.share) == ({"word": 1, "number": 1}, 1, 6 / 12)
    assert {example.text for example in report.examples} == {"Anna", "12"}
    both = report_redaction(rules(words=["Anna"], sources=True), pairs)
    assert both.spans == {"word": 2}
    assert (report.left_in_sources, both.left_in_sources) == (1, 0)


def test_spans_that_stay_in_sources_are_said() -> None:
    turns = ({"role": "user", "content": "Anna, Anna"}, {"role": "assistant", "content": "Anna"})
    pairs = [Pair("Anna", "12"), Pair("Otto", "Anna"), Pair("", "", conversation=Conversation(turns))]
    redactor = Redactor(rules(words=["Anna"]), KEY)
    for pair in pairs:
        redactor.redact_pair(Task(name="t"), pair)
    assert redactor.left_in_sources == 3
    assert "3 such texts stand in sources" in redactor.summary
    redactor = Redactor(rules(words=["Anna"], sources=True), KEY)
    redactor.redact_pair(Task(name="t"), pairs[0])
    assert "sources" not in redactor.summary


LINES = st.lists(st.text("abehlmnoskiäß東 .", min_size=1, max_size=6), min_size=1, max_size=6).map("".join)


def beginning(tokenizer: PlmTokenizer, text: str, token_ids: list[int]) -> str:
    """The characters of a text that its first tokens complete, by the bytes that the tokenizer's own pieces have."""
    size = sum(len(tokenizer.token_bytes[token_id] or b"") for token_id in token_ids)
    return text.encode()[:size].decode(errors="ignore")


@pytest.mark.parametrize("kind", [*LOSSLESS, *PREFIXED])
@given(text=LINES, pattern=st.sampled_from(["[a-h]+", "hello|the|ab+", "[ä東]", "[^ ]+"]))
def test_contexts_of_a_redacted_target_end_where_the_true_ones_do(kind: str, text: str, pattern: str) -> None:
    tokenizer = TOKENIZERS[kind]
    redaction = rules(patterns=[{"kind": "x", "regex": pattern}])
    true_text = f" {text}\n"
    shown_text = f" {Redactor(redaction, KEY, tokenizer).redact(text)}\n"
    true_ids, ids = tokenizer.encode_continuation(true_text), tokenizer.encode_continuation(shown_text)
    assume([tokenizer.decode_continuation(each) for each in (true_ids, ids)] == [true_text, shown_text])
    target = SurrogateTarget.align(ids, true_ids, tokenizer)
    assert target.token_ids == ids
    places = [context.draft_index for context in target.contexts]
    assert len(places) == len(true_ids)
    assert places == sorted(places)
    covered = {at + 1 for span in redaction.spans(text) for at in range(span.start, span.end)}
    ends = {len(beginning(tokenizer, shown_text, ids[:at])) for at in range(len(ids))}
    for i, (k, matches, is_reliable) in enumerate(target.contexts):
        assert 0 <= k < len(ids)
        true_end, end = (
            len(beginning(tokenizer, true_text, true_ids[:i])),
            len(beginning(tokenizer, shown_text, ids[:k])),
        )
        assert end <= true_end
        assert end == true_end or true_end not in ends
        assert not matches or (end == true_end and ((i == k == 0) or true_ids[i - 1] == ids[k - 1]))
        assert matches or not is_reliable
    if not covered:
        assert target.contexts == [(i, True, True) for i in range(len(true_ids))]


def test_the_rest_of_a_span_and_the_token_behind_it_are_not_reliable() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    true_ids, ids = (tokenizer.encode_continuation(f" x {name} z.\n") for name in ("pqr", "qrp"))
    texts = [tokenizer.name(token) for token in true_ids]
    assert texts == [" ", "x", " ", "p", "q", "r", " ", "z", ".", "\n"]
    contexts = SurrogateTarget.align(ids, true_ids, tokenizer).contexts
    assert [context.draft_index for context in contexts] == list(range(10))
    assert [context.reliable for context in contexts] == [True] * 4 + [False] * 3 + [True] * 3
