# SPDX-License-Identifier: Apache-2.0
"""Just enough DER (X.690) to look at a PKCS#12 file before anything is computed, and to put one together.

Rules: tags of one byte, definite lengths in their shortest form, integers that are not negative and in their
shortest form, nothing left over. What a reader here accepts has one encoding only, so that a judgement about
the bytes is one about what any other reader makes of them. There is no recursion: the grammar calls.
"""

from __future__ import annotations

from typing import Final

INTEGER: Final = 0x02
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OID: Final = 0x06
SEQUENCE: Final = 0x30
SET: Final = 0x31
EXPLICIT_0: Final = 0xA0
IMPLICIT_0: Final = 0x80


class DerError(ValueError):
    """The bytes are not DER, or not the element that the grammar wants here. Its text holds no content."""


class Reader:
    """The elements of one constructed value, in order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def more(self) -> bool:
        """Whether an element follows."""
        return self._at < len(self._data)

    def follows(self, tag: int) -> bool:
        """Whether the next element has this tag."""
        return self.more() and self._data[self._at] == tag

    def raw(self, tag: int) -> bytes:
        """Take the next element with its tag and length; DerError if it has another tag."""
        start = self._at
        self.element(tag)
        return self._data[start : self._at]

    def element(self, tag: int) -> bytes:
        """Take the contents of the next element; DerError if it has another tag."""
        if not self.more():
            raise DerError(f"element {tag:#04x} is missing")
        found = self._data[self._at]
        if found != tag:
            raise DerError(f"element {found:#04x} where {tag:#04x} is wanted")
        self._at += 1
        end = self._length() + self._at
        if end > len(self._data):
            raise DerError(f"element {tag:#04x} is longer than what holds it")
        contents = self._data[self._at : end]
        self._at = end
        return contents

    def enter(self, tag: int) -> Reader:
        """Take the next element and return a reader of its contents."""
        return Reader(self.element(tag))

    def integer(self) -> int:
        """Take an INTEGER that is not negative."""
        contents = self.element(INTEGER)
        padded = len(contents) > 1 and contents[0] == 0 and contents[1] < 0x80
        if not contents or contents[0] >= 0x80 or padded:
            raise DerError("an integer is empty, negative or padded")
        return int.from_bytes(contents, "big")

    def end(self) -> None:
        """DerError if anything is left."""
        if self.more():
            raise DerError("something follows the last element")

    def _length(self) -> int:
        head = self._bytes(1)[0]
        if head < 0x80:
            return head
        if head == 0x80:
            raise DerError("a length is indefinite: BER, not DER")
        count = head & 0x7F
        length = int.from_bytes(self._bytes(count), "big")
        if length < 0x80 or length >> 8 * (count - 1) == 0:
            raise DerError("a length is not in its shortest form")
        return length

    def _bytes(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise DerError("a length is cut off")
        self._at += count
        return taken


def element(tag: int, *parts: bytes) -> bytes:
    """Encode one element whose contents are `parts`, one after the other."""
    contents = b"".join(parts)
    size = len(contents)
    if size < 0x80:
        return bytes([tag, size]) + contents
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + contents


def integer(value: int) -> bytes:
    """Encode an INTEGER that is not negative."""
    return element(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))
