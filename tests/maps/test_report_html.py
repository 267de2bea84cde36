"""The page of a run and its map."""

import base64
import html.parser
import re
import struct

import numpy as np
import pytest

from olmoearth_jax.maps import fine_tuning, predicting, report_html
from olmoearth_jax.maps.fine_tuning import ImageOptions
from olmoearth_jax.maps.labelled import LabelOptions
from tests.browser import needs_browser, show
from tests.maps import world
from tests.maps.test_finetune import options, quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = world.build(tmp_path_factory.mktemp("world"))
    fine_tuning.run(options(out, out / "run"), quiet)
    images = ImageOptions(str(out / "imagery.csv"))
    predicting.run(predicting.Options(str(out / "run"), images, str(out / "map")), quiet)
    return out


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]


def _alone(text):
    """Nothing on the page comes from elsewhere, and nothing runs."""
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "a"} & set(page.tags)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text and "http" not in text
    return page


def test_the_page_of_a_run_stands_alone(folder):
    page = _alone((folder / "run" / "report.html").read_text())
    assert page.tags.count("svg") >= 4 and "img" not in page.tags  # no map yet


def test_the_page_of_a_map_shows_it(folder):
    text = (folder / "map" / "report.html").read_text()
    page = _alone(text)
    assert page.tags.count("img") == 1 and "hectares" in text
    data = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24]) == (256, 256)
    for name in world.NAMES:
        assert name in text


def test_names_of_classes_cannot_break_the_page(folder):
    source = (folder / "fields.geojson").read_text().replace("water", "<script>alert(1)</script>")
    (folder / "odd.geojson").write_text(source)
    fine_tuning.run(options(folder, folder / "odd", "odd.geojson"), quiet)
    _alone((folder / "odd" / "report.html").read_text())


def test_values_have_a_page_too(folder):
    labels = LabelOptions(str(folder / "plots.geojson"), value_column="height", block="640")
    fine_tuning.run(options(folder, folder / "values", labels=labels), quiet)
    images = ImageOptions(str(folder / "imagery.csv"))
    o = predicting.Options(str(folder / "values"), images, str(folder / "heights"))
    predicting.run(o, quiet)
    text = (folder / "heights" / "report.html").read_text()
    page = _alone(text)
    assert page.tags.count("img") == 1 and page.tags.count("circle") > 20 and "rmse" in text


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_it_and_fetches_nothing(folder, tmp_path):
    got = show(folder / "map" / "report.html", tmp_path)
    assert got.asked == [] and got.pictures == [(256, 256)]
    assert got.screenshot.stat().st_size > 20_000


def test_a_confusion_matrix_of_many_classes_has_no_numbers():
    """Nobody could read them, and a hundred classes have ten thousand."""
    for size, numbered in ((40, True), (41, False)):
        counts = np.eye(size, dtype=int).tolist()
        text = report_html._confusion([f"c{i}" for i in range(size)], counts)
        assert ("100%" in text) == numbered
        assert text.count("<rect") == (size * size if numbered else size)
