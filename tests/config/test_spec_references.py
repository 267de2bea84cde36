"""Every place of the specification that code or documents cite exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "docs" / "spec"
_CITED = re.compile(
    r"spec/(?P<file>\w+)\.(?P<kind>md|json)"
    r"(?:,?\s+(?:#\s+)?(?:(?:sections?|quirks?)\s+(?:#\s+)?)?(?P<place>Q\d+|\d+[a-z]?(?:\.\d+)?))?"
)


def citations(text):
    """(file, kind, place or None) of every citation of a text; a line break may be within."""
    return [(m["file"], m["kind"], m["place"]) for m in _CITED.finditer(text)]


def sources():
    for folder in ("olmoearth_jax", "launch", "tools", "configs", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md") and SPEC not in path.parents:
                yield path


def places(page):
    """Numbers of the sections and quirks that a page of the specification has."""
    text = page.read_text()
    sections = re.findall(r"^#+ (\d+[a-z]?(?:\.\d+)?)\.? ", text, re.MULTILINE)
    return {*sections, *re.findall(r"\bQ\d+\b", text)}


def test_citations_are_found_in_every_form():
    text = "spec/a.md section 3.2, spec/b.md\n  section 4; spec/c.md Q8 (spec/d.json) spec/e.md 9a"
    want = [("a", "md", "3.2"), ("b", "md", "4"), ("c", "md", "Q8"), ("d", "json", None)]
    assert citations(text) == [*want, ("e", "md", "9a")]


def test_a_section_that_is_missing_is_noticed():
    assert "3.1" in places(SPEC / "train.md")
    assert "99" not in places(SPEC / "train.md")


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_cited_places_exist(path):
    for file, kind, place in citations(path.read_text()):
        page = SPEC / f"{file}.{kind}"
        assert page.is_file(), f"cites {page.name}, which docs/spec lacks"
        if place:
            assert place in places(page), f"cites {place} of {page.name}"


def test_links_between_the_pages_resolve():
    for page in SPEC.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
