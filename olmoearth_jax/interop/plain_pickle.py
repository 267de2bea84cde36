"""Reads pickles of plain data without Python's own unpickler.

That one calls what a file names, on arguments and states that the file gives, and so lets a file
build objects that reach memory which is not theirs. Here the operations are walked one by one on a
stack of our own: containers, numbers, texts, and the few makers that a format needs. Everything
else is refused, so nothing in a file can run code, and nothing is larger than the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_KEYS = (str, bytes, int, float, bool, type(None))


class PickleRefused(ValueError):
    """A pickle asks for something that data of its kind never needs."""


class PickleDamaged(ValueError):
    """A pickle that is cut off, or whose operations make no sense."""


class Maker:
    """A name of a pickle that may be called; the only thing of a reader that can be.

    Attributes:
      name: as the pickle writes it.
      make: takes the arguments.
    """

    def __init__(self, name: str, make: Callable[..., Any]):
        self.name, self.make = name, make


class Stateful:
    """Base of stand-ins that take a state after they were made.

    `with_state` returns what stands in the pickle from then on.
    """

    def with_state(self, state: Any) -> Any:
        raise NotImplementedError


class PlainReader:
    """Interprets one pickle.

    Args:
      find: (module, name) -> what a name stands for: a `Maker`, or a value. Raises PickleRefused.
      persistent: what a persistent id stands for.
    """

    def __init__(
        self, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None
    ):
        self._find, self._persistent = find, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self, data: bytes) -> Any:
        """The value of a pickle.

        Raises:
          PickleRefused: it asks for more than plain data.
          PickleDamaged: anything else that is wrong with it.
        """
        try:
            for code, argument, _ in pickletools.genops(data):
                if code.name == "STOP":
                    break
                self._step(code.name, argument)
            (value,) = self._stack
        except PickleRefused:
            raise
        except Exception as error:
            # Damaged operations raise whatever their bytes happen to spell.
            raise PickleDamaged(str(error) or type(error).__name__) from None
        if isinstance(value, Maker) or getattr(value, "unfinished", False):
            raise PickleDamaged("it names something and makes nothing of it")
        return value

    def _step(self, code: str, argument: Any) -> None:
        stack = self._stack
        if code in _VALUES:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _PUTS:
            self._memo[len(self._memo) if code == "MEMOIZE" else int(argument)] = stack[-1]
        elif code in _GETS:
            stack.append(self._memo[int(argument)])
        elif code == "MARK":
            stack.append(_MARK)
        elif code == "GLOBAL":
            stack.append(self._find(*argument.split(" ", 1)))
        elif code not in ("PROTO", "FRAME"):
            done = getattr(self, f"_{code.lower()}", None)
            if done is None:
                raise PickleRefused(f"it holds the operation {code}, which plain data never need")
            done()

    def _marked(self) -> list[Any]:
        """The items above the last mark, taken off with it."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleDamaged("a mark is missing")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _tuple(self) -> None:
        self._stack.append(tuple(self._marked()))

    def _tuple1(self) -> None:
        self._take(1)

    def _tuple2(self) -> None:
        self._take(2)

    def _tuple3(self) -> None:
        self._take(3)

    def _take(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count or _MARK in items:
            raise PickleDamaged("a tuple has too few items")
        self._stack[-count:] = [items]

    def _list(self) -> None:
        self._stack.append(self._marked())

    def _dict(self) -> None:
        items = self._marked()
        self._stack.append({})
        self._fill(items)

    def _pop(self) -> None:
        self._stack.pop()

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise PickleRefused("it appends to something that is no list")
        self._stack[-1].extend(items)

    def _additems(self) -> None:
        items = self._marked()
        if type(self._stack[-1]) is not set:
            raise PickleRefused("it adds to something that is no set")
        self._stack[-1].update(map(_key, items))

    def _frozenset(self) -> None:
        self._stack.append(frozenset(map(_key, self._marked())))

    def _setitem(self) -> None:
        pair = self._stack[-2:]
        del self._stack[-2:]
        self._fill(pair)

    def _setitems(self) -> None:
        self._fill(self._marked())

    def _fill(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise PickleRefused("it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleDamaged("a name is no text")
        self._stack.append(self._find(module, name))

    def _reduce(self) -> None:
        arguments, maker = self._stack.pop(), self._stack.pop()
        self._call(maker, arguments)

    def _newobj(self) -> None:
        self._reduce()

    def _call(self, maker: Any, arguments: Any) -> None:
        if not isinstance(maker, Maker):
            raise PickleRefused(f"it calls a {type(maker).__name__}")
        if type(arguments) is not tuple:
            raise PickleDamaged(f"the arguments of {maker.name} are no tuple")
        self._stack.append(maker.make(*arguments))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is dict:
            return  # what an ordered dict of weights keeps beside its items
        if not isinstance(target, Stateful):
            raise PickleRefused(f"it sets the state of a {type(target).__name__}")
        made = target.with_state(state)
        if made is not target:
            self._stack[-1] = made
            for key in [k for k, v in self._memo.items() if v is target]:
                self._memo[key] = made

    def _binpersid(self) -> None:
        if self._persistent is None:
            raise PickleRefused("it asks for something outside of itself")
        self._stack.append(self._persistent(self._stack.pop()))


def _key(value: Any) -> Any:
    """A key of a dict or set; nested ones could take for ever to be hashed."""
    parts = value if type(value) is tuple else (value,)
    if not all(isinstance(p, _KEYS) for p in parts):
        raise PickleRefused(f"a {type(value).__name__} is a key")
    return value


def names(table: Mapping[tuple[str, str], Callable[..., Any]], why: str) -> Callable:
    """A `find` for `PlainReader` that knows the makers of a table and refuses the rest.

    Args:
      table: makers by (module, name).
      why: end of the message, such as "which tensors never need".
    """

    def find(module: str, name: str) -> Any:
        if (module, name) not in table:
            raise PickleRefused(f"it asks for {module}.{name}, {why}")
        return Maker(f"{module}.{name}", table[module, name])

    return find
