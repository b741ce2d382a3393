"""The gateway's command with real parties: what it serves, an owner that goes and comes back, hostile clients."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from data_owner_client import generate, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.gateways import RunningGateway, running_gateway
from harness.processes import stop_server
from harness.tiny_models import TinyModels
from tests import support
from tests.adapters import random_adapter
from tests.processes.parties import Owner, owner_that_can_be_killed, start_server, wait_until_ready

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
TASK = Task(name="t", source_label="In", target_label="Out")
SOURCE, PROMPT = "the thin reden", "die Tür"
LONG = 100
_SECONDS = 120


class Command:
    """A running `pema-client gateway`.

    Args:
        running: its address, process and log.
    """

    def __init__(self, running: RunningGateway) -> None:
        self.url, self.process, self._log = running

    @property
    def output(self) -> str:
        """All that it has written so far."""
        return self._log.read_text(encoding="utf-8")

    def client(self, **settings: Any) -> OpenAI:
        """A client without retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=_SECONDS, **({"max_retries": 0} | settings))

    def answer(self) -> str | None:
        """The adapted model's answer to the source."""
        with self.client() as client:
            answer = client.chat.completions.create(model="formal", messages=[{"role": "user", "content": SOURCE}])
        return answer.choices[0].message.content


@dataclass(frozen=True)
class Setting:
    """An owner that can be killed, an adapter, and the texts of the commands.

    Attributes:
        owner: the owner's server.
        adapter: folder of the adapter.
        answer: the adapted model's answer to the source.
        continuation: the PLM's continuation of the prompt.
    """

    owner: Owner
    adapter: Path
    answer: str
    continuation: str


@pytest.fixture(scope="module")
def setting(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("gateway")
    plm = RemotePlm(InProcessConnection(support.make_service(tiny_models["llama"])), dtype="float32", cache=None)
    adapter = random_adapter(plm, task=TASK, interpolation=Interpolation(schedule="constant", lambda_max=0.5))
    adapter.save(folder / "adapter")
    (answer,) = translate(plm, [SOURCE], adapter=adapter).texts
    (continuation,) = generate(plm, [PROMPT], decoding=DecodingSettings(max_new_tokens=LONG)).texts
    flags = ("--model", str(tiny_models["llama"]), "--dtype", "float32", "--device", "cpu")
    with owner_that_can_be_killed(folder / "owner.log", *flags) as owner:
        yield Setting(owner, folder / "adapter", answer, continuation)


@contextmanager
def running(setting: Setting, folder: Path, *flags: str) -> Iterator[Command]:
    """The command, once it serves."""
    with running_gateway(
        folder / "gateway.log",
        setting.owner.url("http"),
        {"formal": setting.adapter},
        *("--dtype", "float32", *flags),
        environment={"XDG_CACHE_HOME": str(folder)},
    ) as gateway:
        yield Command(gateway)


def test_it_names_its_models_and_ends_clean(setting: Setting, tmp_path: Path) -> None:
    with running(setting, tmp_path) as gateway:
        with gateway.client() as client:
            names = [model.id for model in client.models.list()]
        assert names[0] == "formal"
        assert f"Models: formal, {names[1]} (the PLM alone)." in gateway.output
        assert gateway.answer() == setting.answer
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(_SECONDS) == 0
        assert "Traceback" not in gateway.output
        for secret in (SOURCE, PROMPT, setting.answer):
            assert secret not in gateway.output


def test_an_owner_may_vanish_and_come_back(setting: Setting, tmp_path: Path) -> None:
    with running(setting, tmp_path) as gateway:
        assert gateway.answer() == setting.answer
        setting.owner.kill()
        with pytest.raises(openai.InternalServerError) as caught:
            gateway.answer()
        assert caught.value.status_code == 503
        assert caught.value.code == "upstream_unavailable"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        setting.owner.start()
        assert gateway.answer() == setting.answer
        assert gateway.process.poll() is None


def test_a_text_under_way_outlasts_the_owner(setting: Setting, tmp_path: Path) -> None:
    with running(setting, tmp_path) as gateway, gateway.client() as client:
        plm = client.models.list().data[-1].id
        stream = client.completions.create(model=plm, prompt=PROMPT, max_tokens=LONG, stream=True)
        pieces = [next(iter(stream)).choices[0].text]
        setting.owner.restart()
        pieces += [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == setting.continuation


def test_another_model_of_the_owner_gives_no_answer(setting: Setting, tiny_models: TinyModels, tmp_path: Path) -> None:
    with running(setting, tmp_path) as gateway:
        setting.owner.kill()
        log, ports = tmp_path / "other.log", setting.owner.ports
        flags = ("--model", str(tiny_models["gemma2"]), "--dtype", "float32", "--device", "cpu")
        other = start_server(log, ports.rest, ports.grpc, *flags)
        try:
            wait_until_ready(other, setting.owner.url("http"), log)
            with pytest.raises(openai.InternalServerError) as caught:
                gateway.answer()
        finally:
            stop_server(other, log)
            setting.owner.start()
        assert caught.value.status_code == 503
        assert caught.value.code == "model_mismatch"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert gateway.answer() == setting.answer


_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nContent-Type: application/json\r\n"
MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET\r\n\r\n",
    b"\x00" * 2000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # names no host
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    _HEAD + b"Content-Length: minus\r\n\r\n{}",
    _HEAD + b"Content-Length: 2\r\n\r\n{]",
    _HEAD + b"Content-Length: 99999999999\r\n\r\n{}",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    _HEAD + b"Content-Length: 4\r\n\r\n\xff\xfe{}",
    _HEAD.replace(b"/v1/chat", b"/v1/%00\xff") + b"Content-Length: 2\r\n\r\n{}",
    _HEAD.replace(b"HTTP/1.1", b"HTTP/9.9") + b"Content-Length: 2\r\n\r\n{}",
]


def test_malformed_requests_are_answered_and_change_nothing(setting: Setting, tmp_path: Path) -> None:
    with running(setting, tmp_path) as gateway:
        address = httpx.URL(gateway.url)
        for number, request in enumerate(MALFORMED):
            with socket.create_connection(("127.0.0.1", address.port or 0), timeout=_SECONDS) as connection:
                answer = _answer(connection, request.replace(b"PORT", str(address.port).encode()))
            status = answer.split(b" ", 2)[1] if answer else b"closed"
            assert status in {b"400", b"404", b"413", b"421", b"431", b"505", b"closed"}, (number, answer)
        assert gateway.answer() == setting.answer
        assert "Traceback" not in gateway.output


def _answer(connection: socket.socket, request: bytes) -> bytes:
    """All that the other side sends before it closes, which it may do before it has read the whole request."""
    parts = list[bytes]()
    try:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            parts.append(part)
    except OSError as error:
        if error.errno not in {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}:
            raise
    return b"".join(parts)


def test_hung_clients_keep_nobody_waiting(setting: Setting, tmp_path: Path) -> None:
    """Clients that send half a request, or read nothing of a stream, delay neither others nor the end."""
    with running(setting, tmp_path) as gateway, ExitStack() as hung:
        port = httpx.URL(gateway.url).port or 0
        head = _HEAD.replace(b"PORT", str(port).encode())
        body = b'{"model": "formal", "stream": true, "messages": [{"role": "user", "content": "the"}]}'
        whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        for sent in [b"", head[:40], head + b"Content-Length: 50\r\n\r\n{", whole] * 10:
            connection = hung.enter_context(socket.create_connection(("127.0.0.1", port), timeout=_SECONDS))
            connection.sendall(sent)
        answers = list[str | None]()
        asking = [threading.Thread(target=lambda: answers.append(gateway.answer())) for _ in range(8)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert answers == [setting.answer] * len(asking)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(_SECONDS) == 0
        assert "Traceback" not in gateway.output


def test_a_busy_owner_is_handed_on(setting: Setting, tmp_path: Path) -> None:
    """More answers than may wait are refused with a time, and all others are right."""
    with running(setting, tmp_path, "--max-waiting", "1", "--batch-size", "1") as gateway:
        answers, refusals = list[str | None](), list[openai.RateLimitError]()

        def ask() -> None:
            try:
                answers.append(gateway.answer())
            except openai.RateLimitError as error:
                refusals.append(error)

        asking = [threading.Thread(target=ask) for _ in range(16)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert answers
        assert set(answers) == {setting.answer}
        assert len(answers) + len(refusals) == len(asking)
        assert all(int(error.response.headers["retry-after"]) >= 1 for error in refusals)
        with closing(gateway.client(max_retries=20)) as client:
            messages: list[Any] = [{"role": "user", "content": SOURCE}]
            answer = client.chat.completions.create(model="formal", messages=messages)
        assert answer.choices[0].message.content == setting.answer
