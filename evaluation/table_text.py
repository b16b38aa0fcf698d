"""Tables, whatever they hold, as Markdown, LaTeX and CSV."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.table_file import csv_line
from runtime.safe_write import replacing


class Cell(NamedTuple):
    """One entry of a table."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """One table, whatever it is written as; every row has a cell per column."""

    title: str
    note: str
    columns: tuple[str, ...]
    num_labels: int  # leading columns that say what a row is
    rows: tuple[tuple[Cell, ...], ...]


def render_markdown(tables: Iterable[Table]) -> str:
    """Tables as sections of one Markdown page."""
    return "\n".join(["# Results\n", *map(_markdown_table, tables)])


def _markdown_table(table: Table) -> str:
    lines = [[_escape_markdown(title) for title in table.columns]]
    lines.append(["---" if k < table.num_labels else "---:" for k in range(len(table.columns))])
    for row in table.rows:
        texts = [_escape_markdown(cell.text) for cell in row]
        lines.append([f"**{text}**" if cell.best else text for cell, text in zip(row, texts, strict=True)])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"## {table.title}\n\n{table.note}\n\n{body}"


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|")


_LATEX_ESCAPES = {character: f"\\{character}" for character in "_%&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # A bracket at the beginning of a row would be an argument of the line break before it.
    "[": "{[}",
    "±": r"$\pm$",
    "∞": r"$\infty$",
}


def render_latex(tables: Iterable[Table]) -> str:
    """Tables as LaTeX floats, to be `\\input` by a document that loads the package booktabs."""
    return "\n".join(["% Needs \\usepackage{booktabs}.", *map(_latex_table, tables)])


def _latex_table(table: Table) -> str:
    rows = []
    for row in table.rows:
        texts = [(_escape_latex(cell.text), cell.best) for cell in row]
        rows.append(" & ".join(rf"\textbf{{{text}}}" if best else text for text, best in texts))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape_latex(table.title)}. {_escape_latex(table.note)}}}",
        rf"\begin{{tabular}}{{{'l' * table.num_labels}{'r' * (len(table.columns) - table.num_labels)}}}",
        r"\toprule",
        " & ".join(map(_escape_latex, table.columns)) + r" \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _escape_latex(text: str) -> str:
    return "".join(_LATEX_ESCAPES.get(character, character) for character in text)


def render_csv(tables: Iterable[Table]) -> str:
    """Tables as CSV, one below the other, each under a line with its title and one with its note."""
    blocks = []
    for table in tables:
        lines = [(table.title,), (table.note,), table.columns, *([cell.text for cell in row] for row in table.rows)]
        blocks.append("".join(map(csv_line, lines)))
    return "\n".join(blocks)


RENDERERS = {".md": render_markdown, ".tex": render_latex, ".csv": render_csv}


def write_tables(file: str | os.PathLike, tables: Sequence[Table]) -> None:
    """Write tables in the format of the file's suffix, .md, .tex or .csv, replacing `file` as a whole.

    Raises ValueError for another suffix and when there is no table.
    """
    render = RENDERERS.get(Path(file).suffix)
    if render is None:
        raise ValueError(f"{file} must end in one of {', '.join(RENDERERS)}, which say how tables are written.")
    if not tables:
        raise ValueError(f"There is no table to write to {file}: evaluate a checkpoint first.")
    with replacing(file) as temporary:
        temporary.write_bytes(render(tables).encode())
