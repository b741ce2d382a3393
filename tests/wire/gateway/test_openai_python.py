"""openai-python on an adapted model: whole answers, streams, log-probabilities, draws and companies."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion

from data_owner_client import DecodingSettings, Generation, SamplingSettings, TrainedAdapter, generate, translate
from data_owner_client.plm.remote_plm import RemotePlm
from tests.served_adapters import INTERPOLATIONS, PAIRS, TASK, finish_reason

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
SOURCES = [pair.source for pair in PAIRS[:16]]
EXPLAINED = {"pema": {"explain": True}}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def user(text: str) -> list[Any]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def token_ids(pema: Any) -> list[int]:
    """Token ids of an explained choice."""
    return [token["id"] for token in pema["tokens"]]


def test_models_are_listed(client: OpenAI, plm: RemotePlm) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [*INTERPOLATIONS, plm.card.name]
    for model in models:
        assert client.models.retrieve(model.id) == model


def test_a_whole_answer_is_that_of_translate(
    client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter, adapter_name: str
) -> None:
    expected = translate(plm, SOURCES[:1], adapter=adapter)
    answer = client.chat.completions.create(model=adapter_name, messages=user(SOURCES[0]), extra_body=EXPLAINED)
    # The types say that it is one; the client itself does not check answers.
    assert ChatCompletion.model_validate(answer.to_dict()) == answer
    (choice,) = answer.choices
    assert choice.message.content == expected.texts[0]
    assert choice.finish_reason == finish_reason(plm, expected.token_ids[0])
    assert choice.model_extra is not None
    assert token_ids(choice.model_extra["pema"]) == expected.token_ids[0]
    prompt_ids = plm.tokenizer.encode_prompt(TASK.prompt(SOURCES[0], plm.tokenizer))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids[0])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == adapter_name
    assert answer.model_extra is not None
    shown = answer.model_extra["pema"]["shown"]
    assert shown["round_trips"] >= 1
    assert shown["tokens"] >= len(prompt_ids)
    assert min(shown["sent_bytes"], shown["received_bytes"]) > 0


def test_a_stream_has_the_same_text_in_pieces(
    client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter, adapter_name: str
) -> None:
    expected = translate(plm, SOURCES[:1], adapter=adapter)
    chunks = list(
        client.chat.completions.create(
            model=adapter_name,
            messages=user(SOURCES[0]),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXPLAINED,
        )
    )
    *pieces, usage = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.texts[0]
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == finish_reason(plm, expected.token_ids[0])
    assert not pieces[-1].choices[0].delta.content
    extras = [piece.choices[0].model_extra or {} for piece in pieces]
    assert [id_ for extra in extras for id_ in token_ids(extra.get("pema", {"tokens": []}))] == expected.token_ids[0]
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(expected.token_ids[0])


@pytest.mark.parametrize("adapter_name", ["constant"])
def test_the_helper_for_streams_puts_the_answer_together(
    client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter
) -> None:
    with client.chat.completions.stream(model="constant", messages=user(SOURCES[1])) as stream:
        final = stream.get_final_completion()
    assert [final.choices[0].message.content] == translate(plm, SOURCES[1:2], adapter=adapter).texts


def test_answers_are_the_same_beside_fifteen_others(
    url: str, plm: RemotePlm, adapter: TrainedAdapter, adapter_name: str
) -> None:
    """Each source at the same time, every other one as a stream, token for token."""
    expected = translate(plm, SOURCES, adapter=adapter)

    async def all_of_them() -> list[tuple[str, list[int]]]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(
                *(_asked(client, adapter_name, source, streamed=at % 2 == 0) for at, source in enumerate(SOURCES))
            )

    assert asyncio.run(all_of_them()) == list(zip(expected.texts, expected.token_ids, strict=True))


async def _asked(client: AsyncOpenAI, model: str, source: str, *, streamed: bool) -> tuple[str, list[int]]:
    """The text of an answer, and its tokens."""
    if not streamed:
        answer = await client.chat.completions.create(model=model, messages=user(source), extra_body=EXPLAINED)
        (choice,) = answer.choices
        assert choice.model_extra is not None
        return choice.message.content or "", token_ids(choice.model_extra["pema"])
    text, ids = "", list[int]()
    async for chunk in await client.chat.completions.create(
        model=model, messages=user(source), stream=True, extra_body=EXPLAINED
    ):
        (piece,) = chunk.choices
        text += piece.delta.content or ""
        ids += token_ids((piece.model_extra or {}).get("pema", {"tokens": []}))
    return text, ids


def test_log_probabilities_are_those_of_decoding(
    client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter, adapter_name: str
) -> None:
    expected = translate(plm, SOURCES[:1], adapter=adapter).choices[0]
    (choice,) = client.chat.completions.create(
        model=adapter_name, messages=user(SOURCES[0]), logprobs=True, top_logprobs=3
    ).choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert len(entries) >= len(expected) - 1  # perhaps without the stop
    assert [entry.logprob for entry in entries] == pytest.approx(
        [token.logprob for token in expected][: len(entries)], abs=1e-4
    )
    written = b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="replace")
    assert written.strip() == choice.message.content
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert 1 <= len(tops) <= 3
        assert tops == sorted(tops, reverse=True)
        assert entry.token in [top.token for top in entry.top_logprobs]
        assert sum(map(math.exp, tops)) <= 1 + 1e-6


def test_draws_depend_on_the_seed_alone(client: OpenAI) -> None:
    def drawn(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="constant", messages=user(SOURCES[0]), temperature=1.2, top_p=0.9, seed=seed, n=3
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


@pytest.mark.parametrize("adapter_name", ["constant"])
def test_settings_have_their_effect(client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    def asked(**settings: Any) -> tuple[list[str | None], str]:
        answer = client.chat.completions.create(model="constant", messages=user(SOURCES[2]), **settings)
        return sorted((c.message.content for c in answer.choices), key=str), answer.choices[0].finish_reason

    def expected(**options: Any) -> list[str]:
        return sorted(translate(plm, SOURCES[2:3], adapter=adapter, **options).best[0])

    (whole,) = expected()
    stop = whole[1:3]
    assert asked(stop=[stop]) == (expected(stop=[stop]), "stop")
    assert asked(stop=[])[0] == [whole]
    two = DecodingSettings(max_new_tokens=2)
    for bound in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 9, "max_completion_tokens": 2}):
        assert asked(**bound) == (expected(decoding=two), "length")
    draws = SamplingSettings(temperature=0.8, top_p=0.7, seed=11, candidates_only=True)
    drawn = asked(temperature=0.8, top_p=0.7, seed=11, n=4)[0]
    assert drawn == expected(sampling=draws, samples=4, best=4)


def test_bare_prompts_are_continued_in_every_form(
    client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter, adapter_name: str
) -> None:
    prompts = [TASK.prompt(source, plm.tokenizer).text for source in SOURCES[:3]]
    bound = DecodingSettings(max_new_tokens=7)
    expected = generate(plm, prompts, adapter=adapter, decoding=bound).texts
    ids = [
        [int(id_) for id_ in plm.tokenizer.encode_prompt(TASK.prompt(source, plm.tokenizer))] for source in SOURCES[:3]
    ]
    without_start = [each[len(plm.tokenizer.leading_ids) :] for each in ids]
    forms: list[tuple[Any, Sequence[str]]] = [
        (prompts, expected),
        (prompts[0], expected[:1]),
        (ids, expected),
        (ids[0], expected[:1]),
        (without_start, expected),
        (without_start[:1], expected[:1]),
    ]
    for prompt, texts in forms:
        answer = client.completions.create(model=adapter_name, prompt=prompt, max_tokens=7)
        assert [choice.index for choice in answer.choices] == [*range(len(texts))]
        assert [choice.text for choice in answer.choices] == texts
    streamed = client.completions.create(model=adapter_name, prompt=prompts[0], max_tokens=7, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[0]
    echoed = client.completions.create(model=adapter_name, prompt=prompts[0], max_tokens=7, echo=True)
    assert echoed.choices[0].text == prompts[0] + expected[0]


@pytest.mark.parametrize("adapter_name", ["constant"])
def test_an_answer_goes_on_from_a_prefix(client: OpenAI, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    """As the playground does when somebody chooses another token."""
    prefix = translate(plm, SOURCES[1:2], adapter=adapter).token_ids[0][:1]
    expected: Generation = translate(plm, SOURCES[:1], adapter=adapter, prefix=prefix)
    pema = {"prefix": prefix, "explain": True}
    answer = client.chat.completions.create(model="constant", messages=user(SOURCES[0]), extra_body={"pema": pema})
    found = answer.choices[0].message.content or ""
    assert expected.texts[0].endswith(found.strip())
    assert found.strip()


def test_the_plm_alone_is_a_model(client: OpenAI, plm: RemotePlm) -> None:
    prompt = TASK.prompt(SOURCES[0], plm.tokenizer).text
    bound = DecodingSettings(max_new_tokens=9)
    answer = client.completions.create(model=plm.card.name, prompt=prompt, max_tokens=9)
    assert [choice.text for choice in answer.choices] == generate(plm, [prompt], decoding=bound).texts


def test_a_continuation_held_to_choices_is_one_of_them(client: OpenAI) -> None:
    choices = ["shine", "die Tür"]
    fields: dict[str, Any] = {"model": "constant", "prompt": "the thin", "extra_body": {"guided_choice": choices}}
    text = client.completions.create(**fields).choices[0].text
    assert text in choices
    with client.completions.create(**fields, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text
