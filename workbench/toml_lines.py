"""Where each key of a TOML text stands. `tomllib` reads values but forgets lines; a good error message needs them."""

from __future__ import annotations

import re

Path = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}#\r\n]*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of every table and key of a *valid* TOML text, by path; list elements are counted from 0."""
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.found: dict[Path, int] = {}
        self.lengths: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while True:
            self._skip(_SPACE_AND_LINES)
            if self.at >= len(self.text):
                return self.found
            if self.text.startswith("[[", self.at):
                self.at += 2
                table = self._resolved(self._keys("]"), new_element=True)
                self._note(table)
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                table = self._resolved(self._keys("]"), new_element=False)
                self._note(table)
                self.at += 1
            else:
                self._assignment(table)

    def _assignment(self, table: Path) -> None:
        start = self.at
        path = table + self._keys("=")
        end, self.at = self.at, start
        self._note(path)
        self.at = end + 1
        self._skip(_SPACE)
        self._value(path)

    def _keys(self, closing: str) -> Path:
        """The dotted key up to `closing`, which is not consumed."""
        keys: list[str] = []
        while self.text[self.at] != closing:
            self._skip(_SPACE)
            if match := _STRING.match(self.text, self.at):
                keys.append(_unquoted(match.group()))
            elif match := _BARE_KEY.match(self.text, self.at):
                keys.append(match.group())
            else:  # a dot
                self.at += 1
                continue
            self.at = match.end()
            self._skip(_SPACE)
        return tuple(keys)

    def _value(self, path: Path) -> None:
        if match := _STRING.match(self.text, self.at):
            self.at = match.end()
        elif self.text[self.at] == "[":
            self._array(path)
        elif self.text[self.at] == "{":
            self._inline_table(path)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self.at += 1
        index = 0
        while True:
            self._skip(_SPACE_AND_LINES)
            if self.text[self.at] == "]":
                self.at += 1
                return
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self._note((*path, index))
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: Path) -> None:
        self.at += 1
        while True:
            self._skip(_SPACE_AND_LINES)
            if self.text[self.at] == "}":
                self.at += 1
                return
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self._assignment(path)

    def _resolved(self, keys: Path, *, new_element: bool) -> Path:
        """The path of a table header, with the index of the element where it passes through an array of tables."""
        path: Path = ()
        for position, key in enumerate(keys):
            path = (*path, key)
            if new_element and position == len(keys) - 1:
                self.lengths[path] = self.lengths.get(path, 0) + 1
            if path in self.lengths:
                path = (*path, self.lengths[path] - 1)
        return path

    def _note(self, path: Path) -> None:
        """Records the line of a path and of the tables that it implies."""
        line = self.text.count("\n", 0, self.at) + 1
        for length in range(1, len(path) + 1):
            self.found.setdefault(path[:length], line)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        assert match is not None, "every skipping pattern matches the empty text"
        self.at = match.end()


def _unquoted(key: str) -> str:
    if key[0] == "'":
        return key[1:-1]
    return re.sub(r"\\(.)", r"\1", key[1:-1])
