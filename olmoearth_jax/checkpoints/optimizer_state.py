"""The form in which the state of an optimiser is stored, whatever optax makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from olmoearth_jax.mesh import path_text

_MOMENT = re.compile(r"\d+/inner_states/\w+/inner_state/\d+/(count|mu|nu)((?:/.+)?)")
_STORED = {"count": "count", "mu": "m", "nu": "v"}


def stored(state: Any) -> Any:
    """The state as checkpoints hold it: {'count': int32, 'm': nested, 'v': nested}.

    It depends neither on the groups of parameters nor on optax. Any state that consists of
    mappings is returned as it is.
    """
    if isinstance(state, Mapping):
        return state
    leaves = {_stored_path(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return unflatten_dict(leaves, sep="/")


def from_stored(found: Any, like: Any) -> Any:
    """The state of the form of `like` from what `stored` gives; groups share the one count."""
    if isinstance(like, Mapping):
        return found
    leaves = flatten_dict(found, sep="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_stored_path(path)], like)


def _stored_path(path: tuple) -> str:
    found = _MOMENT.fullmatch(path_text(path))
    assert found is not None, f"not a state of AdamW: {path_text(path)}"
    return _STORED[found[1]] + found[2]
