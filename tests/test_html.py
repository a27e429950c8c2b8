"""The page: every section renders in a browser at the width of a desk and of a phone, without an error and without a network.

Chromium is driven as it comes with Debian. Where it is missing these tests fail and say what to install: a page that nobody
opened is not tested.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from lowbit.conformance.html import SECTIONS, page
from lowbit.conformance.report import Report
from lowbit.conformance.verdict import Status, Worst

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
)
NARROWEST = 500  # a headless window is never narrower; below it, the page is opened in a frame of the width wanted
FRAME = """<!DOCTYPE html><html><body style="margin: 0">
<iframe width="{width}" height="800" style="border: 0" srcdoc="{text}"></iframe>
<script>
var frame = document.querySelector("iframe");
frame.onload = function () {{ Object.assign(document.documentElement.dataset, frame.contentDocument.documentElement.dataset); }};
</script></body></html>"""
IDS = [name for name, _ in SECTIONS]


def _samples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("report_samples.py"))
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


samples = _samples()


@pytest.fixture(scope="module")
def sample() -> Report:
    """The faulty sample: 259 verdicts over all ops."""
    found: Report = samples.report()
    return found


@pytest.fixture(scope="module")
def html(sample: Report) -> str:
    """Its page."""
    return page(sample)


def _browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "no Chromium to open the report with: install it with `apt-get install -y chromium`"
    return found


class Opened:
    """A page as a browser left it: attributes of the root element, what the console said, and the text of the document."""

    def __init__(self, text: str, folder: Path, width: int = 1280, then: str = "") -> None:
        path = folder / "report.html"
        whole = text + then if width >= NARROWEST else FRAME.format(width=width, text=escape(text + then))
        path.write_text(whole, encoding="utf-8")
        profile = folder / f"profile{width}"
        done = subprocess.run(
            [_browser(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=2000",
             "--dump-dom", path.as_uri()],
            capture_output=True, text=True, timeout=60, check=True,
        )
        root = re.search(r"<html[^>]*>", done.stdout)
        assert root is not None, done.stderr
        self.root = dict(re.findall(r'data-(\w+)="([^"]*)"', root.group()))
        self.console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        self.text = done.stdout


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_every_section_renders(html: str, tmp_path: Path, width: int) -> None:
    opened = Opened(html, tmp_path, width)
    assert opened.console == []
    assert opened.root["errors"] == "0"
    assert opened.root["sections"].split() == IDS
    assert opened.root["overflow"] == "0"
    assert opened.root["width"] == str(width)


def test_an_empty_report_renders(tmp_path: Path) -> None:
    opened = Opened(page(samples.report([], waived=False)), tmp_path)
    assert (opened.console, opened.root["errors"]) == ([], "0")
    assert opened.root["sections"].split() == IDS


@pytest.mark.parametrize("planted", [
    "<script>throw new Error('planted')</script>",
    "<script>setTimeout(function () { missing(); }, 10)</script>",
    "<script>Promise.reject(new Error('planted'))</script>",
    "<img src='https://example.org/pixel.png'>",
])
def test_a_planted_fault_is_seen(html: str, tmp_path: Path, planted: str) -> None:
    opened = Opened(html, tmp_path, then=planted)
    assert opened.console != []
    assert int(opened.root["errors"]) > 0


def test_a_planted_console_error_is_seen(html: str, tmp_path: Path) -> None:
    (said,) = Opened(html, tmp_path, then="<script>console.error('planted')</script>").console
    assert "planted" in said


def test_what_sticks_out_of_a_narrow_page_is_seen(html: str, tmp_path: Path) -> None:
    opened = Opened(html.replace("<main>", '<main><p style="width: 700px">wide</p>', 1), tmp_path, 390)
    assert int(opened.root["overflow"]) > 100


def test_a_section_that_does_not_render_is_missed(html: str, tmp_path: Path) -> None:
    opened = Opened(html.replace("<style>", "<style>#power { display: none }", 1), tmp_path)
    assert opened.root["sections"].split() == [name for name in IDS if name != "power"]


def test_the_filter_lists_cases_and_their_repro_lines(html: str, sample: Report, tmp_path: Path) -> None:
    press = "<script>document.querySelector('[data-find=\"gemm_nvfp4/ /outlier/\"]').click()</script>"
    opened = Opened(html, tmp_path, then=press)
    rows = re.search(r'<tbody id="rows">(.*?)</tbody>', opened.text, re.DOTALL)
    assert rows is not None
    expected = [failure for failure in sample.failures if failure.case.startswith("gemm_nvfp4/") and "/outlier/" in failure.case]
    assert len(expected) == 2
    assert rows.group(1).count("<tr>") == 2
    assert all(failure.repro in unescape(rows.group(1)) for failure in expected)
    assert opened.console == []


# Without a browser -----------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Whether tags nest, which ids there are, and what refers outside."""

    VOID = frozenset({"meta", "link", "input", "br", "wbr", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "srcset", "action", "data") or (name == "href" and tag != "a"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def test_the_page_is_well_formed_and_alone(html: str) -> None:
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert [name for name in tags.ids if name in IDS] == IDS
    assert tags.outside == ["link href=data:,"]
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in html


def _text(html: str) -> str:
    return unescape(html.replace("<wbr>", ""))


def test_every_failure_has_its_line(html: str, sample: Report) -> None:
    assert len(sample.failures) == 10
    shown = _text(html)
    assert [failure.case for failure in sample.failures if f"<code>{failure.repro}</code>" not in shown] == []


def test_failures_come_first_gravest_first(html: str) -> None:
    order = re.findall(r'<article class="failure">\s*<header><span class="tag fail">✗ (\w+)', html)
    assert order == ["CRASHED", "TIMEOUT", "MALFORMED", "RAISED", "DRIFT", "UNTRUSTED"]
    assert html.index('id="failures"') < html.index('id="why"') < html.index('id="grid"')


def test_text_of_a_backend_stays_text() -> None:
    evil = "</script><script>alert(1)</script><b>'\"&"
    verdict = samples.verdict("int4_pack/plain/m8k64/plain/codes/s0", status=Status.RAISED, reason=evil + "\x1b[0m", kernel=evil)
    shown = page(samples.report([verdict], waived=False))
    assert "<script>alert" not in shown
    assert "<b>'" not in shown
    assert "\x1b" not in shown
    tags = _Tags()
    tags.feed(shown)
    assert tags.open == []


def test_statuses_are_told_by_more_than_colour(html: str) -> None:
    cells = re.findall(r'<td class="cell (\w+)"[^>]*data-find[^>]*>(.*?)</td>', html)
    marks = {"pass": "✓", "fail": "✗", "waived": "w", "unsupported": "–"}
    assert {kind for kind, _ in cells} == set(marks)
    assert all(marks[kind] in text for kind, text in cells)


def test_the_grid_counts_every_verdict_once(html: str, sample: Report) -> None:
    section = html[html.index('id="grid"'):html.index('id="executed"')]
    counts = [int(number) for number in re.findall(r"<span>[✓✗w–](\d+)</span>", section)]
    assert sum(counts) == sample.totals.selected == 259


def test_the_heat_map_draws_its_cells_and_tiles(html: str) -> None:
    section = html[html.index('<section id="heat">'):html.index('<section id="power">')]
    first, second = section.split("</figure>")[:2]
    assert first.count("<rect") == second.count("<rect") == 16 * 24
    crossed = re.search(r'class="cross" d="([^"]*)"', first)
    assert crossed is not None
    assert crossed.group(1).count("M") == first.count('class="hx"')
    assert "m = 17 downwards, n = 136 across" in first
    lines = re.search(r'class="over" d="([^"]*)"', first)
    assert lines is not None
    # n = 136: edges at 64 and 128; m = 17: none
    assert re.findall(r"M([\d.]+) 0V100", lines.group(1)) == ["47.059", "94.118"]
    assert "H100" not in lines.group(1)


def test_coverage_says_what_was_not_seen(html: str) -> None:
    shown = " ".join(re.sub(r"<[^>]*>", " ", html[html.index('id="coverage"'):html.index('id="mutants"')]).split())
    assert "ue4m3 126 of 128 not seen: 0x00, 0x7f" in shown
    assert "e4m3fn 127 of 256 not seen: 0x7f, 0x80, 0x81, 0x82, 0x83, 0x84 and 123 more" in shown
    assert "int4 16 of 16 every code" in shown


def test_power_shows_the_blind_spot(html: str, sample: Report) -> None:
    section = html[html.index('<section id="power">'):html.index('<section id="coverage">')]
    assert section.count("✗0") == 1
    row = re.search(r'<th scope="row">gemm_w4a16/folded</th>(.*?)</tr>', section)
    assert row is not None
    assert row.group(1).index("✗0") < row.group(1).index("✓7")
    assert sample.power["gemm_w4a16/folded"]["bias dropped"] == 0


def test_histograms_hold_every_element(html: str, sample: Report) -> None:
    section = html[html.index('<section id="ulps">'):html.index('<section id="heat">')]
    whole = section[:section.index('<div class="small">')]
    shown = sum(int(number.replace(",", "")) for number in re.findall(r'<span class="value">([\d,]+) ', whole))
    assert shown == sum(sum(verdict.ulp_histogram.values()) for verdict in sample.verdicts)


def test_levels_on_the_seal() -> None:
    names = ("int4_pack", "fp8_quantize", "gemm_nvfp4")
    good = [verdict for verdict in samples.verdicts(44, faulty=False) if verdict.case.split("/")[0] in names]
    problems = len({verdict.case.rsplit("/", 2)[0] for verdict in good})
    assert "L3<small>stable</small>" in page(samples.report(good, waived=False))
    below = page(samples.report(good, waived=False, requested=1))
    assert "L1<small>exact</small>" in below
    emulated = [replace(v, execution="emulated") for v in good]
    assert "Emulated: nothing ran on the device of the target." in page(samples.report(emulated, waived=False))
    granted = f"is granted over 3 ops and {problems} of {problems} selected problems. Executed on"
    assert granted in page(samples.report(good, waived=False))
    short = samples.report(good, waived=False, per_op=10)
    assert "No level is granted: shortened run: 10 of 170 drawn cases per op." in page(short)
    excused = samples.report([*good, replace(good[0], case=good[0].case + "7", status=Status.DRIFT, reason="x", clause="C")],
                             waivers=[samples.waiver_of(good[0].case + "7", "C")])
    assert "1 failing verdict is waived." in page(excused)
    assert '<section id="certificate" class="near">' in page(excused)
    unfinished = page(samples.report(good[:-1], waived=False, cases=[v.case for v in good]))
    assert "<small>no level</small>" in unfinished
    assert "the run is not complete: 1 selected case without a verdict" in unfinished


def test_what_stands_for_infinity_is_written_as_it() -> None:
    worst = Worst("d", (0, 0), "0x7fc0", "0x0", "0x0", "nan", "0.0", 9, float("nan"))
    case = "gemm_w4a16/plain/m16n64k256g64/bf16/lognormal/s0"
    bad = samples.verdict(case, status=Status.DRIFT, reason="NaN", wrong=1, worst=worst, heat=((float("inf"), 0.0),))
    shown = page(samples.report([bad], waived=False))
    assert "✗ ∞×" in re.sub(r"<[^>]*>", "", shown)
    assert "e+308" not in shown


def test_thousands_of_verdicts_stay_small(tmp_path: Path) -> None:
    many = samples.verdicts(per_pattern=44)
    assert len(many) > 5000
    shown = page(samples.report(many, waived=False))
    assert len(shown.encode()) < 5 << 20
    opened = Opened(shown, tmp_path)
    assert (opened.console, opened.root["errors"]) == ([], "0")
    assert opened.root["sections"].split() == IDS
