"""Prompts, targets and stops, against transformers' own tokenizer and chat template."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from data_owner_client.data.pairs import Pair
from data_owner_client.data.stops import Stops
from data_owner_client.data.tasks import Task, builtin_tasks, load_task
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from harness.tiny_models import EOS, VOCAB_SIZE, TinyModels
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer, load_tokenizer
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData, ProtocolViolation, Unsupported
from protocol.messages import TokenizerBundle

TASK = Task(
    name="t",
    instruction="Do it.",
    source_label="In",
    target_label="Out",
    examples=({"source": "a", "target": "b"}, {"source": "c", "target": "d"}),
)


@pytest.fixture
def tokenizer(tiny_service: PlmService) -> PlmTokenizer:
    return RemotePlm(InProcessConnection(tiny_service), cache=None).tokenizer


def test_builtin_tasks_load() -> None:
    assert {"contemporary-english", "translate-en-de"} < {*builtin_tasks()}
    for name in builtin_tasks():
        task = load_task(name)
        assert task.name == name
        assert task.examples or task.format == "chat"
        assert task.stop_text == ("\n" if task.format == "plain" else None)


def test_a_third_task_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nsource_label = "Q"\ntarget_label = "A"\n[[examples]]\nsource = "1"\ntarget = "2"\n')
    assert load_task(path).examples[0].target == "2"


@pytest.mark.parametrize(
    ("text", "message"),
    [("name = ", "is not TOML"), ('name = "x"\ntypo = 1', "typo"), ('format = "plain"', "name"), ("name = 3", "name")],
)
def test_a_bad_task_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InvalidData, match=message):
        load_task(path)
    with pytest.raises(InvalidData, match="contemporary-english"):
        load_task("no-such-task")


@pytest.mark.parametrize(
    ("head", "source", "target", "message"),
    [
        ("", "a", "b\\nc", r"example 2: The target contains the stop '\\n'"),
        ('stop = "###"', "a", "b ## c #", "example 2: The target contains"),
        ('stop = "###"\nformat = "chat"', "a", "b### c", "example 2: The target contains"),
        ("", "", "b", "example 2 has an empty text"),
        ('format = "chat"', "a", " \\n", "example 2 has an empty text"),
    ],
)
def test_examples_of_a_task_file_are_checked(tmp_path: Path, head: str, source: str, target: str, message: str) -> None:
    """In files alone: adapters that learned with such examples still load."""
    path = tmp_path / "mine.toml"
    examples = f'[[examples]]\nsource = "1"\ntarget = "2"\n[[examples]]\nsource = "{source}"\ntarget = "{target}"\n'
    path.write_text(f'name = "mine"\n{head}\n{examples}')
    with pytest.raises(InvalidData, match=f"mine.toml: {message}"):
        load_task(path)
    assert Task.model_validate(tomllib.loads(path.read_text())).examples[1].target == target.replace("\\n", "\n")


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "\ud800"},
        {"examples": [{"source": "\ud800", "target": "x"}]},
        {"stop": "\udce9"},
        {"format": "chat", "tools": [{"name": "\ud800"}]},
        {"format": "chat", "template_arguments": {"a": {"\ud800": 1}}},
    ],
)
def test_half_a_surrogate_pair_is_named_by_its_field(fields: dict[str, object]) -> None:
    *_, name = fields
    with pytest.raises(ValidationError, match=f"{name} has half of a surrogate pair"):
        Task.model_validate({"name": "t", **fields})


def test_plain_prompt(tokenizer: PlmTokenizer) -> None:
    expected = "Do it.\n\nIn: a\nOut: b\nIn: c\nOut: d\nIn: the source\nOut:"
    assert TASK.prompt("the source", tokenizer).text == expected
    prompt, target = TASK.prompt_and_target(Pair("the source", "ja"), tokenizer)
    assert (prompt.text, target.text) == (expected, " ja\n")


@pytest.mark.parametrize("source", ["the thin shine", "Grüße {name}", " odd  spaces "])
def test_prompt_and_target_tokenise_as_one_text_does(
    tiny_service: PlmService, tiny_models: TinyModels, tokenizer: PlmTokenizer, source: str
) -> None:
    owners = AutoTokenizer.from_pretrained(tiny_models["llama"])
    prompt = TASK.prompt(source, tokenizer)
    prompt_ids = tokenizer.encode_prompt(prompt)
    assert prompt_ids == owners(prompt.text).input_ids
    target_ids = tokenizer.encode_target(
        prompt, prompt_ids, TASK.prompt_and_target(Pair(source, "die Tür"), tokenizer)[1]
    )
    assert prompt_ids + target_ids == owners(prompt.text + " die Tür\n").input_ids
    assert TASK.stops(tokenizer, [EOS]) == Stops(("\n",), frozenset({EOS}))


def test_a_token_across_the_boundary_falls_back_to_the_target_alone(tokenizer: PlmTokenizer) -> None:
    # "e" + "n" merge into one token, which no generation after "e" can produce.
    from data_owner_client.plm.tokenizer import MarkedText, Prompt

    prompt = Prompt("e")
    prompt_ids = tokenizer.encode_prompt(prompt)
    target_ids = tokenizer.encode_target(prompt, prompt_ids, MarkedText("nd\n"))
    assert tokenizer.decode(prompt_ids + target_ids) == "end\n"
    assert tokenizer.encode_prompt(Prompt("end\n")) != prompt_ids + target_ids


def test_chat_prompt_is_transformers_own(tiny_models: TinyModels, tokenizer: PlmTokenizer) -> None:
    owners = AutoTokenizer.from_pretrained(tiny_models["llama"])
    chat = TASK.model_copy(update={"format": "chat"})
    messages = [
        {"role": "user", "content": "Do it.\n\na"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "the source"},
    ]
    expected = owners.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = chat.prompt("the source", tokenizer)
    assert prompt.text == expected
    assert tokenizer.encode_prompt(prompt) == owners(expected, add_special_tokens=False).input_ids
    assert chat.stops(tokenizer, []) == Stops((), frozenset({EOS}))


def test_missing_parts_are_explained(tiny_models: TinyModels) -> None:
    plain = PlmTokenizer(bundle_tokenizer(load_tokenizer(tiny_models["opt"])))
    with pytest.raises(Unsupported, match="chat template"):
        TASK.model_copy(update={"format": "chat"}).prompt("x", plain)
    with pytest.raises(ProtocolViolation, match="cannot be read"):
        PlmTokenizer(TokenizerBundle(tokenizer_json="{}", chat_template=None, special_tokens={}))


def test_a_stop_in_the_space_before_the_target_is_refused(tokenizer: PlmTokenizer) -> None:
    for stop in (" ", " b"):
        with pytest.raises(InvalidData, match="contains the stop"):
            Task(name="t", stop=stop).prompt_and_target(Pair("a", "b"), tokenizer)
    assert Task(name="t", stop=" c").prompt_and_target(Pair("a", "b"), tokenizer)[1].text == " b c"


def test_every_token_with_a_newline_stops(tokenizer: PlmTokenizer) -> None:
    ids = tokenizer.ids_containing("\n")
    assert ids
    assert all("\n" in tokenizer.decode([i]) for i in ids)
    others = set(range(3, VOCAB_SIZE)) - ids
    assert not any("\n" in tokenizer.decode([i]) for i in others)


def test_tokens_that_contain_a_text_are_found_among_all(tiny_models: TinyModels, tokenizer: PlmTokenizer) -> None:
    owners = AutoTokenizer.from_pretrained(tiny_models["llama"])
    texts = ["" if i in owners.all_special_ids else owners.decode([i]) for i in range(len(owners))]
    for text in sorted({text for text in texts if text}):
        assert tokenizer.ids_containing(text) == {i for i, own in enumerate(texts) if text in own}, text
