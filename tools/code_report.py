"""Counts the code: lines, files, functions, parameters, public names, cycles of imports.

    python -m tools.code_report                  # a table
    python -m tools.code_report --root=../other  # of another checkout

Code lines leave out blank lines, comments and docstrings. `tools` is counted without its golden
checks and benchmarks. Imports within functions count for cycles too; imports for type checkers do
not.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import flags

from olmoearth_jax import commands

FOLDERS = ("olmoearth_jax", "launch", "tools")
LEFT_OUT = ("tools/goldens", "tools/bench")
LONG_FUNCTION, LONG_FILE, MANY_PARAMETERS = 60, 500, 6
_SPACE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
    """One file: its dotted name, its path, its text and its syntax tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def modules(root: Path, folders: tuple[str, ...] = FOLDERS) -> list[Module]:
    """Every Python file of the folders, sorted by name."""
    out = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root)
            if str(place).startswith(LEFT_OUT):
                continue
            parts = place.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text()
            out.append(Module(name, path, text, ast.parse(text)))
    return out


def code_lines(module: Module) -> int:
    """Lines that hold something else than blanks, comments and docstrings."""
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in _SPACE and token.type != tokenize.ENDMARKER:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        # A string that stands for itself is a docstring, of a module, class, function or name.
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            held.difference_update(range(value.lineno, (value.end_lineno or 0) + 1))
    return len(held)


def functions(module: Module) -> list[Function]:
    """Every function and method."""
    return [n for n in ast.walk(module.tree) if isinstance(n, Function)]


def parameters(function: Function) -> int:
    """Parameters of a function without self and cls."""
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls")])


def public_names(module: Module) -> list[str]:
    """Functions and classes of a module whose name does not begin with an underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in module.tree.body if isinstance(n, kinds) and n.name[0] != "_"]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


def imports(module: Module, known: Mapping[str, Module]) -> set[str]:
    """The modules of `known` that a module imports, wherever it does so."""
    found = set()
    for node in _statements(module.tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                up = len(parts) - node.level + module.is_package
                base = ".".join([*parts[:up], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {name for name in found if name in known and name != module.name}


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected, two or more)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                out.append(sorted(group))

    for node in sorted(edges):
        if node not in number:
            visit(node)
    return out


def report(root: Path) -> dict:
    """The figures of a checkout, for each folder and for all."""
    found = modules(root)
    known = {m.name: m for m in found}
    edges = {m.name: imports(m, known) for m in found}
    parts = {}
    for folder in FOLDERS:
        inside = [m for m in found if m.name.split(".")[0] == folder]
        defs = [f for m in inside for f in functions(m)]
        many = [f for f in defs if parameters(f) >= MANY_PARAMETERS]
        parts[folder] = {
            "files": len(inside),
            "code_lines": sum(map(code_lines, inside)),
            "lines": sum(len(m.text.splitlines()) for m in inside),
            "functions": len(defs),
            "public_names": sum(len(public_names(m)) for m in inside),
            f"functions_of_{MANY_PARAMETERS}_or_more_parameters": len(many),
            f"functions_over_{LONG_FUNCTION}_lines": sum(
                (f.end_lineno or 0) - f.lineno + 1 > LONG_FUNCTION for f in defs
            ),
            f"files_over_{LONG_FILE}_lines": sum(
                len(m.text.splitlines()) > LONG_FILE for m in inside
            ),
        }
    parts["together"] = {key: sum(p[key] for p in parts.values()) for key in parts[FOLDERS[0]]}
    return {"parts": parts, "cycles": cycles(edges)}


def main(argv: list[str]) -> None:
    """Prints the table, then the cycles."""
    del argv
    found = report(Path(flags.FLAGS.root))
    if flags.FLAGS.json:
        print(json.dumps(found))
        return
    parts = found["parts"]
    wide = max(map(len, parts["together"]))
    print(" " * wide, *(f"{name:>14}" for name in parts))
    for key in parts["together"]:
        print(f"{key:{wide}}", *(f"{p[key]:14}" for p in parts.values()))
    for group in found["cycles"]:
        print("cycle:", ", ".join(group))


if __name__ == "__main__":
    flags.DEFINE_string("root", ".", "Folder of the checkout.")
    flags.DEFINE_bool("json", False, "One JSON line.")
    commands.run(main)
