"""What published reports set themselves as targets, and which results meet them.

The targets are data: `TARGETS` is the one place that has them. A report that did not measure its own figures has
targets and no baseline, so nothing is ranked by them and nothing stands beside scores as if it had been measured.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evaluation.result_layout import MIN_FID_IMAGES, SETTING_FIELDS, VALUE_LAYOUTS
from evaluation.results_table import natural_order
from evaluation.series import Result, Row, named_results
from evaluation.table_text import Cell, Table
from figures.scores import METRIC_TITLES

SPLITS = {"inception_score": ("inception_score_sd", 10)}  # Values with an error bar over so many parts of the images.
LABELS = ("model and path", "weights", "epoch", "NFE", "images")


class Target(NamedTuple):
    """What a value is to be below or, where higher is better, above."""

    field: str  # of VALUE_LAYOUTS, which says the direction
    bound: float

    @property
    def text(self) -> str:
        """As in `< 50`."""
        return f"{'<' if VALUE_LAYOUTS[self.field].better == 'lower' else '>'} {self.bound:g}"

    def is_met(self, value: float) -> bool:
        """Whether a value is on the good side of the bound, which itself is not."""
        return value < self.bound if VALUE_LAYOUTS[self.field].better == "lower" else value > self.bound


class Report(NamedTuple):
    """The targets of a report for one data set."""

    title: str
    targets: tuple[Target, ...]


TARGETS = {
    "cifar10": Report("DDPM report, CIFAR-10", (Target("fid", 50.0), Target("inception_score", 6.2))),
    "mnist": Report("DDPM report, MNIST", (Target("fid", 10.0),)),
}


class Verdict(NamedTuple):
    """One result beside a target."""

    result: Result
    target: Target
    value: str  # mean ± deviation over seeds, and the error bar of one evaluation
    met: bool

    @property
    def labels(self) -> tuple[str, ...]:
        """What LABELS name."""
        result = self.result
        images = f"{int(result['num_images']):,}"
        return result["series"].title, result["weights"], result["epoch"], result["nfe"], images


def verdicts(rows: Iterable[Row], name: str) -> list[list[Verdict]]:
    """Every result of a value that the report has a target for: a list for each target and comparable setting.

    rows: of `read_rows`. name: of TARGETS. Settings are comparable whatever the number of images and of network calls,
    which stand beside each result. Results are ordered by epoch, NFE, weights and series.
    """
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    results = named_results(rows)
    for target in TARGETS[name].targets:
        for result in results:
            mean = result[f"{target.field}_mean"]
            if mean is None:
                continue
            setting = [result[field] for field in SETTING_FIELDS if field not in ("nfe", "num_images")]
            verdict = Verdict(result, target, _value(target.field, result), target.is_met(mean))
            groups.setdefault((target.field, *setting), []).append(verdict)
    return [sorted(group, key=_order) for group in groups.values()]


def _order(verdict: Verdict) -> tuple:
    result = verdict.result
    numbers = [natural_order(result[name]) for name in ("epoch", "nfe")]
    return (*numbers, result["weights"] == "ema", result["series"].rank)


def _value(field: str, result: Result) -> str:
    digits, sd = VALUE_LAYOUTS[field].digits, result[f"{field}_sd"]
    text = f"{result[f'{field}_mean']:.{digits}f}"
    if sd is not None:
        text += f" ± {sd:.{digits}f} over {result[f'{field}_seeds']} seeds"
    if field in SPLITS:
        bar, count = SPLITS[field]
        over_splits = result[f"{bar}_mean"]
        if over_splits is not None:
            text += f"{',' if sd is not None else ''} ± {over_splits:.{digits}f} over {count} splits"
    return text


def target_title(name: str, group: Sequence[Verdict]) -> str:
    """What a table of verdicts is called: the target, and how many meet it."""
    field = group[0].target.field
    met = sum(verdict.met for verdict in group)
    count = f"{met} of {len(group)} result{'s' if len(group) > 1 else ''} meet{'s' if met == 1 else ''} it"
    what = METRIC_TITLES[field]
    return f"Target of the {TARGETS[name].title}: {what[0].upper()}{what[1:]} {group[0].target.text}: {count}"


def _note(group: Sequence[Verdict]) -> str:
    result = group[0].result
    few = any(int(verdict.result["num_images"]) < MIN_FID_IMAGES for verdict in group)
    return " ".join(
        [
            "A target and no measurement of the report.",
            f"{result['dataset']} against the reference {result['reference']} ({result['reference_fingerprint']}), "
            f"features {result['metric_features']}, resize {result['resize']}, {result['precision']}.",
            *([f"Scores of fewer than {MIN_FID_IMAGES:,} images say little of a target."] if few else []),
        ]
    )


def target_tables(rows: Iterable[Row], name: str) -> list[Table]:
    """The results of `verdicts` as tables, those of all runs side by side; none where no target was measured."""
    tables = []
    for group in verdicts(rows, name):
        cells = tuple(
            tuple(map(Cell, (*verdict.labels, verdict.value, verdict.target.text, "yes" if verdict.met else "no")))
            for verdict in group
        )
        columns = (*LABELS, METRIC_TITLES[group[0].target.field], "target", "met")
        tables.append(Table(target_title(name, group), _note(group), columns, len(LABELS), cells))
    return tables


def unmeasured(rows: Iterable[Row], name: str) -> list[str]:
    """A sentence for every target of which there is no result."""
    measured = {verdict.target for group in verdicts(rows, name) for verdict in group}
    return [
        f"Target of the {TARGETS[name].title}: {METRIC_TITLES[target.field]} {target.text}: not measured."
        for target in TARGETS[name].targets
        if target not in measured
    ]
