"""The items of a JSON array of any size, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TextIO

READ = 2**20  # characters
SPACE = " \t\n\r"
NEARLY = 16  # so many characters before the end of what was read, an error may be one of the cut


class _Window:
    """What has been read of a file and is not used up; errors count lines and columns from the file's beginning."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lines = 0  # line ends before the window
        self._column = 0  # characters between the last of them and the window
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Read on, at least as much as is there; drop what is used up."""
        used = self.text[: self.at]
        self._lines += used.count("\n")
        self._column = len(used) - used.rfind("\n") - 1 + (0 if "\n" in used else self._column)
        rest = self.text[self.at :]
        new = self._file.read(max(READ, len(rest)))
        self.text, self.at, self.ended = rest + new, 0, not new

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def error(self, message: str, at: int) -> json.JSONDecodeError:
        made = json.JSONDecodeError(message, self.text, at)
        if made.lineno == 1:
            made.colno += self._column
        made.lineno += self._lines
        return made


def array_items(
    file: TextIO, pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]]
) -> Iterator[tuple[Any, int]]:
    """Each item of the one array in a file, and its number of characters.

    Raises:
        json.JSONDecodeError: it is malformed; line and column are those in the file.
        TypeError: it is another value than an array; the argument is the value.
    """
    decoder = json.JSONDecoder(object_pairs_hook=pairs_hook)
    window = _Window(file)
    if window.peek() != "[":
        raise TypeError(decoder.decode(window.text + file.read()))
    window.at += 1
    while window.peek() != "]":
        yield _item(decoder, window)
        mark = window.peek()
        if mark == "]":
            break
        if mark != ",":
            raise window.error("Expecting ',' delimiter", window.at)
        window.at += 1
        if window.peek() == "]":
            raise window.error("Expecting value", window.at)
    window.at += 1
    if window.peek():
        raise window.error("Extra data", window.at)


def _item(decoder: json.JSONDecoder, window: _Window) -> tuple[Any, int]:
    """The value at the window's place, and its length; the window moves behind it. What its end cuts is read on."""
    while True:
        try:
            item, end = decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos >= len(window.text) - NEARLY
            if window.ended or not cut:
                raise window.error(error.msg, error.pos) from None
        else:
            if end + len("e+") < len(window.text) or window.ended:  # a number near the end may go on
                length, window.at = end - window.at, end
                return item, length
        window.more()
