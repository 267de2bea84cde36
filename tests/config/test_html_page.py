"""Parts of the pages that runs and maps write."""

import math
import re

import pytest

from olmoearth_jax import html_page, outputs


def test_a_page_carries_the_mark_and_shows_texts_as_they_are(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(html_page.document("<a> & b", ["<p>x</p>", "", "<p>y</p>"]))
    text = path.read_text()
    assert outputs.is_ours(path) and "<a>" not in text and "&lt;a&gt; &amp; b" in text
    assert "<p>x</p>\n<p>y</p>" in text


def test_columns_of_numbers_are_marked():
    text = html_page.table(["a", "b", "c"], [["x", "1", "2"]], words=1)
    assert text.count('<td class="n">') == 2 and text.count('<th class="n">') == 2
    with pytest.raises(ValueError, match="zip"):
        html_page.table(["a"], [["x", "1"]])


@pytest.mark.parametrize("few", [[], [(1, 2.0)], [(1, 2.0), (2, math.nan), (3, math.inf)]])
def test_too_few_values_make_no_curve(few):
    assert html_page.curve("loss", few, "step") == ""


@pytest.mark.parametrize("number", [2, 399, 400, 401, 799, 1000, 50_000])
def test_a_long_curve_keeps_its_ends(number):
    text = html_page.curve("a<b", [(n, float(n)) for n in range(number)], "step", marked=1)
    line = re.search(r'points="([^"]+)"', text)
    assert line
    points = line[1].split()
    assert points[0] == "70.0,130.0" and points[-1] == "410.0,20.0"
    assert len(points) <= 800 and len(set(points)) == len(points)
    assert "a<b" not in text and text.count("<circle") == 1
