"""The tree of errors and its problem documents."""

from __future__ import annotations

import json

import pytest

from protocol import errors
from protocol.errors import PemaError, from_problem, to_problem

TREE = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, PemaError)]


def test_the_tree_is_the_one_drawn_in_the_docstring() -> None:
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "──" in line]
    for line in drawn:
        name, *rest = line.partition("── ")[2].split()
        cls = getattr(errors, name)
        if rest[0].startswith("("):
            assert cls.__mro__[1].__name__ == rest.pop(0).strip("()") or rest  # checked by class below
        if rest[0].isdigit():
            assert cls.http_status == int(rest[0])
    assert len(drawn) == len(TREE) - 1  # all but the root


@pytest.mark.parametrize("cls", TREE)
def test_every_error_survives_the_wire(cls: type[PemaError]) -> None:
    error = cls("It happened.", hint="Do this.", retry_after_s=2.5, request_id="r1")
    problem = json.loads(json.dumps(to_problem(error)))
    back = from_problem(problem, problem["status"])
    assert type(back) is cls
    assert (back.detail, back.hint, back.retry_after_s, back.request_id) == ("It happened.", "Do this.", 2.5, "r1")
    assert str(back) == "It happened. Do this. [request r1]"
    assert problem["status"] == cls.http_status
    assert problem["title"]
    assert problem["type"].endswith(cls.code)


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in TREE}) == len(TREE)


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.InvalidRequest, ValueError),
        (errors.MalformedMessage, ValueError),
        (errors.MalformedMessage, errors.InvalidRequest),
        (errors.OverLimit, errors.InvalidRequest),
        (errors.Unsupported, errors.InvalidRequest),
        (errors.PayloadTooLarge, ValueError),
        (errors.NotAcceptable, ValueError),
        (errors.NumericalFault, ArithmeticError),
        (errors.ConnectionFailed, ConnectionError),
        (errors.ConnectionFailed, OSError),
        (errors.IdentityMismatch, ValueError),
        (errors.InvalidData, ValueError),
    ],
)
def test_errors_are_the_standard_librarys_too(cls: type[PemaError], base: type[Exception]) -> None:
    assert issubclass(cls, base)
    assert issubclass(cls, PemaError)


def test_what_is_not_given_is_not_in_the_document() -> None:
    problem = to_problem(errors.OverLimit("Too long."))
    assert "retry_after_s" not in problem
    assert "request_id" not in problem
    assert str(from_problem(problem, 422)) == "Too long."


def test_a_text_of_the_other_side_is_one_line_and_controls_no_terminal() -> None:
    document = to_problem(errors.OverLimit("a\x1b[31mb\r\nc\x9b2J\u202ed", hint="h\x07" + "i" * 10**6))
    error = from_problem(document | {"request_id": "r\n1"}, 422)
    assert (error.detail, error.request_id) == ("a [31mb c 2J d", "r 1")
    assert error.hint.startswith("h i")
    assert str(error).isprintable()
    assert len(str(error)) < 3000


@pytest.mark.parametrize(
    ("status", "cls"), [(404, errors.InvalidRequest), (502, errors.ServerFault), (500, errors.ServerFault)]
)
@pytest.mark.parametrize("problem", [{}, {"type": "about:blank", "retry_after_s": "soon", "hint": None}])
def test_a_foreign_document_becomes_the_error_of_its_status(
    problem: dict[str, object], status: int, cls: type[PemaError]
) -> None:
    error = from_problem(problem, status)
    assert type(error) is cls
    assert str(status) in error.detail
    assert error.retry_after_s is None
    assert "None" not in str(error)
