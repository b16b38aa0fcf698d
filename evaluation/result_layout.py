"""Tables of the results, in the layout of the published study.

Only what is comparable shares a table: one data set, number of images, NFE, metric and reference. A column or row is
of one series, and a cell of one checkpoint and one path. Published numbers stand in square brackets beside measured
ones of the same kind, and nowhere else.
"""

import csv
import os
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from checkpoint import MODEL_CLASSES
from evaluation.results_table import ERROR_BAR_FIELDS, VALUE_FIELDS, natural_order
from evaluation.series import Result, Row, Series, named_results, parameters_note
from evaluation.table_text import Cell, Table
from figures.scores import METRIC_TITLES

WEIGHTS_TITLES = {"raw": "raw weights", "ema": "EMA weights"}
MODEL_AND_PATH = "model and path"  # The first column of tables with a line for each of them.


class ValueLayout(NamedTuple):
    """How a value is read and printed."""

    better: str | None  # lower or higher; None for what is neither good nor bad by itself
    digits: int  # after the decimal point


# Images may be far from those of training because they are new or because they are bad.
VALUE_LAYOUTS = {
    "fid": ValueLayout("lower", 2),
    "fid_infinity": ValueLayout("lower", 2),
    "kid": ValueLayout("lower", 5),
    "inception_score": ValueLayout("higher", 2),
    "manifold_precision": ValueLayout("higher", 4),
    "manifold_recall": ValueLayout("higher", 4),
    "swd": ValueLayout("lower", 2),
    "swd_64": ValueLayout("lower", 2),
    "swd_32": ValueLayout("lower", 2),
    "swd_16": ValueLayout("lower", 2),
    "nn_distance": ValueLayout(None, 2),
    "nn_distance_real": ValueLayout(None, 2),
    "authenticity": ValueLayout(None, 4),
    "fd": ValueLayout("lower", 3),
    "fd_real": ValueLayout(None, 3),
    "class_score": ValueLayout("higher", 3),
    "class_score_real": ValueLayout(None, 3),
    "class_accuracy": ValueLayout("higher", 4),
    "class_accuracy_real": ValueLayout(None, 4),
}
FLOOR_FIELDS = ("fd_real", "class_score_real", "class_accuracy_real")  # Of real images alone.

# Results that differ in one of these do not share a table; the metric follows from the value.
SETTING_FIELDS = (
    "dataset",
    "num_images",
    "nfe",
    "metric_features",
    "resize",
    "reference",
    "reference_images",
    "reference_fingerprint",
    "floor_images",
    "precision",
)

# The bias of FID falls with the number of images, and from here on numbers of one size are commonly reported.
MIN_FID_IMAGES = 10_000
INCEPTION_FEATURES = 2048

PUBLISHED_FILE = Path(__file__).parent.parent / "results/published/afhq64_fid.csv"
# What a result must agree with to be of the same kind as the published numbers.
PUBLISHED_SETTING = {
    "dataset": "huggan/AFHQv2",
    "num_images": "15803",
    "nfe": "18",
    "resize": "pytorch-fid",
    "reference": "train",
    "reference_images": "15803",
}

# What its training must agree with, where it is recorded.
PUBLISHED_TRAINING = {
    "preset": "published",
    "lr": "0.0001",
    "batch_size": "64",
    "network": "unet",
    "hidden_dims": "[64,128,256,512]",
    "objective": "denoising",
    "min_snr_gamma": "none",
    "timestep_weights": "published",
    "t_law": "uniform",
    "times": "whole",
    "perceptual_weight": "0",
    "feature_weight": "0",
    "latents": "none",
    "flip": "no",
}


class Published(NamedTuple):
    """The published numbers as text, empty where there is none."""

    model_type: str
    path_type: str
    coarse_from: str
    weights: str
    epoch: str
    fid_mean: str
    fid_sd: str
    seeds: str

    @property
    def text(self) -> str:
        """Mean ± deviation, without what is not published."""
        return f"{self.fid_mean} ± {self.fid_sd}" if self.fid_sd else self.fid_mean


def read_published(file: str | os.PathLike = PUBLISHED_FILE) -> list[Published]:
    """The published FID, in the order of `file`, which results/published/README.md describes.

    Raises FileNotFoundError when there is no such file.
    """
    with open(file, newline="", encoding="utf-8") as stream:
        return [Published(**row) for row in csv.DictReader(stream)]


def layout_tables(rows: Iterable[Row]) -> list[Table]:
    """Every table that rows of `read_rows` fill, value by value in the order of VALUE_FIELDS.

    For each value and comparable setting: mean ± standard deviation over seeds by epoch, for raw and for EMA weights;
    the best epoch of each series and kind of weights; that of the ablations; and the improvement of other paths
    over the diagonal, paired by seed. Then the value against NFE where more than one was measured. Error bars of
    single evaluations (ERROR_BAR_FIELDS) have no tables.

    Raises ValueError when there is no row.
    """
    results = named_results(rows)
    if not results:
        raise ValueError("There is no result to lay out: evaluate a checkpoint first.")
    published = read_published()
    ablated = [name for name, model in MODEL_CLASSES.items() if model.num_predictions < model.num_scales]
    tables = []
    for field in (field for field in VALUE_FIELDS if field not in ERROR_BAR_FIELDS):
        measured = [result for result in results if result[f"{field}_mean"] is not None]
        for setting in _groups(measured, SETTING_FIELDS):
            by_weights = [[result for result in setting if result["weights"] == weights] for weights in WEIGHTS_TITLES]
            tables += [_epoch_table(field, group, published) for group in by_weights if group]
            if VALUE_LAYOUTS[field].better is None:
                continue
            tables.append(_best_table(field, "best epochs", setting, "", partial(_published_text, field, published)))
            ablations = [result for result in setting if result["model_type"] in ablated]
            if ablations:
                tables.append(_ablation_table(field, ablations, published))
            tables += _improvement_tables(field, setting)
        for setting in _groups(measured, [name for name in SETTING_FIELDS if name != "nfe"]):
            tables += _nfe_tables(field, setting)
    return tables


def _groups(results: Iterable[Result], fields: Sequence[str]) -> list[list[Result]]:
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in fields), []).append(result)
    return [groups[key] for key in sorted(groups, key=lambda key: [natural_order(text) for text in key])]


def _ordered(series: Iterable[Series]) -> list[Series]:
    return sorted(set(series), key=lambda one: one.rank)


def _number(field: str, value: float) -> str:
    return f"{value:.{VALUE_LAYOUTS[field].digits}f}"


def _spread(field: str, mean: float, sd: float | None) -> str:
    return _number(field, mean) if sd is None else f"{_number(field, mean)} ± {_number(field, sd)}"


def _value_text(field: str, result: Result) -> str:
    return f"{_spread(field, result[f'{field}_mean'], result[f'{field}_sd'])} ({result[f'{field}_seeds']})"


def _goodness(field: str, result: Result) -> float:
    # The larger the better; constant for what is neither good nor bad.
    return result[f"{field}_mean"] * {"lower": -1, "higher": 1, None: 0}[VALUE_LAYOUTS[field].better]


def _is_published_kind(field: str, result: Result) -> bool:
    usual = not (result["series"].regime or result["series"].representation)
    trained = all(result[name] in ("", value) for name, value in PUBLISHED_TRAINING.items())
    alike = all(result[name] == value for name, value in PUBLISHED_SETTING.items())
    return field == "fid" and usual and trained and alike


def _published_text(field: str, published: Sequence[Published], result: Result) -> str:
    wanted = tuple(result[name] for name in ("model_type", "path_type", "coarse_from", "weights", "epoch"))
    if not _is_published_kind(field, result):
        return ""
    return "".join(f" [{number.text}]" for number in published if number[:5] == wanted)


def _title(field: str, what: str, setting: Row, with_nfe: bool = True) -> str:
    name = METRIC_TITLES[field]
    images = f"{int(setting['num_images']):,} images"
    where = ", ".join([setting["dataset"], images, *([f"NFE {setting['nfe']}"] if with_nfe else [])])
    return f"{name[0].upper()}{name[1:]}, {what}: {where}"


def _mean_note(field: str) -> str:
    better = VALUE_LAYOUTS[field].better
    said = f" {better.capitalize()} is better; the best is bold." if better else ""
    return f"Mean ± standard deviation over seeds (number of seeds).{said}"


def _note(field: str, results: Sequence[Result], said: str, rows: Iterable[Iterable[Cell]]) -> str:
    setting, text = results[0], "".join(cell.text for row in rows for cell in row)
    images = f"{int(setting['reference_images']):,} images, " if setting["reference_images"] else ""
    sentences = [
        said,
        "Square brackets: published." if "[" in text else "",
        parameters_note(results),
        f"Features {setting['metric_features']}, resize {setting['resize']}, reference {setting['reference']} "
        f"({images}{setting['reference_fingerprint']}), {setting['precision']}.",
    ]
    if field in FLOOR_FIELDS and setting["floor_images"]:
        sentences.append(f"Of {int(setting['floor_images']):,} real images.")
    num_images = int(setting["num_images"])
    if field == "fid" and num_images < MIN_FID_IMAGES:
        sentences.append(f"n = {num_images:,}: FID at another n does not compare.")
    if field in ("fid", "fid_infinity") and num_images < INCEPTION_FEATURES:
        sentences.append(f"Not comparable: fewer images than features ({INCEPTION_FEATURES:,}).")
    return " ".join(filter(None, sentences))


class _Entry(NamedTuple):
    labels: tuple[str, ...]
    series: Series
    text: str
    goodness: float


def _grid(entries: Iterable[_Entry]) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    # Titles of the series, and a row per labels that begins with them; the best of several series of it is marked.
    entries = list(entries)
    by_row: dict[tuple[str, ...], dict[Series, _Entry]] = {}
    for entry in entries:
        by_row.setdefault(entry.labels, {})[entry.series] = entry
    series = _ordered(entry.series for entry in entries)
    rows = []
    for labels in sorted(by_row, key=lambda labels: [natural_order(text) for text in labels]):
        row = by_row[labels]
        winners = _winners({name: entry.goodness for name, entry in row.items()})
        cells = [Cell(row[name].text if name in row else "", name in winners) for name in series]
        rows.append((*map(Cell, labels), *cells))
    return tuple(one.title for one in series), tuple(rows)


def _winners(goodness: Mapping[Hashable, float]) -> set[Hashable]:
    # Nobody wins where nobody is worse.
    best = max(goodness.values())
    return {name for name, value in goodness.items() if value == best} if best > min(goodness.values()) else set()


def _mean_entry(field: str, result: Result, label_fields: Sequence[str], beside: str = "") -> _Entry:
    labels = tuple(result[name] for name in label_fields)
    return _Entry(labels, result["series"], _value_text(field, result) + beside, _goodness(field, result))


def _epoch_table(field: str, results: Sequence[Result], published: Sequence[Published]) -> Table:
    entries = [_mean_entry(field, r, ("epoch",), _published_text(field, published, r)) for r in results]
    titles, rows = _grid(entries)
    title = _title(field, WEIGHTS_TITLES[results[0]["weights"]], results[0])
    return Table(title, _note(field, results, _mean_note(field), rows), ("epoch", *titles), 1, rows)


def _nfe_tables(field: str, results: Sequence[Result]) -> list[Table]:
    groups = _groups(results, ("weights", "epoch"))
    chosen = [result for group in groups if len({r["nfe"] for r in group}) > 1 for result in group]
    if not chosen:
        return []
    titles, rows = _grid(_mean_entry(field, result, ("epoch", "weights", "nfe")) for result in chosen)
    title = _title(field, "against NFE", chosen[0], with_nfe=False)
    columns = ("epoch", "weights", "NFE", *titles)
    return [Table(title, _note(field, chosen, _mean_note(field), rows), columns, 3, rows)]


def _best_table(field: str, what: str, results: Sequence[Result], said: str, beside: Callable[[Result], str]) -> Table:
    # Of equal epochs the first, so that more training has to pay.
    groups: dict[tuple[str, Series], list[Result]] = {}
    for result in results:
        groups.setdefault((result["weights"], result["series"]), []).append(result)
    best = [max(group, key=lambda result: _goodness(field, result)) for group in groups.values()]
    best.sort(key=lambda result: (result["series"].rank, result["weights"] == "ema"))
    winners = _winners({k: _goodness(field, result) for k, result in enumerate(best)})
    # Epochs say how much was trained where all are of as many images.
    counted = len({result["images_seen"] for result in best}) > 1
    rows = tuple(
        (
            Cell(result["series"].title),
            Cell(result["weights"]),
            Cell(result["epoch"]),
            *([Cell(f"{int(result['images_seen']):,}" if result["images_seen"] else "")] if counted else []),
            Cell(_value_text(field, result) + beside(result), k in winners),
        )
        for k, result in enumerate(best)
    )
    note = _note(field, best, f"The best epoch of each. {_mean_note(field)}{said}", rows)
    labels = (MODEL_AND_PATH, "weights", "best epoch", *(["images seen"] if counted else []))
    return Table(_title(field, what, best[0]), note, (*labels, METRIC_TITLES[field]), len(labels), rows)


def _ablation_table(field: str, results: Sequence[Result], published: Sequence[Published]) -> Table:
    def beside(result: Result) -> str:
        # The study names neither the kind of weights of its ablations nor that of their DP path.
        path_type = "dp" if result["path_type"].startswith("dp_") else result["path_type"]
        wanted = (result["model_type"], path_type, result["coarse_from"], "")
        numbers = [number for number in published if number[:4] == wanted and _is_published_kind(field, result)]
        return "".join(f" [{n.text}{f', epoch {n.epoch}' if n.epoch else ''}]" for n in numbers)

    shown = any(beside(result) for result in results)
    said = " Published: the best of one seed, weights and kind of DP path not stated." if shown else ""
    return _best_table(field, "ablations", results, said, beside)


class Improvement(NamedTuple):
    """By how much a path is better than the diagonal of the same checkpoint, over the seeds both have."""

    mean: float  # positive where the path is better
    sd: float | None  # of the differences seed by seed; None below two of them
    percent: float | None  # of the diagonal's mean; None unless that is positive
    num_seeds: int  # 0 where no seed is shared, so that means over different seeds were subtracted


def improvement(diagonal: Mapping[str, float], path: Mapping[str, float], better: str = "lower") -> Improvement:
    """Compare values by seed: diagonal minus path where lower is better, path minus diagonal where higher is.

    The difference is paired: its mean, standard deviation (divided by n - 1) and per cent are over the seeds that both
    have. Without such a seed it is the difference of the two means. Raises ValueError when either has no value.
    """
    if not diagonal or not path:
        raise ValueError("An improvement needs at least one value of the diagonal and one of the path.")
    sign = 1 if better == "lower" else -1
    shared = [seed for seed in diagonal if seed in path]
    differences = [sign * (diagonal[seed] - path[seed]) for seed in shared]
    base = statistics.fmean([diagonal[seed] for seed in shared] or diagonal.values())
    mean = statistics.fmean(differences) if shared else sign * (base - statistics.fmean(path.values()))
    sd = statistics.stdev(differences) if len(shared) > 1 else None
    return Improvement(mean, sd, 100 * mean / base if base > 0 else None, len(shared))


def _improvement_text(field: str, gain: Improvement) -> str:
    percent = [] if gain.percent is None else [f"{gain.percent:.1f} %"]
    seeds = str(gain.num_seeds) if gain.num_seeds else "unpaired"
    return f"{_spread(field, gain.mean, gain.sd)} ({', '.join([*percent, seeds])})"


def _improvement_tables(field: str, results: Sequence[Result]) -> list[Table]:
    entries, compared = [], []
    for checkpoint in _groups(results, ("weights", "epoch", "checkpoint_fingerprint")):
        diagonals = [result for result in checkpoint if result["path_type"] == "diagonal"]
        for result in checkpoint:
            if result["path_type"] == "diagonal":
                continue
            same = [base for base in diagonals if _is_diagonal_of(result, base)]
            for base in same:
                series = result["series"]
                if len(same) > 1:
                    over = f"over path {base['path_fingerprint']}"
                    series = series._replace(sampling=(*series.sampling, over))
                gain = improvement(_by_seed(field, base), _by_seed(field, result), VALUE_LAYOUTS[field].better)
                labels = result["epoch"], result["weights"]
                entries.append(_Entry(labels, series, _improvement_text(field, gain), gain.mean))
                compared.append(result)
    if not entries:
        return []
    titles, cells = _grid(entries)
    difference = "Diagonal minus path" if VALUE_LAYOUTS[field].better == "lower" else "Path minus diagonal"
    said = (
        f"{difference}, positive where the path is better: mean ± standard deviation of the differences seed by seed "
        f"(per cent of the diagonal, number of seeds). The best is bold."
    )
    title = _title(field, "improvement over the diagonal", results[0])
    return [Table(title, _note(field, compared, said, cells), ("epoch", "weights", *titles), 2, cells)]


def _is_diagonal_of(result: Result, base: Result) -> bool:
    # Of two coarse feeds or solvers, each has a diagonal of its own.
    same = all(result[name] == base[name] for name in ("coarse_from", "solver", "guidance"))
    return same and result["series"].model == base["series"].model


def _by_seed(field: str, result: Result) -> dict[str, float]:
    return {row["seed"]: float(row[field]) for row in result["rows"] if row[field]}
