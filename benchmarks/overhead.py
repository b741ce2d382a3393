"""Total cost of keys, quotas, secret bases, metrics and JSON logs, as a share of the throughput of `encode`.

There are two server processes: a plain one without tenants, and a full one whose tenant has all of these. One client
sends equal texts to both in short turns. The order changes from turn to turn, so that other work on the machine slows
both equally. Half of the turns use REST, half gRPC. Then the cost of each part is measured alone.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import ceil, sqrt
from pathlib import Path
from statistics import median

import torch

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.in_flight import InFlightWindow, ordered_map
from data_owner_client.plm.connection.open import open_connection
from harness import report
from harness.processes import server
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.metering import CallCost
from plm_owner_server.service.rotation import Rotation, RotationKey
from plm_owner_server.settings import DEFAULT_MODEL
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore
from protocol.cores import usable_cores
from protocol.integrity import token_crc32s
from protocol.messages import EncodeRequest

_WORK = report.FOLDER / "overhead"
_OPERATIONS = ("--metrics-port", "0", "--log-format", "json")
_GENEROUS = Quotas(10**12, 10**12, 1000, 10**6, 10**6)
_SEQUENCES, _TOKENS = 8, 80  # sequences of a request, and tokens of each
_REPETITIONS = 300  # of each part


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 pairs of turns instead of 60")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model of both servers")
    parser.add_argument("--requests", type=int, default=4, help="requests in a turn")
    arguments = parser.parse_args()
    pairs, threads = 4 if arguments.quick else 60, usable_cores()
    torch.set_num_threads(threads)
    flags = ("--model", arguments.model, "--threads", str(threads), "--prefix-cache-mib", "0")
    shutil.rmtree(_WORK, ignore_errors=True)
    plain_log, full_log = _WORK / "plain" / "server.log", _WORK / "full" / "server.log"
    key = str(_store(full_log.parent).add("tenant", disclosure=Disclosure("candidate", rotated=True), quotas=_GENEROUS))
    with ExitStack() as stack:
        plain = _connected(stack, stack.enter_context(server(plain_log, *flags)), None)
        full = _connected(stack, stack.enter_context(server(full_log, *flags, *_OPERATIONS)), key)
        cards = [connection.model_card() for connection in (plain[0], full[0])]
        if not cards[1].rotated or cards[0].hidden_size != cards[1].hidden_size:
            raise SystemExit("The servers differ in more than the tenant's view.")
        requests = _requests(cards[0].vocab_size, arguments.requests)
        ratios, plain_rates = _in_turns(plain, full, requests, pairs)
        hidden_size = cards[0].hidden_size
    all_ratios = sorted(ratio for values in ratios.values() for ratio in values)
    margin = ceil(0.98 * sqrt(len(all_ratios)))  # ranks on either side of the median, for 95 % confidence
    middle = len(all_ratios) // 2
    report.write(
        "overhead",
        {
            "encode_overhead": 1 - median(all_ratios),
            "encode_overhead_95": {
                "from": 1 - all_ratios[min(len(all_ratios) - 1, middle + margin)],
                "to": 1 - all_ratios[max(0, middle - margin)],
            },
            **{f"encode_overhead_{transport}": 1 - median(values) for transport, values in ratios.items()},
            "plain_tokens_per_s": median(plain_rates),
            "turns": 2 * len(all_ratios),
            "requests_a_turn": len(requests),
            "tokens_a_request": _SEQUENCES * _TOKENS,
            "threads": threads,
            "parts_us": _parts(hidden_size),
        },
    )


def _store(folder: Path) -> TenantStore:
    """The tenant store of a server from `harness.processes` whose log is in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return TenantStore(f"sqlite:///{folder / 'owner.db'}")


def _connected(stack: ExitStack, ports: tuple[int, int], key: str | None) -> tuple[Connection, Connection]:
    """Connections to the server over REST and gRPC."""
    both = [f"{scheme}://127.0.0.1:{port}" for scheme, port in zip(("http", "grpc"), ports, strict=True)]
    rest, grpc = (open_connection(url, api_key=key) for url in both)
    for connection in (rest, grpc):
        stack.callback(connection.close)
    return rest, grpc


def _requests(vocab_size: int, count: int) -> list[EncodeRequest]:
    """Requests for both servers. All positions are requested, so that each token is rotated."""
    chance = random.Random(0)
    requests = []
    for _ in range(count):
        ids = [[chance.randrange(3, min(vocab_size, 10_000)) for _ in range(_TOKENS)] for _ in range(_SEQUENCES)]
        requests.append(EncodeRequest(token_ids=ids, from_position=[0] * _SEQUENCES, echo=token_crc32s(ids)))
    return requests


def _in_turns(
    plain: Sequence[Connection], full: Sequence[Connection], requests: Sequence[EncodeRequest], pairs: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Ratios of the full server's throughput to the plain one's by transport, and the plain one's tokens per second."""
    ratios: dict[str, list[float]] = {"rest": [], "grpc": []}
    plain_rates: list[float] = []
    for connection in (*plain, *full):
        _rate(connection, requests[:1])
    for pair in range(pairs):
        transport = pair % 2
        turns = [plain[transport], full[transport]]
        # Each server comes first equally often, over each transport.
        turns = turns[::-1] if pair // 2 % 2 else turns
        rates = {connection: _rate(connection, requests) for connection in turns}
        ratios["grpc" if transport else "rest"].append(rates[full[transport]] / rates[plain[transport]])
        plain_rates.append(rates[plain[transport]])
    return ratios, plain_rates


def _rate(connection: Connection, requests: Sequence[EncodeRequest]) -> float:
    """Tokens per second of one turn, with two requests in flight as when a memory is built."""
    started = time.perf_counter()
    for _ in ordered_map(connection.encode, requests, InFlightWindow()):
        pass
    return sum(len(ids) for request in requests for ids in request.token_ids) / (time.perf_counter() - started)


def _parts(hidden_size: int) -> dict[str, float]:
    """Median microseconds of the parts that are done for each call or each token."""
    store = _store(_WORK / "parts")
    key = store.add("tenant", quotas=_GENEROUS)
    access = TenantKeyAuthenticator(store)
    tenant = access.authenticate(f"Bearer {key}")

    def charge() -> None:
        with access.meter(tenant).reserve(CallCost(tokens=_SEQUENCES * _TOKENS)):
            pass

    rows = torch.randn(_SEQUENCES * _TOKENS, hidden_size)
    rotation = Rotation(RotationKey(b"a key").matrix(hidden_size))
    return {
        "key_of_a_call": _microseconds(lambda: access.cached(f"Bearer {key}")),
        "quotas_of_a_call": _microseconds(charge),
        "rotation_of_a_token": _microseconds(lambda: rotation.apply(rows)) / len(rows),
    }


def _microseconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return 1e6 * median(seconds)


if __name__ == "__main__":
    main()
