"""Nothing that was redacted is in a byte that a client sends, from `build-memory` to the choices of `train`.

All bytes that go to the owner are recorded on their way, over both transports, and searched for planted secrets: as
text, and as sequences of token ids in every form in which ids travel. The requests that the server reads are decoded
and searched, too. The same search finds the secrets where the targets are shared.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from data_owner_client import (
    Pair,
    Redaction,
    RedactionRules,
    TrainedAdapter,
    TrainingReport,
    TrainingSettings,
    build_memories,
    train,
)
from data_owner_client.data.tasks import Task
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from harness.tcp_proxy import recording_proxy
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.tenants.store import TenantStore
from tests import guard
from tests.command_line import client, client_json
from tests.support import serve, serve_over_grpc

encrypted = pytest.mark.unguarded("what is encrypted cannot be searched")

NAMES = ["Van Quist", "Ottilie", "Zacharias"]
PLACES = ["Velbert", "Ytterby"]
NUMBERS = ["739.155", "48213"]
SECRETS = [*NAMES, *PLACES, *NUMBERS]
# Short, as half of the tiny model's positions must hold a prompt with an example.
TASK = Task(
    name="t", source_label="I", target_label="O", examples=({"source": "is Ottilie", "target": "die 48213 Ottilie"},)
)
PAIRS = [
    Pair(f"{'xyz'[i % 3]} {[*NAMES, *PLACES][i % 5]} {'abcdefgh'[i // 3]}", f"die {SECRETS[i % 7]} {'an' * (i % 4)}")
    for i in range(24)
]
RULES = RedactionRules(
    builtin=("numbers",),
    words=("Van Quist", "Ottilie", "Zacharias"),
    patterns=({"kind": "place", "regex": "Velbert|Ytterby"},),
    sources=True,
)
SETTINGS = TrainingSettings(
    rank=4, epochs=1, batch_rows=16, search=False, minutes=30, retrieved_examples=1, selection_texts=8
)
CALLS = ("encode", "decode", "distribution", "lm_head")


@dataclass
class Owner:
    """A server that a client reaches through a proxy, all that the client sent, and the requests that were read."""

    plm: RemotePlm
    sent: bytearray
    requests: list[tuple[str, Any]] = field(default_factory=list)

    def sequences(self) -> Iterator[list[int]]:
        """The token ids of each text that was sent."""
        for call, request in self.requests:
            if call in ("encode", "decode"):
                yield from map(list, request.token_ids)
            elif call == "distribution":
                assert request.text is None
                yield list(request.token_ids)


@contextmanager
def owner(transport: str, policy: str, service: PlmService, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Owner]:
    requests = list[tuple[str, Any]]()

    def recorded(name: str) -> Any:
        call = getattr(PlmService, name)

        @functools.wraps(call)
        def read(self: PlmService, request: Any, *rest: Any) -> Any:
            requests.append((name, request))
            return call(self, request, *rest)

        return read

    for name in CALLS:
        patch.setattr(PlmService, name, recorded(name))
    store = TenantStore(f"sqlite:///{folder}/owner.db")
    key = str(store.add("acme", disclosure=Disclosure(policy)))  # type: ignore[arg-type]
    serving, scheme = (serve, "http") if transport == "REST" else (serve_over_grpc, "grpc")
    with ExitStack() as stack:
        url = stack.enter_context(serving(service, access=TenantKeyAuthenticator(store)))
        port, sent = stack.enter_context(recording_proxy("127.0.0.1", int(url.rpartition(":")[2])))
        connection = stack.enter_context(
            closing(guard.connection(f"{scheme}://127.0.0.1:{port}", api_key=key, retry_for=0.1))
        )
        plm = stack.enter_context(RemotePlm(connection, dtype="float32", cache=folder / "cache"))
        yield Owner(plm, sent, requests)


def spellings(secret: str, tokenizer: PlmTokenizer) -> list[list[int]]:
    """The token ids of a secret behind other text, with and without a space before it."""
    found = [tokenizer.encode_continuation(f"{space}{secret}") for space in (" ", "")]
    for ids in found:
        assert len(ids) > 2
        assert ids != sorted(ids)  # so that no set of ids is the secret
    return found


def forms(ids: Sequence[int]) -> Iterator[bytes]:
    """Token ids in the forms in which they may travel."""
    for size in (2, 4, 8):
        yield b"".join(i.to_bytes(size, "little") for i in ids)
    yield b"".join(varint(i) for i in ids)
    for separators in ((", ", ": "), (",", ":")):
        yield json.dumps(list(ids), separators=separators)[1:-1].encode()


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    parts = [number & 0x7F]
    while number := number >> 7:
        parts[-1] |= 0x80
        parts.append(number & 0x7F)
    return bytes(parts)


def found_in_bytes(owner: Owner) -> set[str]:
    """The secrets in the bytes that were sent."""
    data = bytes(owner.sent)
    lower = data.lower()
    found = set[str]()
    for secret in SECRETS:
        written = secret.encode().lower() in lower
        as_ids = any(form in data for ids in spellings(secret, owner.plm.tokenizer) for form in forms(ids))
        if written or as_ids:
            found.add(secret)
    return found


def found_in_texts(owner: Owner) -> set[str]:
    """The secrets in the texts that the server has read, token by token."""
    texts = [owner.plm.tokenizer.decode(ids).lower() for ids in owner.sequences()]
    return {secret for secret in SECRETS for text in texts if secret.lower() in text}


def build_and_train(
    owner: Owner, folder: Path, *, settings: TrainingSettings = SETTINGS, **options: Any
) -> tuple[TrainedAdapter, TrainingReport]:
    build_memories(owner.plm, TASK, PAIRS[:18], folder / "memory", validation=PAIRS[18:], **options)
    return train(owner.plm, folder / "memory", folder / "adapter", settings=settings)


@encrypted
@pytest.mark.parametrize(("transport", "policy"), [("REST", "candidate"), ("gRPC", "candidate"), ("gRPC", "none")])
def test_no_redacted_span_is_sent(
    tiny_service: PlmService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, policy: str
) -> None:
    with owner(transport, policy, tiny_service, tmp_path, monkeypatch) as redacted:
        adapter, report = build_and_train(redacted, tmp_path, redaction=Redaction.from_rules(RULES))
        assert found_in_bytes(redacted) == set()
        assert found_in_texts(redacted) == set()
        key = (tmp_path / "memory" / "redaction.key").read_bytes()
        assert key not in redacted.sent
        # That there was something to search: each call, the rest of the targets, and examples in prompts.
        calls = {call for call, _ in redacted.requests}
        assert calls == {"encode", "decode", *(["distribution"] if policy == "none" else ["lm_head"])}
        texts = [redacted.plm.tokenizer.decode(ids) for ids in redacted.sequences()]
        assert sum(text.count("\nO: die ") == 2 for text in texts) >= len(PAIRS)
        example = texts[0].partition("\nI: ")[0]
        assert any(text.count("\nO: die ") == 2 and example not in text for text in texts)
        # No text was decoded.
        assert all(policy.scores is None for policy in report.options)
        assert adapter.card.context_mode == "redacted"
        assert adapter.card.nearest == 1
        shown = [f"{pair.source} {pair.target}" for pair in adapter.pairs]
        assert not any(secret in text for text in shown for secret in SECRETS)
        assert report.exchange is not None
        assert (report.exchange.context_mode, report.exchange.pairs) == ("redacted", len(PAIRS))
        # The adapter has learned the tokens of the secrets.
        candidates = set(adapter.candidate_ids_C.tolist())
        assert all(candidates.issuperset(spellings(secret, redacted.plm.tokenizer)[0]) for secret in NAMES)


@encrypted
@pytest.mark.parametrize("transport", ["REST", "gRPC"])
def test_the_search_finds_what_is_shared(
    tiny_service: PlmService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    with owner(transport, "candidate", tiny_service, tmp_path, monkeypatch) as shared:
        settings = replace(SETTINGS, selection_texts=0)
        build_and_train(shared, tmp_path, settings=settings, context_mode="teacher-forced", share_targets=True)
        assert found_in_bytes(shared) == {*SECRETS}
        assert found_in_texts(shared) == {*SECRETS}


@encrypted
def test_sources_are_shown_unless_the_rules_say_otherwise(
    tiny_service: PlmService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets_only = Redaction.from_rules(RULES.model_copy(update={"sources": False}))
    with owner("REST", "candidate", tiny_service, tmp_path, monkeypatch) as redacted:
        build_and_train(redacted, tmp_path, redaction=targets_only)
        # Numbers are in targets alone.
        assert found_in_texts(redacted) == {*NAMES, *PLACES}
        assert found_in_bytes(redacted) == {*NAMES, *PLACES}


def test_the_command_line_builds_trains_and_says_what_leaves(tiny_server: str, tmp_path: Path) -> None:
    pairs, task, memory = tmp_path / "pairs.jsonl", tmp_path / "task.toml", tmp_path / "memory"
    pairs.write_text("".join(json.dumps({"source": each.source, "target": each.target}) + "\n" for each in PAIRS))
    task.write_text('name = "t"\nsource_label = "I"\ntarget_label = "O"\n')
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    rules = tmp_path / "rules.toml"
    rules.write_text('builtin = ["numbers"]\nword_files = ["names.txt"]\n')
    arguments = ["--task", task, "--memory", memory, "--input", pairs, "--share-redacted", rules]
    done = client(tiny_server, "build-memory", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert "with surrogates in place of what the rules find (--share-redacted); the sources have none" in done.stderr
    assert "`translate` will show its texts as they are" in done.stderr
    counts = {"word": sum(i % 7 < 3 for i in range(24)), "number": sum(i % 7 > 4 for i in range(24))}
    assert f"Replaced by surrogates: {counts['word']} word, {counts['number']} number." in done.stderr
    report = json.loads(done.stdout)
    assert (report["context_mode"], report["replaced"]) == ("redacted", counts)
    trained = client_json(
        tiny_server,
        "train",
        "--memory",
        memory,
        "--adapter",
        tmp_path / "a",
        "--minutes",
        0,
        "--rank",
        4,
        "--epochs",
        1,
    )
    assert trained["card"]["context_mode"] == "redacted"
    assert all(policy["scores"] is None for policy in trained["options"])
    assert trained["exchange"]["target_bytes"] == sum(len((pair.target or "").strip()) for pair in PAIRS)

    both = client(tiny_server, "build-memory", *arguments, "--share-targets")
    assert both.returncode == 1
    assert "Say one of them" in both.stderr
    wrong = client(tiny_server, "build-memory", *arguments, "--context", "private", "--overwrite")
    assert wrong.returncode == 1
    assert "Redacted contexts need rules" in wrong.stderr


@pytest.mark.parametrize("with_server", [False, True])
def test_a_data_check_shows_what_would_be_replaced(tiny_server: str, tmp_path: Path, with_server: bool) -> None:
    pairs, rules = tmp_path / "pairs.jsonl", tmp_path / "rules.toml"
    pairs.write_text("".join(json.dumps({"source": each.source, "target": each.target}) + "\n" for each in PAIRS))
    rules.write_text(f'sources = true\nwords = {json.dumps(NAMES)}\n[[patterns]]\nkind = "place"\nregex = "Ytterby"\n')
    url = tiny_server if with_server else None
    report = client_json(url, "data check", pairs, "--share-redacted", rules)
    texts = [text for pair in PAIRS for text in (pair.source, pair.target or "")]
    names = sum(text.count(name) for text in texts for name in NAMES)
    assert report["redaction"]["spans"] == {"word": names, "place": sum(text.count("Ytterby") for text in texts)}
    shown = {each["text"]: each["surrogate"] for each in report["redaction"]["examples"]}
    assert set(shown) == {*NAMES, "Ytterby"}
    assert all(len(text) == len(surrogate) and text != surrogate for text, surrogate in shown.items())
    if with_server:
        assert report["cost"]["context"] == "redacted"
    done = client(url, "data check", pairs, "--share-redacted", rules)
    assert f"Surrogates replace {names} word" in done.stdout
    assert "Ottilie" in done.stdout
