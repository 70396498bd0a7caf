"""Write tables and figures as a page: one self-contained HTML file, or Markdown beside figures.

Rows come in through the tables of `results` and the figures of `figures`; both pages are made of
the same sections. `write_report` is the page of a run; nothing comes after it.
"""

import html
import io
import json
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune import files, results
from jaxprune.results import Run, Table, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # a report without figures does not import matplotlib

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; overflow-wrap: break-word;
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
h3 { font-size: .9rem; margin: 1.5rem 0 .3rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: left; border-left: 1px solid var(--soft); }
th, .number { white-space: nowrap; } .number { text-align: right; }
tr > :first-child { position: sticky; left: 0; background: Canvas; border: 0; }
thead { border-bottom: 1px solid var(--line); }
tbody tr:nth-child(even) > :not(:first-child) { background: var(--soft); }
figure { margin: 1rem 0; padding: .5rem; background: #fff; border: 1px solid var(--line); }
svg { display: block; width: 100%; height: auto; max-width: 54rem; margin: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important; }
pre { overflow-x: auto; padding: .7rem; background: var(--soft); user-select: all; }
@media print {
  body { max-width: none; padding: 0; font-size: 9pt; } table, h3 { font-size: 7pt; }
  th, td { padding: .05rem .3rem; } th { white-space: normal; } pre { white-space: pre-wrap; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""


class Section(NamedTuple):
    """A part of a page; all of it is text, nothing is markup.

    Attributes:
        heading: one line.
        paragraphs: come first.
        tables: as `results.tables` makes them.
        figures: by name. A Markdown page takes them from files of that name beside it.
        code: lines to copy.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Figure] = {}
    code: str = ""


def write_report(run: Run, figures: Mapping[str, Figure] | None, path: Path) -> None:
    """Write the page of a run: tables, figures, settings, and how to load it again.

    Args:
        run: as `load_run` returns it.
        figures: as `draw_figures` returns them, if any.
        path: of the HTML file.
    """
    config, level = run.config, max(sum(run.config["levels"], []), default=0)
    setup = _as_table("setting", config["settings"] | {"levels, %": config["levels"]})
    arms = Table("arms", [("", name) for name in config["arms"][0]],
                 [[_words(value) for value in arm.values()] for arm in config["arms"]])  # fmt: skip
    command = config.get("command", ())
    commands = [command, *config.get("later_commands", ())]
    made = {
        "command": ", then ".join(
            shlex.join(each) if isinstance(each, list) else str(each) for each in commands
        )
    }
    names = ("made_by", "device", "versions", "seconds", "compilations", "seeds")
    made |= {name: config[name] for name in names if name in config}
    code = "\n".join([
        "import jaxprune as jp", "", f"run = jp.load_run({str(run.path)!r})",
        "run.rows, run.metrics, run.config",
        f"arm = run.arms[0]  # {' or '.join(map(str, run.arms))}",
        f"params, state, masks = run.network(arm, seed=0, level={level:g})",
        "pruned = jp.apply_masks(params, masks)",
    ])  # fmt: skip
    what = [config["settings"].get(name) for name in ("dataset", "network")]
    title = ", ".join(["Pruning study", *(str(text) for text in what if text)])
    sections = [
        Section("Results", (), tables(run.rows, run.metrics)),
        Section("Figures", (), (), figures or {}),
        Section("Load it again", ("Where the run directory is kept:",), (), {}, code),
        Section("How it was made", (), [_as_table("made with", made), setup, arms]),
    ]
    write_html(title, [section for section in sections if any(section[1:])], path)


def text(section: Section) -> str:
    """Lay out the paragraphs and tables of a section for a terminal."""
    paragraphs = [textwrap.fill(each, 100) for each in section.paragraphs]
    return "\n\n".join([section.heading, *paragraphs, *map(results.text, section.tables)])


def write_html(title: str, sections: Sequence[Section], path: Path) -> None:
    """Write one HTML file that needs no other and no script.

    Args:
        title: its heading.
        sections: in order.
        path: of the file.
    """
    parts, figures = [f"<h1>{html.escape(title)}</h1>"], 0
    for section in sections:
        parts.append(f"<section>\n<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
        parts += map(_html_table, section.tables)
        for name, figure in section.figures.items():
            figures += 1
            label = f'role="img" aria-label="{html.escape(name)}"'
            svg = _inline_svg(figure, f"f{figures}").replace("<svg", f"<svg {label}", 1)
            parts.append(f"<figure>\n{svg}</figure>")
        if section.code:
            parts.append(f"<pre><code>{html.escape(section.code)}</code></pre>")
        parts.append("</section>")
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    files.write(path, head + "\n".join(parts) + "\n</body>\n</html>\n")


def write_markdown(title: str, sections: Sequence[Section], path: Path) -> None:
    """Write a Markdown file, which shows the figures as PNG files beside it.

    Args:
        title: its heading.
        sections: in order.
        path: of the file.
    """
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.heading}", *section.paragraphs]
        parts += map(_markdown_table, section.tables)
        parts += [f"![{name}]({name}.png)" for name in section.figures]
        if section.code:
            parts.append(f"```python\n{section.code}\n```")
    files.write(path, "\n\n".join(parts) + "\n")


def _markdown_table(table: Table) -> str:
    names = [" ".join(filter(None, column)) for column in table.columns]
    rules = ["---:" if number else "---" for number in _are_numbers(table)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (names, *table.lines)]
    lines = [f"| {' | '.join(line)} |" for line in (cells[0], rules, *cells[1:])]
    return "\n".join([f"**{table.title}**\n" if table.title else "", *lines]).lstrip("\n")


def _html_table(table: Table) -> str:
    kinds = [' class="number"' * number for number in _are_numbers(table)]
    wide = [(name, len([*same])) for name, same in groupby(head for head, _ in table.columns)]
    heads = [[f'<th colspan="{width}">{html.escape(name)}</th>' for name, width in wide]]
    names = zip(table.columns, kinds, strict=True)
    heads.append([f'<th scope="col"{kind}>{html.escape(name)}</th>' for (_, name), kind in names])
    heads = heads if any(name for name, _ in wide) else heads[1:]
    rows = [[f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(line, kinds, strict=True)]
            for line in table.lines]  # fmt: skip
    head, body = (
        "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines) for lines in (heads, rows)
    )
    title = f"<h3>{html.escape(table.title)}</h3>\n" if table.title else ""
    return (
        f'{title}<div class="scroll">\n<table>\n'
        f"<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _are_numbers(table: Table) -> list[bool]:
    """Return which columns hold numbers, which are aligned to the right."""
    columns = zip(*table.lines, strict=True) if table.lines else [[""]] * len(table.columns)
    return [all(re.match(r"[-+\N{MINUS SIGN}–\d]|$", cell) for cell in cells) for cells in columns]


def _as_table(name: str, values: Mapping[str, Any]) -> Table:
    """Lay out names and values; what is nested gets a line each."""
    lines = []
    for key, value in values.items():
        inner = value if isinstance(value, dict) else {"": value}
        lines += [[f"{key} {own}".strip(), _words(each)] for own, each in inner.items()]
    return Table("", [("", name), ("", "value")], lines)


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value) if value != {} else "-"


def _inline_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an SVG element whose ids begin with `prefix`, text as text."""
    from matplotlib import style

    from jaxprune.figures.panels import STYLE

    text = io.StringIO()
    with style.context(STYLE | {"svg.fonttype": "none"}, after_reset=True):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (
        r"<metadata>.*?</metadata>\s*",  # names addresses
        r"<style[^>]*>.*?</style>",  # would hold for all of the page, which has it once
        r"<!--.*?-->\s*",
        r' xmlns(:xlink)?="[^"]*"',
        r'(?<=<svg) width="\S+" height="\S+"',
        r"(?<=\n) +",
    ):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r'"[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = svg.replace("xlink:href", "href")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
