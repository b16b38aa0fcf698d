"""Tables are written as Markdown, LaTeX and CSV that say the same, whatever they hold."""

import csv
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from evaluation.result_layout import layout_tables
from evaluation.results_table import read_rows
from evaluation.table_text import Cell, Table, render_csv, render_latex, render_markdown, write_tables

TABLE = Table(
    "100 % of a_b & c",
    "A ± note #1.",
    ("model and path", "FID∞"),
    1,
    ((Cell("[x]|y"), Cell("1.00 ± 0.10", True)), (Cell(r"no_t \{~^$<>"), Cell(""))),
)


def test_markdown():
    assert render_markdown([TABLE]) == (
        "# Results\n\n## 100 % of a_b & c\n\nA ± note #1.\n\n"
        "| model and path | FID∞ |\n| --- | ---: |\n| [x]\\|y | **1.00 ± 0.10** |\n| no_t \\{~^$<> |  |\n"
    )


def test_csv():
    assert list(csv.reader(render_csv([TABLE, TABLE]).splitlines())) == [
        *(["100 % of a_b & c"], ["A ± note #1."], ["model and path", "FID∞"], ["[x]|y", "1.00 ± 0.10"]),
        *([r"no_t \{~^$<>", ""], []),
        *(["100 % of a_b & c"], ["A ± note #1."], ["model and path", "FID∞"], ["[x]|y", "1.00 ± 0.10"]),
        [r"no_t \{~^$<>", ""],
    ]


def test_latex():
    assert render_latex([TABLE]).splitlines()[1:] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{100 \% of a\_b \& c. A $\pm$ note \#1.}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"model and path & FID$\infty$ \\",
        r"\midrule",
        r"{[}x]\textbar{}y & \textbf{1.00 $\pm$ 0.10} \\",
        r"no\_t \textbackslash{}\{\textasciitilde{}\textasciicircum{}\$\textless{}\textgreater{} &  \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def check_latex(text):
    """What a LaTeX run would trip over: braces, special characters, environments and columns that do not fit."""
    bare = re.sub(r"\\[_%&#${}]", "", text)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0
    assert not re.search("[#~^]", bare) and "%" not in bare.removeprefix("%")
    assert "_" not in re.sub(r"\$[^$]*\$", "", bare)
    opened = []
    for kind, name in re.findall(r"\\(begin|end){(\w+)}", bare):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    for columns, body in re.findall(r"\\begin{tabular}{([lr]+)}(.*?)\\end{tabular}", bare, re.DOTALL):
        lines = [line for line in body.strip().splitlines() if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
        assert len(lines) >= 2
        for line in lines:
            assert line.endswith(r" \\") and line.count("&") == len(columns) - 1


@given(st.lists(st.text(st.sampled_from("ab_%&#${}~^\\[]<>|±∞ "), max_size=8), min_size=3, max_size=3))
def test_latex_of_any_name_is_sound(names):
    title, note, name = names
    check_latex(render_latex([Table(title, note, ("x", name), 1, ((Cell(note), Cell(name, True)),))]))


@pytest.fixture(scope="module")
def results():
    """Tables of results that were measured."""
    return layout_tables(read_rows(ROOT / "results/cats64_cpu/fid_results.csv"))


def test_latex_of_results_is_sound(results):
    text = render_latex(results)
    check_latex(text)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(results) > 10


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_the_renderers_say_the_same(results):
    cells = [cell.text for table in results for row in table.rows for cell in row]
    markdown = [
        line.strip("| ").split("|") for line in render_markdown(results).splitlines() if re.match(r"\|.*\d", line)
    ]
    found = [text.strip(" *") for line in markdown for text in line if "---" not in text]
    titles = {title for table in results for title in table.columns}
    assert [text for text in found if text not in titles] == [text for text in cells if text and text not in titles]
    lines = list(csv.reader(render_csv(results).splitlines()))
    assert [line for line in lines if line] == [
        line for table in results for line in ([table.title], [table.note], list(table.columns), *texts(table))
    ]


def test_tables_are_written_by_suffix(tmp_path):
    for suffix, render in ((".md", render_markdown), (".tex", render_latex), (".csv", render_csv)):
        write_tables(tmp_path / f"new/table{suffix}", [TABLE])
        assert (tmp_path / f"new/table{suffix}").read_bytes() == render([TABLE]).encode()
    assert len(list((tmp_path / "new").iterdir())) == 3
    with pytest.raises(ValueError, match=r"table.pdf must end in one of .md, .tex, .csv"):
        write_tables(tmp_path / "table.pdf", [TABLE])


def test_nothing_to_write_is_an_error_and_keeps_the_old_file(tmp_path):
    file = tmp_path / "old.md"
    file.write_text("old")
    with pytest.raises(ValueError, match="old.md"):
        write_tables(file, [])
    assert file.read_text() == "old"
