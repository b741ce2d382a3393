from data_owner_client.data import Pair
from data_owner_client.nearest import NearestPairs

PAIRS = [
    Pair("Turn the light on", "Mach das Licht an"),
    Pair("Turn the lights off", "Mach die Lichter aus"),
    Pair("The password is wrong", "Das Passwort ist falsch"),
    Pair("Wrong password", "Falsches Passwort"),
    Pair("Close", "Schließen"),
]


def sources(nearest: NearestPairs, text: str) -> list[str]:
    (examples,) = nearest.examples([text])
    return [shot.source for shot in examples]


def test_the_likest_source_comes_last() -> None:
    nearest = NearestPairs(PAIRS, 2)
    assert sources(nearest, "Turn all lights off") == ["Turn the light on", "Turn the lights off"]
    assert set(sources(nearest, "Your password is wrong")) == {"Wrong password", "The password is wrong"}


def test_a_text_never_finds_itself() -> None:
    nearest = NearestPairs(PAIRS, 4)
    for pair in PAIRS:
        found = sources(nearest, pair.source)
        assert pair.source not in found
        assert len(found) == 4


def test_there_may_be_fewer_pairs_than_wanted() -> None:
    assert sources(NearestPairs(PAIRS[:1], 5), "Turn it on") == ["Turn the light on"]
    assert sources(NearestPairs(PAIRS[:1], 5), "Turn the light on") == []


def test_many_texts_at_once_find_what_each_finds_alone() -> None:
    nearest = NearestPairs(PAIRS, 3)
    texts = [f"{pair.source} {number}" for number in range(60) for pair in PAIRS]
    assert nearest.examples(texts) == [nearest.examples([text])[0] for text in texts]
