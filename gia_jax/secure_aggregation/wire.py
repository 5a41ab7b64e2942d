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

    On the wire a number (a client, a length, a count) is four bytes, little-endian. `bytes` follow their length,
    clients follow their count, and a mapping is its count, then each client with its bytes.

    Examples:
        >>> from gia_jax.secure_aggregation.wire import ByClient
        >>> ByClient({7: b"ab"}).to_bytes().hex(" ", -4)
        '01000000 07000000 02000000 6162'
    """

    def to_bytes(self) -> bytes:
        """Returns the message as it travels."""
        return b"".join(_write(getattr(self, field.name)) for field in dataclasses.fields(self))

    @classmethod
    def from_bytes(cls: type[MessageType], data: bytes) -> MessageType:
        """Reads a message that travelled as bytes.

        Args:
            data: The bytes.

        Returns:
            The message.

        Raises:
            MalformedMessage: If the bytes are of another length, or name a client twice.
        """
        reader = _Reader(data)
        message = cls(**{field.name: reader.read(field.type) for field in dataclasses.fields(cls)})
        if reader.left:
            raise MalformedMessage(f"message {cls.__name__} has {reader.left} bytes too many")
        return message


@dataclasses.dataclass(frozen=True)
class ByClient(Wire):
    """A message of public keys by owner, or of boxes by receiver or sender.

    Attributes:
        contents: The bytes of each client, by its number.
    """

    contents: Bytes


def _write(value: Any) -> bytes:
    """Writes one field of a message."""
    if isinstance(value, bytes):
        return struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return struct.pack(f"<I{len(value)}I", len(value), *value)
    entries = (struct.pack("<I", client) + _write(data) for client, data in value.items())
    return struct.pack("<I", len(value)) + b"".join(entries)


class _Reader:
    """Reads the fields of a message from its bytes, in order.

    Args:
        data: Bytes of the message.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """The number of bytes that are not yet read."""
        return len(self._data) - self._at

    def _take(self, count: int) -> bytes:
        """Reads the next `count` bytes, and raises MalformedMessage where they are fewer."""
        if count > self.left:
            raise MalformedMessage(f"message ends {count - self.left} bytes early")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self) -> int:
        """Reads a number of four bytes."""
        return struct.unpack("<I", self._take(4))[0]

    def read(self, kind: Any) -> Any:
        """Reads a field of the given type, and raises MalformedMessage where it names a client twice."""
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
