"""A file of each form of records that other tools have, in each container, and the pairs that it holds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_owner_client.data.pairs import Conversation, Pair

Records = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **further: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **further}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def talk(*turns: dict[str, Any]) -> Conversation:
    return Conversation(turns)


CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"maxLength": 5}}}
CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
SHARED_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": 1}}}
TOOL = {"role": "tool", "content": "noon", "tool_call_id": "1"}
# Records, the pairs without their groups, and names of labels.
FORMS: dict[str, tuple[Records, list[Pair], tuple[str, ...]]] = {
    "own": ([{"source": "a", "target": "b", "id": 7}], [Pair("a", "b")], ()),
    "one-question": ([{"messages": [user("a"), assistant("b")]}], [Pair("a", "b")], ()),
    "system": (
        [{"messages": [{"role": "developer", "content": "s"}, user("a"), assistant("b")]}],
        [Pair("s\n\na", "b", conversation=talk(system("s"), user("a")))],
        (),
    ),
    "conversation": (
        [{"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")]}],
        [
            Pair("s\n\na", "b", conversation=talk(system("s"), user("a"))),
            Pair("c", "d", conversation=talk(system("s"), user("a"), assistant("b"), user("c"))),
            Pair(
                "e",
                "f",
                conversation=talk(system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")),
            ),
        ],
        (),
    ),
    "weights": (
        [
            {
                "messages": [
                    user("a"),
                    assistant("b", weight=0),
                    user("c"),
                    assistant("d", weight=1),
                    user("e"),
                    assistant("f", train=False),
                    user("g"),
                    assistant("h", trainable=True),
                ]
            }
        ],
        [
            Pair("c", "d", conversation=talk(user("a"), assistant("b"), user("c"))),
            Pair(
                "g",
                "h",
                conversation=talk(
                    user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"), user("g")
                ),
            ),
        ],
        (),
    ),
    "tools": (
        [{"messages": [user("a"), assistant("", tool_calls=[CALL]), TOOL, assistant("b")], "tools": [CLOCK]}],
        [
            Pair("a", "", conversation=Conversation((user("a"),), (CLOCK,)), reply=assistant("", tool_calls=[CALL])),
            Pair(
                "noon",
                "b",
                conversation=Conversation((user("a"), assistant("", tool_calls=[CALL]), TOOL), (CLOCK,)),
            ),
        ],
        (),
    ),
    "texts": ([{"prompt": "a", "completion": "b"}], [Pair("a", "b")], ()),
    "prompts-of-turns": (
        [{"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}],
        [Pair("c", "d", conversation=talk(user("a"), assistant("b"), user("c")))],
        (),
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": 1}}'},
                    {"from": "observation", "value": "noon"},
                    {"from": "gpt", "value": "b"},
                ],
                "system": "s",
                "tools": json.dumps([CLOCK["function"]]),
            }
        ],
        [
            Pair(
                "s\n\na",
                "",
                conversation=Conversation((system("s"), user("a")), (CLOCK,)),
                reply=assistant("", tool_calls=[SHARED_CALL]),
            ),
            Pair(
                "noon",
                "b",
                conversation=Conversation(
                    (
                        system("s"),
                        user("a"),
                        assistant("", tool_calls=[SHARED_CALL]),
                        {"role": "tool", "content": "noon"},
                    ),
                    (CLOCK,),
                ),
            ),
        ],
        (),
    ),
    "alpaca": (
        [
            {"instruction": "a", "input": "", "output": "b", "history": []},
            {"instruction": "a", "input": "x", "output": "b", "history": []},
        ],
        [Pair("a", "b"), Pair("a\n\nx", "b")],
        (),
    ),
    "alpaca-history": (
        [{"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}],
        [
            Pair("s\n\na", "b", conversation=talk(system("s"), user("a"))),
            Pair("c", "d", conversation=talk(system("s"), user("a"), assistant("b"), user("c"))),
        ],
        (),
    ),
    "dolly": (
        [{"instruction": "a", "context": "x", "response": "b", "category": "closed_qa"}],
        [Pair("a\n\nx", "b")],
        (),
    ),
    "input-output": ([{"input": "a", "output": "b"}], [Pair("a", "b")], ()),
    "question-answer": ([{"question": "a", "answer": "b"}], [Pair("a", "b")], ()),
    "question-answers": (
        [{"question": "a", "context": "x", "answers": ["b", "c", "b"]}],
        [Pair("x\n\na", "b", references=("c",))],
        (),
    ),
    "squad-rows": (
        [{"id": "1", "context": "x", "question": "a", "answers": {"text": ["b", "c"], "answer_start": [1, 2]}}],
        [Pair("x\n\na", "b", references=("c",))],
        (),
    ),
    "squad-articles": (
        [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": "x",
                        "qas": [
                            {"id": "1", "question": "a", "answers": [{"text": "b", "answer_start": 1}]},
                            {"id": "2", "question": "c", "answers": [{"text": "d", "answer_start": 1}]},
                        ],
                    }
                ],
            }
        ],
        [Pair("x\n\na", "b"), Pair("x\n\nc", "d")],
        (),
    ),
    "label-names": ([{"text": "a", "label": "good"}], [Pair("a", "good")], ()),
    "label-numbers": (
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        [Pair("a", "good"), Pair("b", "bad")],
        ("bad", "good"),
    ),
    "label-names-that-are-numbers": ([{"text": "a", "label": 5}], [Pair("a", "5")], ("1", "5")),
    **{
        f"{text}-{summary}": ([{text: "a", summary: "b", "id": "1"}], [Pair("a", "b")], ())
        for text in ("article", "document", "dialogue")
        for summary in ("summary", "highlights")
    },
}  # fmt: skip


def cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_table(records: Records, delimiter: str) -> bytes:
    out = io.StringIO()
    quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None} if delimiter == "\t" else {}
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n", **quoting)  # type: ignore[arg-type]
    writer.writerow(records[0])
    writer.writerows([[cell(value) for value in record.values()] for record in records])
    return out.getvalue().encode()


def as_parquet(records: Records) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=1)
    return sink.getvalue()


CONTAINERS: dict[str, Callable[[Records], bytes]] = {
    "jsonl": lambda records: "".join(json.dumps(record) + "\n" for record in records).encode(),
    "json": lambda records: json.dumps({"version": "2.0", "data": records}, indent=1).encode(),
    "csv": lambda records: as_table(records, ","),
    "tsv": lambda records: as_table(records, "\t"),
    "parquet": as_parquet,
}


def _squad(source: str, target: str) -> dict[str, Any]:
    question = {"question": source, "answers": [{"text": target, "answer_start": 0}] if target else []}
    return {"title": "t", "paragraphs": [{"context": f"her {source}", "qas": [question]}]}


RECORDS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "own": lambda source, target: {"source": source, "target": target},
    "messages": lambda source, target: {
        "messages": [system("on"), user(source), assistant(target), user("an"), assistant("q")]
    },
    "sharegpt": lambda source, target: {
        "conversations": [{"from": "human", "value": source}, {"from": "gpt", "value": target}]
    },
    "completion": lambda source, target: {"prompt": source, "completion": target},
    "turns": lambda source, target: {"prompt": [user(source)], "completion": [assistant(target)]},
    "alpaca": lambda source, target: {
        "instruction": "an",
        "input": source,
        "output": target,
        "history": [[f"on {source}", "q"]],
    },
    "input": lambda source, target: {"input": source, "output": target},
    "answer": lambda source, target: {"question": source, "answer": target},
    "answers": lambda source, target: {
        "question": source,
        "context": "her",
        "answers": {"text": [target] if target else []},
    },
    "squad": _squad,
    "label": lambda source, target: {"text": source, "label": target},
    "summary": lambda source, target: {"article": source, "summary": target},
}
"""A record of each form with a source and a target; an empty target is a problem in all of them."""
