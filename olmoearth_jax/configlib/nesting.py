"""How deep lists and mappings of a config may lie in each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEEPEST = 64
"""Levels of lists and mappings in each other."""


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
