"""Reads pickles of plain data without Python's own unpickler.

That one calls what a file names, on arguments and states that the file gives, and so lets a file
build objects that reach memory which is not theirs. Here the operations are walked one by one on a
stack of our own: containers, numbers, texts, and the few makers that a format needs. Everything
else is refused, so nothing in a file can run code, and nothing is larger than the file.
"""

from __future__ import annotations

import abc
import pickletools
from collections.abc import Callable
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
_MOST_STEPS = 2_000_000
"""Each operation may take a byte and make an object of hundreds."""
_MOST_COPIES = 8
"""What makers are given, the same thing again and again included, has at most so many times the
length of the pickle."""
_LARGEST_KEY = 2**60
"""Larger numbers can be chosen so that all have one hash."""


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


class Stateful(abc.ABC):
    """Base of stand-ins that take a state after they were made.

    `with_state` returns what stands in the pickle from then on. With `unfinished` it must be
    something else, and a pickle that ends before that is damaged.
    """

    unfinished = False

    @abc.abstractmethod
    def with_state(self, state: Any) -> Any:
        """What stands in the pickle after `state` was given to this stand-in."""


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
        self._room = 0
        self._memo: dict[int, Any] = {}
        self._places: dict[int, list[int]] = {}  # in the memo, of each unfinished object
        self._unfinished: dict[int, Stateful] = {}  # by id; kept, so that no id is used twice

    def load(self, data: bytes) -> Any:
        """The value of a pickle.

        Raises:
          PickleRefused: it asks for more than plain data.
          PickleDamaged: anything else that is wrong with it.
        """
        self._room = _MOST_COPIES * len(data) + (1 << 20)
        try:
            for number, (code, argument, _) in enumerate(pickletools.genops(data)):
                if code.name == "STOP":
                    break
                if number == _MOST_STEPS:
                    raise PickleRefused("it has far more parts than data of its kind")
                self._step(code.name, argument)
            (value,) = self._stack
        except PickleRefused:
            raise
        except ValueError as error:
            raise PickleDamaged(str(error) or "its operations make no sense") from None
        except Exception:
            # Damaged operations raise whatever their bytes happen to spell.
            raise PickleDamaged("its operations make no sense") from None
        if value is _MARK or isinstance(value, Maker) or self._unfinished:
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
            self._put(len(self._memo) if code == "MEMOIZE" else int(argument))
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

    def _put(self, place: int) -> None:
        target = self._stack[-1]
        if target is _MARK:
            raise PickleDamaged("a mark is kept")
        self._memo[place] = target
        if id(target) in self._unfinished:
            self._places.setdefault(id(target), []).append(place)

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

    def _item(self) -> Any:
        item = self._stack.pop()
        if item is _MARK:
            raise PickleDamaged("an operation has too few items")
        return item

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
        # Not `in`, which compares, and arrays compare by elements.
        if len(items) < count or any(item is _MARK for item in items):
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
        self._extend([self._item()])

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
        self._stack[-1].update(map(plain_key, items))

    def _frozenset(self) -> None:
        self._stack.append(frozenset(map(plain_key, self._marked())))

    def _setitem(self) -> None:
        value, key = self._item(), self._item()
        self._fill([key, value])

    def _setitems(self) -> None:
        self._fill(self._marked())

    def _fill(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise PickleRefused("it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[plain_key(key)] = value

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
        self._spend(arguments)
        made = maker.make(*arguments)
        if isinstance(made, Stateful) and type(made).unfinished:
            self._unfinished[id(made)] = made
        self._stack.append(made)

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is dict:
            return  # what an ordered dict of weights keeps beside its items
        if not isinstance(target, Stateful):
            raise PickleRefused(f"it sets the state of a {type(target).__name__}")
        self._spend(state if type(state) is tuple else (state,))
        made = type(target).with_state(target, state)
        if made is not target:
            self._stack[-1] = made
            for place in self._places.pop(id(target), ()):
                self._memo[place] = made
            self._unfinished.pop(id(target), None)

    def _spend(self, given: tuple) -> None:
        """Counts what a maker may copy: a few bytes can ask for the same large thing again."""
        self._room -= 8 * len(given)
        for part in given:
            if isinstance(part, str | bytes | bytearray):
                self._room -= len(part)
            elif isinstance(part, tuple | list | dict | set | frozenset):
                self._room -= 8 * len(part)
        if self._room < 0:
            raise PickleRefused("it makes far more of its parts than data of its kind")

    def _binpersid(self) -> None:
        if self._persistent is None:
            raise PickleRefused("it asks for something outside of itself")
        self._stack.append(self._persistent(self._stack.pop()))


def shown(value: Any) -> str:
    """A text of a pickle for a message. Anything else only by its type: a few bytes can hold
    lists within lists that would take for ever to print."""
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def plain_key(value: Any) -> Any:
    """A key of a dict or set. Hashing nested ones could take for ever, or all of the stack."""
    parts = value if type(value) is tuple else (value,)
    if not all(isinstance(p, _KEYS) for p in parts):
        raise PickleRefused(f"a {type(value).__name__} is a key")
    numbers = [p for p in parts if isinstance(p, int | float)]
    # Two numbers of a tuple, too, can be chosen so that all have one hash.
    if len(numbers) > 1 or any(isinstance(p, int) and abs(p) > _LARGEST_KEY for p in numbers):
        raise PickleRefused("a huge number, or several, are a key")
    return value
