"""The form that a request holds its answers to."""

from __future__ import annotations

from typing import Any

from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.gateway.openai.bodies import RequestBody
from data_owner_client.gateway.openai.errors import ApiError
from protocol.errors import InvalidData


def answer_form(body: RequestBody) -> AnswerForm | None:
    """The form that the answers are held to; None for free answers.

    Raises:
        ApiError: decoding cannot be held to the form, or there are two.
    """
    forms = {
        "response_format": _of_response_format(body.response_format),
        "guided_choice": None if body.guided_choice is None else _of_choices(body.guided_choice, "guided_choice"),
        "structured_outputs": _of_structured_outputs(body.structured_outputs),
    }
    named = {name: form for name, form in forms.items() if form is not None}
    if len(named) > 1:
        raise ApiError(400, f"{' and '.join(named)} both give the form of the answer. Give one.", param=[*named][1])
    return next(iter(named.values()), None)


def _of_response_format(value: dict[str, Any] | None) -> AnswerForm | None:
    kind = None if value is None else value.get("type")
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        raise ApiError(
            400,
            "'response_format' of type 'json_object' is not supported with this model. Use the type json_schema.",
            param="response_format.type",
        )
    if kind != "json_schema":
        raise ApiError(400, "The type of response_format must be text or json_schema.", param="response_format.type")
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    param = "response_format.json_schema.schema"
    if not isinstance(schema, dict):
        raise ApiError(400, f"{param} must be a JSON schema.", param=param)
    return _supported(AnswerForm(schema), param)


def _of_structured_outputs(value: dict[str, Any] | None) -> AnswerForm | None:
    given = {name: part for name, part in (value or {}).items() if part is not None}
    if not given:
        return None
    if [*given] != ["choice"]:
        raise ApiError(
            400,
            "Of structured_outputs, only choice is supported. Give a schema in response_format.",
            param="structured_outputs",
        )
    return _of_choices(given["choice"], "structured_outputs.choice")


def _of_choices(choices: Any, param: str) -> AnswerForm:
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise ApiError(400, f"{param} must be a list of texts that are not empty.", param=param)
    if not all(map(is_text, choices)):
        raise ApiError(400, f"{param} has half of a surrogate pair. Write the whole character.", param=param)
    return _supported(AnswerForm(choices=tuple(choices)), param)


def _supported(form: AnswerForm, param: str) -> AnswerForm:
    """The form, if decoding can be held to it.

    Raises:
        ApiError: it cannot.
    """
    try:
        form.require_supported()
    except InvalidData as error:
        raise ApiError(400, str(error), param=param) from error
    return form


def is_text(text: str) -> bool:
    r"""False for a text with half of a surrogate pair, which JSON's `\u` escapes can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
