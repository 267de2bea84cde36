"""The table of all config paths in docs/configuration.md, made from the config classes.

python -m tools.config_table docs/configuration.md     # rewrites the table in place
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.official import official
from olmoearth_jax.overrides import ALIASES

BEGIN, END = "<!-- paths: generated -->", "<!-- paths: end -->"


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Member -> the text below it in the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    out = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if text and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            out[node.target.id] = " ".join(str(after.value.value).split())  # pyright: ignore
    return out


def rows(cls: type, value: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(path, type, value in the official base v1 config, meaning) of every leaf."""
    out = []
    for name, hint in schema.hints(cls).items():
        path, doc = prefix + name, _field_docs(cls).get(name, "")
        now = getattr(value, name) if value is not None else None
        inner, _ = schema.strip_optional(hint)
        item = get_args(inner)[1] if get_origin(inner) is dict else None
        if dataclasses.is_dataclass(inner):
            if doc:
                out.append((path, schema.describe(hint), _text(now), doc))
            out += rows(inner, now, path + ".")  # pyright: ignore[reportArgumentType]
        elif dataclasses.is_dataclass(item):
            out += rows(item, item(), f"{path}.<name>.")  # pyright: ignore
        else:
            out.append((path, schema.describe(hint), _text(now), doc))
    return out


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "(below)"
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= 40 else f"{len(value)} entries"


def _table() -> str:
    """The Markdown text between the marks."""
    lines = ["| path | takes | base v1 | meaning |", "|---|---|---|---|"]
    for row in rows(ExperimentConfig, official("base")):
        cells = [c.replace("|", "\\|") for c in row]
        lines.append(f"| `{cells[0]}` | {cells[1]} | {cells[2]} | {cells[3]} |")
    lines += ["", "Other names of settings:", "", "| alias | stands for |", "|---|---|"]
    lines += [f"| `{alias}` | `{target}` |" for alias, target in ALIASES.items()]
    return "\n".join(lines)


def updated(text: str) -> str:
    """`text` with the part between the marks replaced by `_table`."""
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n{_table()}\n{END}{tail}"


if __name__ == "__main__":
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md")
    page.write_text(updated(page.read_text()))
