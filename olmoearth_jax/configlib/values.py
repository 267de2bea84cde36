"""The value grammar of overrides: a small part of YAML (spec/train.md section 7.1).

It gives lists, mappings and texts. What a text stands for depends on the setting that it is given
to: `configlib.schema` decides it by the annotation, with `scalar` and `unquoted`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)
_SINGLE = re.compile(r"'((?:[^']|'')*)'")
_JSON = json.JSONDecoder(strict=False)
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False,
          "null": None, "none": None, "~": None}  # fmt: skip
_MOST_DIGITS = 1000
"""Longer numbers are read as floats: infinite ones, which no setting takes."""
_CLOSE = {"[": "]", "(": ")", "{": "}"}


def unquoted(text: str) -> str | None:
    """What stands between the quotes of a quoted text; None for any other."""
    if text[:1] == '"':
        return _JSON.decode(text)
    return text[1:-1].replace("''", "'") if text[:1] == "'" else None


def scalar(text: str) -> Any:
    """Python value of a text: null, bool, int, float, or text if it is quoted or nothing else."""
    inside = unquoted(text)
    if inside is not None:
        return inside
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text) and len(text) < _MOST_DIGITS:
        return int(text)
    special = _SPECIAL.fullmatch(text)
    if special:
        return float(special[1] + special[2])
    return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text


class _Reader:
    """Recursive descent over one value."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def fail(self, wanted: str) -> ValueError:
        return ValueError(f"{self.text!r} is not a valid value: {wanted} at character {self.at}")

    def peek(self) -> str:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        start = self.peek()
        if start in ("[", "("):
            return self.items(_CLOSE[start], self.value)
        if start == "{":
            return dict(self.items("}", self.pair))
        return self.word(",])}")

    def items(self, close: str, read: Callable[[], Any]) -> list[Any]:
        self.at += 1
        out: list[Any] = []
        while self.peek() != close:
            out.append(read())
            if self.peek() not in (",", close):
                raise self.fail(f"expected ',' or {close!r}")
            self.at += self.peek() == ","
        self.at += 1
        return out

    def pair(self) -> tuple[str, Any]:
        key = self.word(":,])}")
        if self.peek() != ":":
            raise self.fail("expected ':'")
        self.at += 1
        inside = unquoted(key)
        return key if inside is None else inside, self.value()

    def word(self, stops: str) -> str:
        """Text up to one of `stops`, or a quoted text with its quotes."""
        quote, start = self.peek(), self.at
        if quote == '"':
            try:
                self.at = _JSON.raw_decode(self.text, self.at)[1]
            except json.JSONDecodeError as e:
                raise self.fail("unfinished quoted text") from e
            return self.text[start : self.at]
        if quote == "'":
            found = _SINGLE.match(self.text, self.at)
            if not found:
                raise self.fail("unfinished quoted text")
            self.at = found.end()
            return found[0]
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            raise self.fail("expected a value")
        return word


def parse(text: str) -> Any:
    """The value written as `text`: nested lists and mappings of texts, quoted ones as they are.

    Lists are [a, b] or (a, b), mappings {k: v}; quoted text is never read as a number or a bool.

    Raises:
      ValueError: brackets or quotes do not match, or lie too deep in each other.
    """
    text = text.strip()
    if text[:1] not in (*_CLOSE, "'", '"'):
        return text
    reader = _Reader(text)
    try:
        value = reader.value()
    except RecursionError:
        raise ValueError("its lists or mappings lie too deep in each other") from None
    if reader.peek():
        raise reader.fail("unexpected text")
    return value


def plain(value: Any) -> Any:
    """What `parse` gave as plain Python values: None, bool, int, float, str, list or dict."""
    if isinstance(value, str):
        return scalar(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def parse_value(text: str) -> Any:
    """`parse` as plain Python values: None, bool, int, float, str, list or dict."""
    return plain(parse(text))


def format_value(value: Any) -> str:
    """Text that `parse_value` reads back as `value`."""
    return json.dumps(value, ensure_ascii=False)


DEEPEST = 64
"""Levels of lists and mappings in each other that a config may have."""


def too_deep(tree: Any) -> bool:
    """Whether lists and mappings lie deeper in each other than any config needs."""
    level = [tree]
    for _ in range(DEEPEST):
        level = [
            item
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for item in (node.values() if isinstance(node, Mapping) else node)
        ]
        if not level:
            return False
    return True
