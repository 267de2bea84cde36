"""Pages in a browser without a window: what they ask for, and the sizes of their pictures."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_BROWSER = next(filter(None, map(shutil.which, _NAMES)), "")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_OWN = "not an origin"
"""Who asks, in the browser's log, where it is the browser itself: for its clock, its dictionary."""
_SIZES = """<script>onload = () => document.body.setAttribute("data-sizes", JSON.stringify(
[...document.images].map(i => [i.naturalWidth, i.naturalHeight])))</script>"""

needs_browser = pytest.mark.skipif(not _BROWSER, reason="no Chromium on PATH")


class Shown(NamedTuple):
    """What became of a page.

    Attributes:
      asked: addresses that the page asked for.
      pictures: (width, height) of each `img`; 0 where it could not be drawn.
      screenshot: a PNG file.
    """

    asked: list[str]
    pictures: list[tuple[int, int]]
    screenshot: Path


def show(page: Path, folder: Path) -> Shown:
    """Opens a page; writes to an empty folder."""
    log, shot, copy = folder / "net.json", folder / "shot.png", folder / "page.html"
    copy.write_text(page.read_text() + _SIZES)
    base = [_BROWSER, *_FLAGS, f"--user-data-dir={folder / 'profile'}"]
    taken = [f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=1000,3000"]
    for arguments in ([*taken, page.as_uri()], ["--dump-dom", copy.as_uri()]):
        done = subprocess.run([*base, *arguments], check=True, capture_output=True, timeout=120)
    held = json.loads(log.read_text())
    kind = held["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [
        event["params"]["url"]
        for event in held["events"]
        if event["type"] == kind and event.get("params", {}).get("initiator", _OWN) != _OWN
    ]
    sizes = re.search(r'data-sizes="([^"]*)"', done.stdout.decode())
    assert sizes is not None
    return Shown(asked, [(w, h) for w, h in json.loads(sizes[1])], shot)
