"""Series of results: what the scores of a column, a curve or a line have in common, and what it is called.

No series holds two trainings, two solvers, or at one point two checkpoints or two paths. Series of one model and path
have in their names what the trainings on the page differ in.
"""

import contextlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from evaluation.results_table import GROUP_FIELDS, aggregate, evaluations, group_of, is_adaptive, natural_order
from evaluation.training_columns import CHANGED, TRAINING_COLUMNS, TRAINING_FIELDS
from figures.style import WEIGHTS_TITLES
from planning.conditions import Guidance, guidance_of
from planning.regimes import default_regime

# What the published table calls a model type and a path type, and those beyond it in its manner.
COLUMN_TITLES = {
    ("baseline", "diagonal"): "Baseline",
    ("dual", "diagonal"): "LIFT diagonal",
    ("dual", "dp_64"): "LIFT DP-64",
    ("dual", "dp_total"): "LIFT DP-Total",
    ("baseline", "kl_diagonal"): "Baseline KL diagonal",
    ("dual", "kl_diagonal"): "LIFT KL diagonal",
    ("dual", "kl"): "LIFT KL",
    ("dual", "image_diagonal"): "LIFT image diagonal",
}
# What the path types are called beside the name of another model.
PATH_TITLES = {path: title.removeprefix("LIFT ") for (model, path), title in COLUMN_TITLES.items() if model == "dual"}
NOT_RECORDED = "training not recorded"
# Results that differ in one of these stand on no page beside each other, so that no name tells them apart.
APART = ("dataset", "reference_fingerprint")

Row = Mapping[str, Any]  # from read_rows
Result = dict[str, Any]  # from aggregate, with "rows" and "series"


class Series(NamedTuple):
    """What the scores of a column have in common."""

    model_type: str
    path_type: str
    coarse_from: str = ""  # x0 or noisy for models that read a coarse image they do not predict
    regime: str = ""  # empty where it is the one that the model has unless told otherwise
    representation: str = ""  # empty where it is over-complete, or of one scale
    training: tuple[str, ...] = ()  # what tells the training from others on the page
    sampling: tuple[str, ...] = ()  # what tells solver and path from others

    @property
    def title(self) -> str:
        """As in `LIFT DP-64`, `single_t DP-64, x0`, `LIFT diagonal, shift:2` and `LIFT KL, residual, lr 0.001`."""
        model_and_path = self.model_type, PATH_TITLES.get(self.path_type, self.path_type)
        name = COLUMN_TITLES.get(self[:2], " ".join(filter(None, model_and_path)))
        described = name, self.coarse_from, self.regime, self.representation
        return ", ".join(filter(None, (*described, *self.training, *self.sampling)))

    @property
    def rank(self) -> tuple:
        """Sort key: the published columns in their order, then the others."""
        known = list(COLUMN_TITLES)
        words = [[natural_order(word) for word in text.split()] for text in (*self.training, *self.sampling)]
        return (known.index(self[:2]) if self[:2] in known else len(known), *self[:5], words)

    @property
    def model(self) -> "Series":
        """What it has in common with the other paths of its training."""
        return self._replace(path_type="", coarse_from="", sampling=())


def series_of(row: Row | Result) -> Series:
    """The series of a row of the results table, or of `aggregate`, as long as there is no other of its name."""
    regime = row["regime"]
    usual = default_regime(row["model_type"])
    representation = row["representation"].replace("overcomplete", "")
    return Series(
        row["model_type"], row["path_type"], row["coarse_from"], "" if regime == usual else regime, representation
    )


def named_results(rows: Iterable[Row]) -> list[Result]:
    """`aggregate` over seeds, each result with `rows`, what it was made of, and its `series` among all of `rows`."""
    made_of: dict[tuple[str, ...], list[Row]] = {}
    for row in evaluations(rows):
        made_of.setdefault(group_of(row), []).append(row)
    results = [
        result | {"rows": made_of[group_of(result)], "series": series_of(result)}
        for result in aggregate(row for group in made_of.values() for row in group)
    ]
    for page in _grouped(results, lambda result: group_of(result, APART)):
        _name_trainings(page)
        _name_solvers_and_paths(page)
    return results


def _grouped(results: Iterable[Result], key: Callable[[Result], Hashable]) -> list[list[Result]]:
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def _add_training(result: Result, words: str) -> None:
    series = result["series"]
    result["series"] = series._replace(training=(*series.training, words))


def _add_sampling(result: Result, words: str) -> None:
    series = result["series"]
    result["series"] = series._replace(sampling=(*series.sampling, words))


def _name_trainings(results: Sequence[Result]) -> None:
    recorded = [result for result in results if _is_recorded(result)]
    for result in results if recorded else ():
        if not _is_recorded(result):
            _add_training(result, NOT_RECORDED)
    for field, column in TRAINING_COLUMNS.items():
        if field == "run":
            continue
        for peers in _grouped(recorded, lambda result, column=column: column.of_model and result["model_type"]):
            if len({_compared(field, result) for result in peers}) > 1:
                for result in peers:
                    if result[field] and not _is_told(field, result, peers):
                        _add_training(result, re.sub(r"[\[\]]", "", column.title.format(_compared(field, result))))
    # Every training has a run, so that the name of it is said only where nothing else is. One that got its name when it
    # was resumed has no two at an epoch.
    for group in _grouped(recorded, lambda result: result["series"].model):
        points = {(result["weights"], result["epoch"]) for result in group}
        runs = {(result["weights"], result["epoch"], result["run"]) for result in group}
        if len({result["run"] for result in group} - {""}) > 1 or len(runs) > len(points):
            for result in group:
                if result["run"]:
                    _add_training(result, TRAINING_COLUMNS["run"].title.format(result["run"]))
    for group in _grouped(results, lambda result: (result["series"].model, result["weights"], result["epoch"])):
        if len({result["checkpoint_fingerprint"] for result in group}) > 1:
            for result in group:
                _add_training(result, f"checkpoint {result['checkpoint_fingerprint']}")


def _is_recorded(result: Result) -> bool:
    return any(result[field] for field in TRAINING_FIELDS)


def _compared(field: str, result: Result) -> str | int | float:
    # The images of every epoch, since those seen by one follow from its number.
    value = result[field]
    if TRAINING_COLUMNS[field].form != "count" or not value:
        return value
    if field != "images_seen":
        return int(value)
    per_epoch = Fraction(int(value), max(int(result["epoch"]), 1))
    return per_epoch.numerator if per_epoch.denominator == 1 else float(per_epoch)


def _is_told(field: str, result: Result, peers: Iterable[Result]) -> bool:
    """Whether other columns of a result settle this one, as far as its peers go."""
    told_by = TRAINING_COLUMNS[field].told_by
    said = [result[name] for name in told_by if name in TRAINING_COLUMNS]
    if not said or not all(said) or any(text.endswith(CHANGED) for text in said):
        return False
    same = group_of(result, told_by)
    return len({_compared(field, peer) for peer in peers if group_of(peer, told_by) == same}) == 1


def _name_solvers_and_paths(results: Sequence[Result]) -> None:
    for field in ("solver", "guidance"):
        if len({result[field] for result in results}) > 1:
            for result in results:
                if result[field]:
                    _add_sampling(result, result[field])
    others = [field for field in GROUP_FIELDS if field != "path_fingerprint"]
    for group in _grouped(results, lambda result: group_of(result, others)):
        if len(group) > 1:
            for result in group:
                _add_sampling(result, _path_words(result))


def _path_words(result: Result) -> str:
    return f"path {result['path_fingerprint']}"


def guided_results(rows: Iterable[Row]) -> list[Result]:
    """`named_results` of the rows that name a guidance scale, each with its `scale` and the name of its `curve`.

    Results of one curve differ in the scale alone: not in the number of evaluations, which cost one call or several
    each, nor in the kind of guidance. A name has what curves differ in. In the order of their curves and scales. Raises
    ValueError if no row names a scale, and what `named_results` raises.
    """
    found: dict[str, Guidance] = {}
    rows = list(rows)
    for label in {row["guidance"] for row in rows}:
        with contextlib.suppress(ValueError):
            found[label] = guidance_of(label)
    results = named_results(row for row in rows if row["guidance"] in found)
    if not results:
        raise ValueError("no row names a guidance scale; score a model with classes with --guidance_scale G")
    told = [(result, found[result["guidance"]]) for result in results]
    words = [
        {
            "kind": guidance.kind,
            "steps": "" if is_adaptive(result) else f"{round(int(result['nfe']) / guidance.calls)} evaluations",
            "weights": WEIGHTS_TITLES[result["weights"]],
            "epoch": f"epoch {result['epoch']}",
        }
        for result, guidance in told
    ]
    order = []
    for (result, guidance), own in zip(told, words, strict=True):
        # Every scale has a fingerprint of its own for one path.
        sampling = (word for word in result["series"].sampling if word not in (result["guidance"], _path_words(result)))
        series = result["series"]._replace(sampling=tuple(sampling))
        differing = [text for name, text in own.items() if text and len({other[name] for other in words}) > 1]
        result |= {"scale": guidance.scale, "curve": ", ".join((series.title, *differing))}
        order.append(
            (series.rank, [[natural_order(word) for word in text.split()] for text in differing], guidance.scale)
        )
    return [results[k] for k in sorted(range(len(results)), key=order.__getitem__)]


def parameters_note(results: Iterable[Result]) -> str:
    """How many parameters the models of a table have, where they differ, as a sentence."""
    counts: dict[str, set[int]] = {}
    for result in sorted(results, key=lambda result: result["series"].rank):
        if result["parameters"]:
            name = COLUMN_TITLES.get((result["model_type"], "diagonal"), result["model_type"]).split()[0]
            counts.setdefault(name, set()).add(int(result["parameters"]))
    if len(set().union(*counts.values())) < 2:
        return ""
    texts = (f"{name} {' or '.join(f'{count:,}' for count in sorted(found))}" for name, found in counts.items())
    return f"Parameters: {', '.join(texts)}."
