"""Work in the background."""

import threading
import time
from collections.abc import Iterator

import pytest

from data_owner_client.runtime.background import daemon_future, prefetch_one


def test_results_and_errors_come_back() -> None:
    assert daemon_future(lambda: threading.current_thread()).result() is not threading.current_thread()
    with pytest.raises(KeyError, match="lost"):
        daemon_future(lambda: dict[str, int]()["lost"]).result()


def test_one_item_is_made_while_the_one_before_is_used() -> None:
    made = []

    def items() -> Iterator[int | None]:
        for item in (1, None, 3):
            made.append(item)
            yield item
        raise OSError("unreadable")

    ahead = prefetch_one(items())
    assert next(ahead) == 1
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [1, None]
    assert next(ahead) is None
    assert next(ahead) == 3
    with pytest.raises(OSError, match="unreadable"):
        next(ahead)
