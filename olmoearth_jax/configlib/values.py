"""The value grammar of overrides: a small part of YAML (spec/train.md section 7.1)."""

from __future__ import annotations

import json
import re
from typing import Any

from olmoearth_jax.configlib.schema import Text

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)
_JSON = json.JSONDecoder(strict=False)
_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_NULL = {"null", "none", "~"}


def scalar(text: str) -> Any:
    """Python value of an unquoted word: null, bool, int, float or the text itself."""
    word = text.lower()
    if word in _NULL:
        return None
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    if _INT.fullmatch(text):
        return int(text)
    special = _SPECIAL.fullmatch(text)
    if special:
        return float(special.group(1) + special.group(2))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


class _Reader:
    """Recursive descent over one value."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def fail(self, wanted: str) -> ValueError:
        return ValueError(f"{self.text!r} is not a valid value: {wanted} at character {self.at}")

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        self.space()
        return self.text[self.at : self.at + 1]

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.fail(f"expected {mark!r}")
        self.at += 1

    def value(self) -> Any:
        start = self.peek()
        if start == "[":
            return self.items("]", self.value)
        if start == "{":
            return dict(self.items("}", self.pair))
        if start in ("'", '"') and start:
            word = self.quoted()
            return Text(word, word)
        word = self.word(",]}")
        return Text(word, scalar(word))

    def items(self, close: str, read: Any) -> list[Any]:
        self.at += 1
        out: list[Any] = []
        while self.peek() != close:
            out.append(read())
            if self.peek() != close:
                self.take(",")
        self.at += 1
        return out

    def pair(self) -> tuple[str, Any]:
        key = self.quoted() if self.peek() in ("'", '"') else self.word(":,]}")
        self.take(":")
        return key, self.value()

    def word(self, stops: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            raise self.fail("expected a value")
        return word

    def quoted(self) -> str:
        start, quote = self.at, self.text[self.at]
        if quote == '"':
            try:
                word, self.at = _JSON.raw_decode(self.text, start)
            except json.JSONDecodeError as e:
                raise self.fail("unfinished quoted text") from e
            return word
        found = re.compile(r"'((?:[^']|'')*)'").match(self.text, start)
        if not found:
            raise self.fail("unfinished quoted text")
        self.at = found.end()
        return found.group(1).replace("''", "'")


def parse(text: str) -> Any:
    """The value written as `text`; scalars come as `Text`, so that a name like `on` stays one.

    Lists are [a, b], mappings {k: v}; quoted text is never read as a number or a bool.

    Raises:
      ValueError: brackets or quotes do not match.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", "'", '"'):
        return Text(text, scalar(text))
    reader = _Reader(text)
    value = reader.value()
    reader.space()
    if reader.at != len(text):
        raise reader.fail("unexpected text")
    return value


def parse_value(text: str) -> Any:
    """`parse` as plain Python values: None, bool, int, float, str, list or dict."""
    from olmoearth_jax.configlib.schema import plain

    return plain(parse(text))


def format_value(value: Any) -> str:
    """Text that `parse_value` reads back as `value`."""
    return json.dumps(value, ensure_ascii=False)
