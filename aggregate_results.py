"""Mean and standard deviation over seeds of every result, and the tables of the published study made of them.

    python aggregate_results.py --input results/fid_results.csv --output results/fid_table
    python aggregate_results.py --run NAME NAME                     # of several runs in one table
    python aggregate_results.py --input host_a/fid_results.csv host_b/fid_results.csv --metric fid kid
    python aggregate_results.py --run ddpm_cifar10 --targets cifar10    # which results meet those of the DDPM report

Writes {output}.csv (one line per checkpoint, path and setting) and the tables as {output}.md, {output}.tex and
{output}_tables.csv, and prints {output}.md. Published numbers stand beside measured ones of the same kind.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path

from cli import run_stage
from evaluation.result_layout import MODEL_AND_PATH, layout_tables
from evaluation.results_table import METRICS, aggregate, read_rows, write_csv
from evaluation.table_text import render_markdown, write_tables
from evaluation.targets import TARGETS, target_tables, unmeasured
from runtime.runs import SCORES_FILE, places, run_name
from runtime.settings import Settings, option, parse_settings


@dataclass(frozen=True, kw_only=True)
class TableSettings(Settings):
    """Which results, and where the tables go."""

    run: tuple[str, ...] | None = option(None, "the results of these runs", parse=run_name, metavar="NAME", nargs="+")
    input: tuple[str, ...] | None = option(None, "results tables (results/fid_results.csv)", nargs="+")
    output: str | None = option(
        None,
        "file name without suffix (results/fid_table, of a run with a name in its results, of several "
        "results/fid_table_NAME_NAME)",
    )
    metric: tuple[str, ...] = option(METRICS, "only these", choices=METRICS, nargs="+", shown="all that were measured")
    targets: str | None = option(
        None,
        "first a table of every result beside the targets of the DDPM report for this data set",
        choices=tuple(TARGETS),
    )
    brief: bool = option(False, "print the best of every model and path alone, of the first metric, and targets")

    def check(self) -> None:
        super().check()
        if self.run is not None and self.input is not None:
            raise ValueError("--run and --input exclude each other; leave one of them out")
        runs = self.run or (None,)
        if self.input is None:
            self._derive(input=tuple(str(places(run).results / SCORES_FILE) for run in runs))
        if self.output is None:
            name = "fid_table" if len(runs) == 1 else "_".join(("fid_table", *self.run))
            self._derive(output=str(places(runs[0] if len(runs) == 1 else None).results / name))


def parse_args() -> TableSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(TableSettings, __doc__)


def main() -> None:
    """Aggregate, write, print."""
    settings = parse_args()
    if Path(f"{settings.output}.csv").resolve() in [Path(file).resolve() for file in settings.input]:
        raise ValueError(
            f"--output {settings.output} would overwrite the results in {settings.output}.csv; name another file."
        )
    rows = []
    for file in settings.input:
        found = read_rows(file)
        if not found:
            raise ValueError(f"{file} holds no result; evaluate a checkpoint first with eval_fid_batch.py.")
        rows += found
    rows = [row for row in rows if row["metric"] in settings.metric]
    if not rows:
        raise ValueError(f"{' and '.join(settings.input)} hold no result of --metric {' '.join(settings.metric)}.")
    targets = target_tables(rows, settings.targets) if settings.targets else []
    laid_out = layout_tables(rows)
    tables = [*targets, *laid_out]
    write_csv(f"{settings.output}.csv", aggregate(rows))
    for suffix in (".md", ".tex", "_tables.csv"):
        write_tables(f"{settings.output}{suffix}", tables)
    best = [table for table in laid_out if table.columns[0] == MODEL_AND_PATH][:1]
    print(render_markdown([*targets, *best] if settings.brief else tables))
    for sentence in unmeasured(rows, settings.targets) if settings.targets else ():
        print(sentence)


if __name__ == "__main__":
    run_stage(main)
