"""The report of a run, and the page of all that was measured: whole, valid, and of the rows."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from experiments import one_shot_page, results_page
from jaxprune import report, results
from jaxprune.config import Arm
from jaxprune.report import Section
from jaxprune.results import Table

ROOT = Path(__file__).parent.parent
ALL = ["k-sparsity-weight", "k-sparsity-unit", "weight-vs-unit", "epoch_training_weights",
       "epoch_training_units", "calibration-and-churn"]  # fmt: skip
VOID = {"meta", "br"}
TABLE = Table(
    "a title", [("", "pruned"), ("one", "a|b"), ("one", "c")], [["<x>", "1.5 ± 0.1", "-"]]
)


class Page(HTMLParser):
    """What a page holds; the tags must be closed in the order in which they were opened."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "code", "p", "h1", "h2", "h3"):
            self.cells.append(data)


def draw() -> Figure:
    figure = Figure(figsize=(6.8, 2))
    ax = figure.subplots()
    ax.plot([0, 1], [0.125, 1], marker="o", label="<line>")
    ax.set_clip_on(True)
    figure.legend()
    return figure


@pytest.fixture(scope="module")
def committed() -> tuple[results.Run, dict[str, Any]]:
    folder = ROOT / "figures"
    names = ("benchmark", "inference")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    return results.load_run(folder), found


def test_the_report_is_one_valid_file_that_needs_no_other(
    committed: tuple[results.Run, dict[str, Any]], tmp_path: Path
) -> None:
    run = dataclasses.replace(committed[0], path=Path("runs/a & b"))
    report.write_report(run, {"first": draw(), "second <&>": draw()}, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10  # also between figures
    text = (tmp_path / "report.html").read_text()
    used = re.findall(r"url\((.*?)\)", text)
    used += [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert used and {name.removeprefix("#") for name in used} <= set(ids)
    assert "http" not in text and "script" not in page.tags and "@import" not in text
    assert page.tags.count("svg") == 2 and ("aria-label", "second <&>") in page.attributes
    assert "0.125" not in text and ">&lt;line&gt;<" in text
    for table in results.tables(run.rows, run.metrics):
        assert table.title in page.cells
        assert {cell for line in table.lines for cell in line} <= set(page.cells)
    for cell in ("fashion_mnist", "experiments/sweep.py --preset challenge", "x86_64", "0.10.2",
                 "462.735", "1000 1000 500 200", "trained"):  # fmt: skip
        assert cell in page.cells
    (code,) = [cell for cell in page.cells if "jp.load_run" in cell]
    assert "run = jp.load_run('runs/a & b')" in code and "level=99)" in code
    compile(code, "report.html", "exec")


def test_a_report_without_figures_or_rows(
    committed: tuple[results.Run, dict[str, Any]], tmp_path: Path
) -> None:
    run = dataclasses.replace(committed[0], rows=[])
    report.write_report(run, None, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "svg" not in page.tags and "Figures" not in page.cells and "Results" not in page.cells


def test_both_formats_are_of_the_same_sections_and_escape(tmp_path: Path) -> None:
    section = Section("a <b>", ["p & q"], [TABLE], {"name": draw()}, "x < 1")
    report.write_html("<t>", [section], tmp_path / "a.html")
    page = Page(tmp_path / "a.html")
    assert page.cells == ["<t>", "a <b>", "p & q", "a title", "one", "pruned", "a|b", "c", "<x>",
                          "1.5 ± 0.1", "-", "x < 1"]  # fmt: skip
    assert page.attributes.count(("colspan", "2")) == 1
    assert page.attributes.count(("class", "number")) == 4  # two columns, heads too
    report.write_markdown("t", [section], tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text().split("\n\n") == [
        "# t", "## a <b>", "p & q", "**a title**",
        "| pruned | one a\\|b | one c |\n| --- | ---: | ---: |\n| <x> | 1.5 ± 0.1 | - |",
        "![name](name.png)", "```python\nx < 1\n```\n",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(
    width: int, committed: tuple[results.Run, dict[str, Any]], tmp_path: Path
) -> None:
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    path = tmp_path / "report.html"
    report.write_report(committed[0], {"first": draw()}, path)
    # A window is 500 wide at least; a frame in it is not.
    frame = f'<iframe width="{width}" height="2000" style="border: 0" srcdoc="'
    probe = "const e = document.querySelector('iframe').contentDocument.documentElement;"
    probe += "document.title = `${e.clientWidth} ${e.scrollWidth}`"
    probe = f'"></iframe><script>onload = () => {{{probe}}}</script>'
    (tmp_path / "frame.html").write_text(frame + html.escape(path.read_text()) + probe)
    flags = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars",
             f"window-size={width},2000", f"user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    command = [browser, *(f"--{flag}" for flag in flags)]
    image = tmp_path / "page.png"
    for what, page in (("--dump-dom", tmp_path / "frame.html"), (f"--screenshot={image}", path)):
        done = subprocess.run([*command, what, page.as_uri()], capture_output=True, text=True,
                              check=True, timeout=120)  # fmt: skip
        if what == "--dump-dom":
            assert re.findall("<title>(.*?)</title>", done.stdout)[0] == f"{width} {width}"
    assert int.from_bytes(image.read_bytes()[16:20]) == width


def test_the_committed_page_is_of_the_committed_rows_and_timings(
    committed: tuple[results.Run, dict[str, Any]], tmp_path: Path
) -> None:
    run, found = committed
    compared = one_shot_page.sections(ROOT / "figures" / "one_shot")
    names = [*ALL, "inference-speed", "file-sizes"]
    sections = [*results_page.sections(run, found, dict.fromkeys(names)), *compared]
    names += [name for section in compared for name in section.figures]
    assert len(compared) >= 1 and len(names) >= 12
    report.write_markdown("Results", sections, tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_bytes() == (ROOT / "figures/RESULTS.md").read_bytes()
    assert {path.stem for path in (ROOT / "figures").glob("*.png")} == set(names)
    assert sorted(name for section in sections for name in section.figures) == sorted(names)


def test_the_committed_run_is_the_challenge_and_complete(
    committed: tuple[results.Run, dict[str, Any]],
) -> None:
    run, _ = committed
    keys = {(r.arm, r.seed, r.epoch, r.target_sparsity) for r in run.rows}
    assert len(keys) == len(run.rows) == 2 * 2 * 3 * 20 * 10
    for row in run.rows:
        if row.epoch == 20 or row.protocol == "one_shot":
            assert row.sparsity == pytest.approx(row.target_sparsity, abs=1e-6)
    for level in (0.7, 0.8, 0.9, 0.95):  # the challenge's finding
        weight, unit = (Arm("magnitude", g, "layer", "one_shot") for g in ("weight", "unit"))
        assert results.difference(run.rows, weight, unit, level, "accuracy")[0] > 0
