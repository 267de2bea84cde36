"""The plan of the house: who may import whom, how large things are, and that its pages are true."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "olmoearth_jax"

FLOORS = (
    ("ground",),
    ("masking", "losses"),
    ("model",),
    ("settings",),
    ("data", "stream"),
    ("checkpoints",),
    ("interop",),
    ("inference",),
    ("train",),
    ("checks",),
    ("evals",),
    ("maps",),
    ("door",),
)
"""From below; a room imports from lower floors and from itself."""

SINGLE = {
    "config": "settings",
    "config_files": "settings",
    "configlib": "settings",
    "check": "checks",
    "overrides": "checks",
    "__init__": "door",
    "__main__": "door",
    "commands": "door",
    "early": "door",
}
"""Modules and packages that are not the room of their own name; other modules are the ground."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts if parts[-1] != "__init__" else parts[:-1])] = path
    return found


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")[1:] or ["__init__"]
    own = (ROOT / PACKAGE / parts[0]).is_dir()
    return SINGLE.get(parts[0], parts[0] if own else "ground")


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that a module imports, also within its functions."""
    out = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                out.add(inner if inner in modules() else node.module)
        elif isinstance(node, ast.Import):
            out |= {a.name for a in node.names if a.name.startswith(PACKAGE)}
    return frozenset(out)


def test_imports_go_down_only():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        for other in imports(module)
        if room(other) != room(module) and floor[room(other)] >= floor[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_round():
    left = {m: {o for o in imports(m) if o in modules() and o != m} for m in modules()}
    while free := {m for m, others in left.items() if not others & left.keys()}:
        left = {m: others for m, others in left.items() if m not in free}
    assert not left, sorted(left)


def test_only_tools_need_tools():
    """Training and use rest neither on the oracle of the token stream nor on golden checks."""
    for top in (PACKAGE, "configs", "launch"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                assert not any(name.split(".")[0] == "tools" for name in names), path


def _sources() -> Iterator[Path]:
    for top in (PACKAGE, "configs", "launch", "tools"):
        yield from sorted((ROOT / top).rglob("*.py"))


def test_nothing_is_long():
    for path in (*_sources(), *sorted((ROOT / "tests").rglob("*.py"))):
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_public_names_say_what_they_are():
    missing = []
    for path in _sources():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(str(path))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}: {node.name}")
    # What every program, config file and group of recorded cases has says the module itself.
    said = ("main", "run", "cases", "changes", "sweep", "define_flags", "get_config", "execute")
    missing = [m for m in missing if m.rpartition(" ")[2] not in said]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_on_the_pages_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:olmoearth_jax|launch|tools|configs|tests|docs)/[\w./]+)`", text))
    assert len(named) > 10
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, missing
    for name, path in re.findall(r"`(\w+)` (?:in|of) `(\w[\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), (name, path)


def test_files_that_pages_name_exist():
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
    named = re.compile(r"`((?:olmoearth_jax|launch|tools|configs|tests|docs)/[\w./]+\.\w+)`")
    missing = [
        f"{page.name}: {name}"
        for page in pages
        for name in named.findall(page.read_text())
        if not (ROOT / name).exists()
    ]
    assert not missing, missing


def test_changes_are_local():
    """The table of docs/architecture.md names at most three files for each change."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = text.split("## Where do I change ...")[1].splitlines()
    rows = [row for row in rows if row.startswith("| ") and "files |" not in row]
    assert len(rows) >= 12
    for row in rows:
        assert len(re.findall(r"`olmoearth_jax/", row)) <= 3, row


def _packages() -> list[str]:
    inits = {p.parent.name: p.read_text() for p in (ROOT / PACKAGE).glob("*/__init__.py")}
    return sorted(name for name, text in inits.items() if "exported(" in text)


@pytest.mark.parametrize("package", _packages())
def test_what_a_package_gives_away_is_there(package):
    module = importlib.import_module(f"{PACKAGE}.{package}")
    names = dir(module)
    assert names
    for name in names:
        getattr(module, name)
        assert not name.startswith("_")
        # A module of that name would hide it, once it is imported.
        assert f"{PACKAGE}.{package}.{name}" not in modules()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_former_places_are_listed_and_hold_nothing():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"\| `([\w/]+\.py)` \| `([\w/]+\.py)` \|", text.split("## Former places")[1])
    listed = dict(rows)
    bare = []
    for path in _sources():
        body = ast.parse(path.read_text()).body[1:]
        only = body and all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)
        if only and path.name != "__init__.py":
            bare.append(path.relative_to(ROOT).as_posix())
    assert sorted(listed) == sorted(bare)
    for former, now in listed.items():
        assert (ROOT / now).exists(), now
        name = former.removesuffix(".py").replace("/", ".")
        users = [p for p in _sources() if re.search(rf"\b{name}\b(?! import)", p.read_text())]
        assert not users, users
        importlib.import_module(name)


def test_names_taken_from_packages_are_there():
    """Packages give their names away lazily, so that a type checker takes any name for one."""
    wrong = []
    folders = (PACKAGE, "launch", "tools", "tests")
    for path in [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            home = ROOT / node.module.replace(".", "/")
            if not node.module.startswith(PACKAGE) or not (home / "__init__.py").is_file():
                continue
            package = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                module = (home / f"{name}.py").is_file() or (home / name).is_dir()
                if not module and not hasattr(package, name):
                    wrong.append(f"{path.relative_to(ROOT)}: {node.module} has no {name}")
    assert not wrong
