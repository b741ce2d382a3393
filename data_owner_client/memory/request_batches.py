"""Division of examples into requests that respect the server's limits and fit in this machine's memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocol.messages import DTYPES, ModelCard
from protocol.types import WireDtype

# A few forward passes on a CPU: enough to keep the server busy, and several requests for the in-flight window.
EXAMPLES_PER_REQUEST = 64
# Tokens of one request: a few forward passes, and a small part of the server's queue.
_TOKENS_PER_REQUEST = 2**15
# Bytes of one response. Several are in memory at a time.
_RESPONSE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ExampleSizes:
    """Token counts of all examples, in eight bytes an example.

    Attributes:
        sequence: tokens of each example's prompt and target together.
        target: tokens of each example's target.
    """

    sequence: array[int] = field(default_factory=lambda: array("I"))
    target: array[int] = field(default_factory=lambda: array("I"))

    def append(self, sequence: int, target: int) -> None:
        """Add one example."""
        self.sequence.append(sequence)
        self.target.append(target)


def split_into_requests(
    sizes: ExampleSizes, card: ModelCard, dtype: WireDtype, *, done: int, examples_per_shard: int
) -> Iterator[range]:
    """Ranges of examples, in order, one for each request.

    No range crosses the end of a shard, so an interrupted build sends the same requests as an undisturbed one.

    Args:
        sizes: token counts of all examples.
        card: the server's model card, with its limits.
        dtype: number format in which representations travel.
        done: examples that are already stored.
        examples_per_shard: examples in one shard.
    """
    limits = card.limits
    max_sequences = min(EXAMPLES_PER_REQUEST, limits.max_sequences)
    # Four bytes for each int32 id; the other half is for everything else.
    max_tokens = min(_TOKENS_PER_REQUEST, limits.max_body_bytes // 8)
    max_rows = min(limits.max_rows, _RESPONSE_BYTES // (card.hidden_size * DTYPES[dtype].itemsize))
    start = done
    while start < len(sizes.sequence):
        tokens, rows, stop = sizes.sequence[start], sizes.target[start], start + 1
        shard_end = min(len(sizes.sequence), (start // examples_per_shard + 1) * examples_per_shard)
        while stop < min(shard_end, start + max_sequences):
            tokens, rows = tokens + sizes.sequence[stop], rows + sizes.target[stop]
            if tokens > max_tokens or rows > max_rows:
                break
            stop += 1
        yield range(start, stop)
        start = stop
