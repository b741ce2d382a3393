"""Codec of messages, in two forms: raw little-endian tensors in a safetensors container, or JSON.

A message is a pydantic model. In its binary form its tensors become named safetensors entries. Its ragged token ids
become two int32 entries (`name.values`, `name.lengths`). Everything else is JSON in the container's metadata under the
key `message`. An optional entry `crc32` over all of it detects changes on the way. safetensors validates names,
offsets, shapes and sizes in Rust and executes nothing, so a hostile body is an error, never code.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

import safetensors.torch
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from safetensors import SafetensorError
from torch import Tensor

from protocol.errors import InvalidRequest, MalformedMessage
from protocol.integrity import error_path

BINARY = "application/vnd.pema.safetensors"
JSON = "application/json"
_METADATA_KEY = "message"
_CHECKSUM = "crc32"
_MAX_TOKEN_ID = 2**31 - 1


class _RaggedMarker:
    """Marks a field that travels as flat values and lengths."""


def _to_tensor(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, list):
        return value
    try:
        return torch.tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError("not a rectangular array of numbers") from error


def _to_float_tensor(value: Any) -> Any:
    return _to_tensor(value, torch.float32)


def _to_int_tensor(value: Any) -> Any:
    return _to_tensor(value, torch.int64)


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _is_float_or_int8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype == torch.int8


def _shaped(dimensions: int, kind: str, is_kind: Callable[[torch.dtype], bool]) -> AfterValidator:
    def check(tensor: Tensor) -> Tensor:
        if tensor.ndim != dimensions or not is_kind(tensor.dtype):
            raise ValueError(f"not {kind} in {dimensions} dimension(s)")
        return tensor

    return AfterValidator(check)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON's \u escapes can spell half of a surrogate pair. The error itself would quote the text.
        raise ValueError("not Unicode text, it has a lone surrogate") from None
    return text


_as_list = PlainSerializer(lambda tensor: tensor.tolist(), when_used="json")
_NUMBERS = {"type": "array", "items": {"type": "number"}}

FloatTensor = Annotated[
    Tensor, BeforeValidator(_to_float_tensor), _shaped(1, "floats", _is_float), _as_list, WithJsonSchema(_NUMBERS)
]
"""Float tensor of one dimension (JSON: an array of numbers)."""
FloatMatrix = Annotated[
    Tensor,
    BeforeValidator(_to_float_tensor),
    _shaped(2, "floats", _is_float),
    _as_list,
    WithJsonSchema({"type": "array", "items": _NUMBERS}),
]
"""Float tensor of two dimensions (JSON: an array of rows)."""
RowMatrix = Annotated[
    Tensor,
    BeforeValidator(_to_float_tensor),
    _shaped(2, "floats or int8", _is_float_or_int8),
    _as_list,
    WithJsonSchema({"type": "array", "items": _NUMBERS}),
]
"""Representations: float or int8 tensor of two dimensions."""
IntTensor = Annotated[
    Tensor,
    BeforeValidator(_to_int_tensor),
    _shaped(1, "integers", _is_integer),
    _as_list,
    WithJsonSchema({"type": "array", "items": {"type": "integer"}}),
]
"""Integer tensor of one dimension."""
Text = Annotated[str, AfterValidator(_encodable)]
"""Text that can be encoded as UTF-8, and so tokenised."""
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID, strict=True)]
RaggedIds = Annotated[list[list[TokenId]], _RaggedMarker()]
"""Token ids of several sequences of different lengths."""


class Message(BaseModel):
    """Base of all messages. Unknown fields are refused, so that a misspelt option is never silently ignored."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True, protected_namespaces=())

    def to_bytes(self) -> bytes:
        """The message as a safetensors container."""
        tensors: dict[str, Tensor] = {}
        header: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                tensors[name] = value.contiguous()
            elif value is not None and _is_ragged(field.metadata):
                tensors[f"{name}.values"], tensors[f"{name}.lengths"] = join_ragged(value)
            else:
                header[name] = value
        # Pydantic writes nested models; the tensors are not in its part.
        text = self.model_dump_json(include=set(header))
        tensors[_CHECKSUM] = _checksum(text, tensors)
        packed: bytes = safetensors.torch.save(tensors, metadata={_METADATA_KEY: text})
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The message in a binary body.

        Raises:
            MalformedMessage: the bytes are not a well-formed container, or their checksum differs.
            InvalidRequest: a field is missing, unknown or of the wrong type.
        """
        try:
            tensors = load_tensors(data)
            (header_bytes,) = struct.unpack("<Q", data[:8])
            metadata = json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}
            text = metadata.get(_METADATA_KEY, "{}")
            checksum = tensors.pop(_CHECKSUM, None)
            if checksum is not None and not torch.equal(checksum, _checksum(text, tensors)):
                raise ValueError("the checksum differs")
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("the metadata is not an object")
            for name, field in cls.model_fields.items():
                if _is_ragged(field.metadata) and f"{name}.values" in tensors:
                    fields[name] = split_ragged(tensors.pop(f"{name}.values"), tensors.pop(f"{name}.lengths"))
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, struct.error) as error:
            raise MalformedMessage(
                "The body is not a well-formed safetensors container of this message.",
                hint=f"Send the tensors as described in the OpenAPI page, or JSON with content type {JSON}.",
            ) from error
        return cls.from_fields(fields | tensors)

    def to_json(self) -> bytes:
        """The JSON form, tensors as nested arrays."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The message in a JSON body.

        Raises:
            MalformedMessage: the bytes are not JSON.
            InvalidRequest: a field is missing, unknown or of the wrong type.
        """
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise MalformedMessage("The body is not JSON.", hint=f"Its content type says {JSON}.") from error
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """The message with these fields, validated.

        Raises:
            InvalidRequest: a field is missing, unknown or of the wrong type.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            # Only the path and the rule: the offending value may be private.
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise InvalidRequest(
                f"{error_path(first['loc'])}: {first['msg']} ({error.error_count()} such in this message).",
                hint="The fields and an example are in the OpenAPI page of the server (/docs).",
            ) from None


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors container.

    Raises:
        ValueError: the bytes are no such container, or it has tensors that torch cannot hold.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError("no safetensors container") from error
    return tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """CRC-32 of the text in UTF-8, then of the tensors' bytes in the order of their names; int64 [1]."""
    checksum = zlib.crc32(text.encode())
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(raw_bytes(tensor), checksum)
    return torch.tensor([checksum])


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row by row, in the machine's byte order (little-endian). Not copied if it is contiguous."""
    dense = tensor.contiguous()
    # as_strided, since a dimension of one may have any stride; uint8, since numpy has no bfloat16.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _is_ragged(metadata: list[Any]) -> bool:
    return any(isinstance(mark, _RaggedMarker) for mark in metadata)


def join_ragged(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Values and lengths (int32) of ragged token ids."""
    values = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
    return values, torch.tensor([len(row) for row in rows], dtype=torch.int32)


def split_ragged(values: Tensor, lengths: Tensor) -> list[list[int]]:
    """Ragged token ids from their values and lengths, both int32.

    Raises:
        ValueError: the dtype or the shape differs, or the lengths do not add up.
    """
    if values.dtype != torch.int32 or lengths.dtype != torch.int32 or values.ndim != 1 or lengths.ndim != 1:
        raise ValueError("token ids travel as one-dimensional int32 values and lengths")
    counts = lengths.tolist()
    if any(count < 0 for count in counts) or sum(counts) != values.numel():
        raise ValueError("the lengths do not add up to the number of values")
    return [row.tolist() for row in values.split(counts)]
