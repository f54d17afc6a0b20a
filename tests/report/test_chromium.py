"""The page in a real browser: it shows every section, asks the network for nothing, and has no complaint."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.browser import CHROMIUM, browser
from tests.report.runs import event, make_folder, whole_run
from tests.report.test_html import SECTIONS

from weft.report.html import write_report

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_chromium(tmp_path: Path, width: int, dark: bool) -> None:
    long = "a long warning of one_word_that_does_not_break_" * 5
    events = [*whole_run(workers=3, steps=200), event("warning", 1.0, text=long)]
    page = write_report(make_folder(tmp_path / "run", events, workers=3, steps=200).path)
    with browser(tmp_path / "profile") as chromium:
        chromium.open(page, width, dark=dark)
        text = chromium.value("document.body.innerText")
        assert chromium.requests == [page.as_uri()]
        assert chromium.complaints == []
        for section in SECTIONS:
            assert section in text
        assert chromium.value("document.documentElement.scrollWidth") <= width, "it must not scroll sideways"
        background = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
        drawn = "[...document.querySelectorAll('svg .line')].map(p => p.getTotalLength()).filter(n => n > 0).length"
        assert chromium.value(drawn) >= 4, "curves are drawn"
        fonts = "Math.min(...[...document.querySelectorAll('.plot span')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
        assert chromium.value(fonts) >= 11, "labels keep their size on a phone"
        cut = (
            "[...document.querySelectorAll('.plot .y span')].map(e => e.getBoundingClientRect())"
            ".filter(r => r.width && r.left < 0).length"
        )
        assert chromium.value(cut) == 0, "no label of an axis is cut off"


def test_the_checks_can_fail(tmp_path: Path) -> None:
    """A page that asks the network and raises: the browser must tell."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("oh"); nowhere()</script>')
    with browser(tmp_path / "profile") as chromium:
        chromium.open(page, 800)
        assert len(chromium.requests) == 2
        assert len(chromium.complaints) >= 2
