"""LangChain's calls of a gateway, in the environment of applications: `langchain_calls.py URL MODEL`.

Texts, a schema and a bound come as JSON on standard input. What the calls returned goes as JSON to standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def main(url: str, model: str) -> None:
    """Make all calls."""
    given = json.load(sys.stdin)
    texts = given["texts"]

    def chat(**settings: Any) -> ChatOpenAI:
        return ChatOpenAI(base_url=url, api_key="none", model=model, max_retries=0, **settings)

    chunks = list(chat().stream(texts[0], stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    turns = [("system", "Be kind."), ("human", texts[1]), ("ai", "an"), ("human", texts[0])]
    record = {
        "invoke": _message(chat().invoke(texts[0])),
        "conversation": _message(chat().invoke(turns)),
        "pieces": [chunk.content for chunk in chunks],
        "stream": _message(total),
        "batch": [_message(message) for message in chat().batch(texts)],
        "short": _message(chat(max_tokens=given["max_tokens"]).invoke(texts[0])),
        "drawn": _texts(chat(temperature=1.0, seed=given["seed"], n=3), texts[0]),
        "logged": _message(chat().bind(logprobs=True, top_logprobs=2).invoke(texts[0])),
        "structured": chat().with_structured_output(given["schema"], method="json_schema").invoke(texts[0]),
    }
    json.dump(record, sys.stdout)


def _message(message: Any) -> dict[str, Any]:
    return {"text": message.content, "usage": message.usage_metadata, "metadata": message.response_metadata}


def _texts(chat: ChatOpenAI, text: str) -> list[str]:
    (found,) = chat.generate([[HumanMessage(text)]]).generations
    return [each.text for each in found]


if __name__ == "__main__":
    main(*sys.argv[1:])
