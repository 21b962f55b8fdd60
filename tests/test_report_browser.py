"""A browser opens a run's page without a complaint, and its few controls work."""

from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from compared_runs import add_records, make_both
from tiny_run import make_run

from sgmim_fast.report import write_report


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def fresh(browser: Browser) -> Browser:
    browser.complaints.clear()
    browser.requests.clear()
    browser.resize(1366, 900)
    return browser


def test_browser_has_nothing_to_complain(fresh: Browser, shared_run: Path) -> None:
    path = write_report(shared_run)
    for width, scheme in ((1366, "light"), (390, "dark")):
        fresh.resize(width, 900)
        fresh.prefer(scheme)
        fresh.open(path)
        widths = fresh.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert widths == [96] * 8 * 5
        assert fresh.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{width} pixels are too narrow"
    assert fresh.complaints == []
    assert set(fresh.requests) == {path.as_uri()}


def test_curves_are_read_by_key_and_pointer(fresh: Browser, shared_run: Path) -> None:
    fresh.open(write_report(shared_run, samples=1))

    def shown(key: str) -> Any:
        return fresh.evaluate(f"document.querySelector('[data-key={key}]').textContent")

    assert (shown("loss"), shown("lr")) == ("0.0500", "0.00400")
    fresh.evaluate("document.querySelector('.plot').focus()")
    fresh.press("Home")
    assert (shown("loss"), shown("lr")) == ("1.00", "2.00e-4")
    fresh.press("ArrowRight")
    assert fresh.evaluate("document.activeElement.getAttribute('aria-valuetext')").startswith(
        "step 4, epoch 0.20, total 0.5"
    )
    fresh.press("Escape")
    assert shown("loss") == "0.0500"
    x, y = fresh.evaluate(
        "(() => { const plot = document.querySelector('.plot');"
        " plot.scrollIntoView({block: 'center', behavior: 'instant'});"
        " const box = plot.getBoundingClientRect(); return [box.left + box.width / 2, box.top + 20]; })()"
    )
    fresh.point(x, y)
    assert shown("images_per_second") == "120"
    assert fresh.complaints == []


def test_two_runs_are_shown_and_read_apart(fresh: Browser, tmp_path: Path) -> None:
    guided, plain = make_both(tmp_path)
    add_records(guided, plain)
    path = write_report(guided, samples=2, against=plain)
    for width, scheme in ((390, "dark"), (1366, "light")):
        fresh.resize(width, 900)
        fresh.prefer(scheme)
        fresh.open(path)
        assert fresh.evaluate("[...document.images].map(image => image.naturalWidth)") == [96] * (4 + 8) * 2
        assert fresh.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{width} pixels are too narrow"
        cells = "[...document.querySelectorAll('#compared td')]"
        assert fresh.evaluate(f"{cells}.every(cell => cell.scrollWidth <= cell.clientWidth)")
    colours = fresh.evaluate(
        "['first', 'second'].map(key => getComputedStyle(document.querySelector(`path.line.${key}`)).stroke)"
    )
    assert len(set(colours)) == 2

    def shown(key: str) -> Any:
        return fresh.evaluate(f"document.querySelector('[data-key={key}]').textContent")

    assert (shown("first"), shown("second"), shown("loss")) == ("0.0200", "0.0200", "0.0500")
    fresh.evaluate("document.querySelector('#compared .plot').focus()")
    fresh.press("Home")
    assert (shown("first"), shown("second"), shown("loss")) == ("0.400", "0.400", "0.0500")
    fresh.evaluate("document.querySelector('#curves .plot').focus()")
    fresh.press("Home")
    assert (shown("first"), shown("loss")) == ("0.0200", "1.00")
    assert fresh.complaints == []
    assert set(fresh.requests) == {path.as_uri()}


def test_outlines_can_be_switched_off(fresh: Browser, shared_run: Path) -> None:
    fresh.open(write_report(shared_run, samples=1))
    visible = "getComputedStyle(document.querySelector('.outline')).display != 'none'"
    assert fresh.evaluate(visible)
    fresh.evaluate("document.getElementById('outline').click()")
    assert not fresh.evaluate(visible)


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        ("<script>console.error('wrong')</script>", "console.error: wrong"),
        ("<script>console.warn('odd')</script>", "console.warning: odd"),
        ("<script>missing()</script>", "missing is not defined"),
        ("<img src='absent.png'>", "ERR_FILE_NOT_FOUND"),
    ],
)
def test_browser_does_notice(fresh: Browser, tmp_path: Path, html: str, complaint: str) -> None:
    path = tmp_path / "bad.html"
    path.write_text(f"<!DOCTYPE html>{html}")
    fresh.open(path)
    assert any(complaint in line for line in fresh.complaints), fresh.complaints


def test_browser_does_notice_requests(fresh: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<!DOCTYPE html><link rel=stylesheet href='other.css'>")
    fresh.open(path)
    assert set(fresh.requests) == {path.as_uri(), (tmp_path / "other.css").as_uri()}
