"""Messages as protobuf and back. `pema.proto` mirrors `messages.py` field by field, so one rule converts all."""

from __future__ import annotations

import zlib
from typing import Any, TypeVar

import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as Proto
from torch import Tensor

from protocol import pema_pb2
from protocol.codec import Message, join_ragged, raw_bytes, split_ragged
from protocol.errors import InvalidRequest, MalformedMessage
from protocol.rate_limits import RATE_LIMIT, RATE_LIMIT_POLICY

REQUEST_ID_METADATA = "x-request-id"
"""Metadata of unary calls with their request id; each call of a stream carries its id in the message."""
CLIENT_METADATA = "x-pema-client"
"""Metadata that identifies a client; the server shares the model fairly between clients."""
KEY_METADATA = "authorization"
"""Metadata with `Bearer` and the client's key, where the owner asks for one."""
RATE_LIMIT_METADATA = RATE_LIMIT.lower()
"""Trailing metadata with the remainder of the client's quotas; on a stream, after the last answer."""
RATE_LIMIT_POLICY_METADATA = RATE_LIMIT_POLICY.lower()
"""Trailing metadata with the quotas themselves."""
PROBLEM_METADATA = "pema-problem-bin"
"""Trailing metadata with the error's problem document, JSON in UTF-8."""

_Message = TypeVar("_Message", bound=Message)
_Proto = TypeVar("_Proto", bound=Proto)
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int8", "int32", "int64")}


def to_proto(message: Message, target: _Proto) -> _Proto:
    """Fill a protobuf message with the fields of a message. A field that is None stays unset.

    Raises:
        InvalidRequest: a number is too large for its protobuf type.
    """
    for name in type(message).model_fields:
        value = getattr(message, name)
        if value is not None:
            try:
                _fill(target, name, value)
            except ValueError as error:
                raise InvalidRequest(
                    f"{name} holds a number that is too large.", hint="protocol/pema.proto describes the fields."
                ) from error
    return target


def from_proto(proto: Proto, message_type: type[_Message]) -> _Message:
    """The validated message in a protobuf message. Fields that are unset take their defaults.

    Raises:
        MalformedMessage: a tensor's bytes do not fit its shape, dtype and checksum.
        InvalidRequest: a field is missing or of the wrong type.
    """
    return message_type.from_fields(_fields(proto, message_type))


def _fill(target: Proto, name: str, value: Any) -> None:
    field = getattr(target, name)
    if isinstance(field, pema_pb2.Tensor):
        field.dtype = str(value.dtype).removeprefix("torch.")
        field.shape.extend(value.shape)
        field.data = bytes(raw_bytes(value))
        field.crc32 = zlib.crc32(field.data)
    elif isinstance(field, pema_pb2.TokenSequences):
        field.SetInParent()  # an empty list differs from an unset field
        values_N, lengths_B = join_ragged(value)
        field.values, field.lengths = bytes(raw_bytes(values_N)), bytes(raw_bytes(lengths_B))
    elif isinstance(field, pema_pb2.TokenIds):
        field.SetInParent()
        field.ids.extend(value)
    elif isinstance(value, Message):
        to_proto(value, field)
    elif isinstance(value, list):
        field.extend(value)
    else:
        setattr(target, name, value)


def _fields(proto: Proto, message_type: type[Message]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for descriptor in proto.DESCRIPTOR.fields:
        name = descriptor.name
        value, model_field = getattr(proto, name), message_type.model_fields[name]
        if descriptor.is_repeated:
            # protobuf cannot tell empty from unset, so an empty list that is optional counts as unset.
            if len(value) or model_field.default is not None:
                fields[name] = list(value)
        elif descriptor.has_presence:
            if proto.HasField(name):
                fields[name] = _value(value, model_field.annotation)
        elif value or descriptor.type != FieldDescriptor.TYPE_STRING:
            fields[name] = value
    return fields


def _value(value: Any, annotation: Any) -> Any:
    if isinstance(value, pema_pb2.Tensor):
        return _tensor(value)
    if isinstance(value, pema_pb2.TokenSequences):
        try:
            return split_ragged(_from_raw(value.values, torch.int32), _from_raw(value.lengths, torch.int32))
        except ValueError as error:
            raise _malformed("token ids") from error
    if isinstance(value, pema_pb2.TokenIds):
        return list(value.ids)
    return _fields(value, annotation) if isinstance(value, Proto) else value


def _tensor(proto: pema_pb2.Tensor) -> Tensor:
    dtype = _DTYPES.get(proto.dtype)
    if dtype is None:
        raise _malformed("a tensor's dtype")
    if proto.HasField("crc32") and proto.crc32 != zlib.crc32(proto.data):
        raise _malformed("a tensor")
    try:
        return _from_raw(proto.data, dtype).view(*proto.shape)
    except (ValueError, RuntimeError, TypeError) as error:
        raise _malformed("a tensor") from error


def _from_raw(data: bytes, dtype: torch.dtype) -> Tensor:
    if len(data) % dtype.itemsize:
        raise ValueError("not a whole number of values")
    # A copy: protobuf's bytes are read-only, and torch knows no read-only tensors.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage(
        f"The bytes of {what} do not fit its dtype, shape and checksum.",
        hint="protocol/pema.proto describes the fields.",
    )
