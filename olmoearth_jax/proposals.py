"""What a mistyped name was meant to be, for error messages: slips of the hand, never of meaning.

No proposal is better than a wrong one. Numbers in names must agree ('B1' is 'B01' and never 'B12',
'sentinel3' is not 'sentinel1'), a word may differ by a slip and not by what another word looks
like, and where two names fit equally well none is proposed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_OPPOSITES = frozenset({("macro", "micro"), ("decoder", "encoder")})
"""Words that look like slips of each other and mean something else, sorted within a pair."""
_FILLERS = frozenset({"and", "of", "the"})


def closest(name: str, known: Iterable[str]) -> str:
    """Text that lists `known`, after the one that `name` was meant to be if that is certain."""
    known = [str(k) for k in known]
    near = nearest(name, known)
    hint = "" if near is None else f"did you mean {near!r}? "
    return f"{hint}known: {', '.join(known)}"


def known(kind: str, name: Any, names: Collection[Any]) -> Any:
    """`name` if it is one of `names`, else a ValueError that tells the nearest of them."""
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; {closest(name, names)}")
    return name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that differs from a name by spelling, a slip, or an end left out."""
    known, words = list(known), _words(name)
    if not words:
        return None
    for fits in (_same, _slip, _part):
        found = [k for k in known if fits(words, _words(k))]
        shortest = min(found, key=len, default=None)
        if shortest is not None and all(k.startswith(shortest) for k in found):
            return shortest
        if found:
            return None
    return None


def _words(name: str) -> list[str]:
    """Lower-case words of a name, without fillers and without zeros in front of numbers."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", str(name))
    words = re.split(r"[^a-z0-9]+", parted.lower())
    return [re.sub(r"(?<!\d)0+(?=\d)", "", w) for w in words if w and w not in _FILLERS]


def _numbers(words: Sequence[str]) -> list[str]:
    return re.findall(r"\d+", " ".join(words))


def _same(given: Sequence[str], known: Sequence[str]) -> bool:
    """Whether two names differ by case, separators or the order of words only."""
    return "".join(given) == "".join(known) or sorted(given) == sorted(known)


def _slip(given: Sequence[str], known: Sequence[str]) -> bool:
    """Whether two names differ by a slip in one place, and not in their numbers."""
    if _numbers(given) != _numbers(known) and _numbers(known):
        return False
    if len(given) != len(known):
        whole, meant = "".join(given), "".join(known)
        return len(whole) > 4 and _distance(whole, meant) == 1
    differing = [(g, k) for g, k in zip(given, known, strict=True) if g != k]
    if len(differing) != 1:
        return False
    word, meant = differing[0]
    if tuple(sorted((word, meant))) in _OPPOSITES:
        return False
    alone = len(given) == 1
    begins = word.startswith(meant) or meant.startswith(word)
    if begins and min(len(word), len(meant)) > 2 and not re.search(r"\d", word + meant):
        return True  # 'acc' and 'accuracy'
    if len(word) < 3 or (alone and len(word) < 5 and re.search(r"\d", word)):
        return False  # a code such as B8A
    if alone and len(word) == 3 == len(meant) and sorted(word) != sorted(meant):
        return False  # another letter makes another word
    return _distance(word, meant) <= (1 if len(word) < 9 else 2)


def _part(given: Sequence[str], known: Sequence[str]) -> bool:
    """Whether a name is the beginning of another; more digits would be another number."""
    text, whole = "".join(given), "".join(known)
    if len(text) < 3 or not whole.startswith(text):
        return False
    ends = {len("".join(known[: i + 1])) for i in range(len(known))}
    return len(text) in ends or (len(text) > 3 and not whole[len(text)].isdigit())


def _distance(a: str, b: str) -> int:
    """Letters to add, leave out, replace, or swap with their neighbour to make `b` of `a`."""
    older, old = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(old[j] + 1, new[-1] + 1, old[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                new[j] = min(new[j], older[j - 2] + 1)
        older, old = old, new
    return old[-1]
