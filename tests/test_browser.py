"""The browser of the tests sees what a page asks for."""

import pytest

from tests.browser import needs_browser, show


@pytest.mark.slow
@needs_browser
def test_a_page_that_asks_for_more_is_seen(tmp_path):
    page = tmp_path / "p.html"
    page.write_text('<html><body><img src="http://127.0.0.1:9/x.png"></body></html>')
    (tmp_path / "out").mkdir()
    got = show(page, tmp_path / "out")
    assert got.asked == ["http://127.0.0.1:9/x.png"] and got.pictures == [(0, 0)]
