"""Messages as bytes. A party is given bytes only, and a message that is not well formed is refused."""

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

from gia_jax.secure_aggregation.errors import MalformedMessage

Bytes = Mapping[int, bytes]
MessageType = TypeVar("MessageType", bound="Wire")


@dataclasses.dataclass(frozen=True)
class Wire:
    """Base of all messages: a frozen dataclass with fields of `bytes`, `tuple[int, ...]` or `Mapping[int, bytes]`.

    On the wire a number (a client, a length, a count) is four bytes, little-endian; `bytes` follow their length,
    clients their count, and a mapping is its count, then each client with its bytes.
    """

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        return b"".join(_write(getattr(self, field.name)) for field in dataclasses.fields(self))

    @classmethod
    def from_bytes(cls: type[MessageType], data: bytes) -> MessageType:
        """The message that travelled as `data`; raises MalformedMessage for another length, or a client named twice."""
        reader = _Reader(data)
        message = cls(**{field.name: reader.read(field.type) for field in dataclasses.fields(cls)})
        if reader.left:
            raise MalformedMessage(f"message {cls.__name__} has {reader.left} bytes too many")
        return message


@dataclasses.dataclass(frozen=True)
class ByClient(Wire):
    """Public keys by owner, or boxes by receiver or sender."""

    contents: Bytes


def _write(value: Any) -> bytes:
    if isinstance(value, bytes):
        return struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return struct.pack(f"<I{len(value)}I", len(value), *value)
    entries = (struct.pack("<I", client) + _write(data) for client, data in value.items())
    return struct.pack("<I", len(value)) + b"".join(entries)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise MalformedMessage(f"message ends {count - self.left} bytes early")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self) -> int:
        return struct.unpack("<I", self._take(4))[0]

    def read(self, kind: Any) -> Any:
        if kind is bytes:
            return self._take(self._number())
        clients, contents = [], []
        for _ in range(self._number()):
            clients.append(self._number())
            if kind is Bytes:
                contents.append(self.read(bytes))
        if len(set(clients)) < len(clients):
            raise MalformedMessage(f"message names a client twice, got {clients}")
        return dict(zip(clients, contents)) if kind is Bytes else tuple(clients)
