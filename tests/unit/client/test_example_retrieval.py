import math
import re
from collections import Counter

from data_owner_client.data.example_retrieval import ExampleRetriever
from data_owner_client.data.pairs import Conversation, Pair

PAIRS = [
    Pair("Turn the light on", "Mach das Licht an"),
    Pair("Turn the lights off", "Mach die Lichter aus"),
    Pair("The password is wrong", "Das Passwort ist falsch"),
    Pair("Wrong password", "Falsches Passwort"),
    Pair("Close", "Schließen"),
]


def sources(nearest: ExampleRetriever, text: str) -> list[str]:
    (examples,) = nearest.retrieve([text])
    return [shot.source for shot in examples]


def test_the_likest_source_comes_last() -> None:
    nearest = ExampleRetriever(PAIRS, 2)
    assert sources(nearest, "Turn all lights off") == ["Turn the light on", "Turn the lights off"]
    assert set(sources(nearest, "Your password is wrong")) == {"Wrong password", "The password is wrong"}


def test_a_text_never_finds_itself() -> None:
    nearest = ExampleRetriever(PAIRS, 4)
    for pair in PAIRS:
        found = sources(nearest, pair.source)
        assert pair.source not in found
        assert len(found) == 4


def test_there_may_be_fewer_pairs_than_wanted() -> None:
    assert sources(ExampleRetriever(PAIRS[:1], 5), "Turn it on") == ["Turn the light on"]
    assert sources(ExampleRetriever(PAIRS[:1], 5), "Turn the light on") == []


def test_examples_come_from_single_questions_alone() -> None:
    """An answer that depends on earlier turns or tools tells nothing without them."""
    turns = (
        {"role": "user", "content": "Turn it on"},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "The light"},
    )
    later = Pair("The light", "Done", conversation=Conversation(turns))
    with_tools = Pair("The light", "Done", conversation=Conversation(turns[:1], ({"type": "function"},)))
    calling = Pair("The light", "", reply={"role": "assistant", "content": "", "tool_calls": []})
    first = Pair(
        "Turn it on",
        "What?",
        conversation=Conversation(({"role": "system", "content": "Be kind."}, turns[0])),
    )
    nearest = ExampleRetriever([later, with_tools, calling, first, PAIRS[0]], 5)
    assert set(sources(nearest, "The light")) == {"Be kind.\n\nTurn it on", "Turn the light on"}
    assert sources(ExampleRetriever([later, calling], 5), "The light") == []


def test_many_texts_at_once_find_what_each_finds_alone() -> None:
    nearest = ExampleRetriever(PAIRS, 3)
    texts = [f"{pair.source} {number}" for number in range(60) for pair in PAIRS]
    assert nearest.retrieve(texts) == [nearest.retrieve([text])[0] for text in texts]


def test_the_order_is_that_of_the_formula() -> None:
    """Weights (1 + log tf)·idf of pieces of words, products over the square root of the pair's length."""
    pairs = [*PAIRS, Pair("Turn the light in the kitchen on, and leave every other light as it is", "…")]
    text = "Turn the kitchen light on"
    found = sources(ExampleRetriever(pairs, len(pairs)), text)

    def pieces(text: str) -> Counter[str]:
        words = [f" {word} " for word in re.findall(r"\S+", text.lower())]
        counts = Counter(w[i : i + n] for w in words for n in range(2, 6) for i in range(len(w) - n + 1) if len(w) > n)
        # A word that is no longer than a piece is one piece, and no longer pieces are made of it.
        for word in words:
            counts.update([word] if len(word) <= 5 else [])
        return counts

    counts = [pieces(pair.source) for pair in pairs]
    seen = Counter(piece for count in counts for piece in count)
    idf = {piece: math.log((1 + len(pairs)) / (1 + number)) + 1 for piece, number in seen.items()}

    def weights(count: Counter[str]) -> dict[str, float]:
        return {piece: (1 + math.log(tf)) * idf[piece] for piece, tf in count.items() if piece in idf}

    def likeness(count: Counter[str]) -> float:
        own, query = weights(count), weights(pieces(text))
        length = math.sqrt(sum(weight**2 for weight in own.values()))
        return sum(weight * query.get(piece, 0.0) for piece, weight in own.items()) / math.sqrt(length)

    order = sorted(range(len(pairs)), key=lambda i: likeness(counts[i]))
    assert found == [pairs[i].source for i in order]
    assert found[-1] == pairs[-1].source
