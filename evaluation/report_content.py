"""What a report says: the scores that compare, their curves and warnings, captions of the figures, and the settings."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.result_layout import (
    INCEPTION_FEATURES,
    MIN_FID_IMAGES,
    SETTING_FIELDS,
    VALUE_LAYOUTS,
    WEIGHTS_TITLES,
)
from evaluation.results_table import (
    RESULT_FIELDS,
    VALUE_FIELDS,
    natural_order,
    read_numbered_rows,
)
from evaluation.series import Result, Row, Series, named_results, parameters_note
from evaluation.targets import LABELS, target_title, unmeasured, verdicts
from evaluation.training_columns import TRAINING_FIELDS
from figures.page import Content, FactTable, Group, Number, Picture, ScoreTable, embed
from figures.scores import METRIC_TITLES, plot_scores_against_epoch, plot_scores_against_nfe
from paths.schedule_file import load_schedule
from planning.map_file import load_heatmap
from runtime.errors import need_file

# Scores that differ in one of these share no section; NFE is an axis of its own here.
COMPARABLE = tuple(field for field in SETTING_FIELDS if field != "nfe")
DEFAULT_NFE = 18  # --num_steps of every stage
# The levels of the sliced Wasserstein distance are in the tables, and real images have no curve.
CURVE_FIELDS = tuple(field for field in VALUE_LAYOUTS if not field.startswith("swd_") and not field.endswith("_real"))
GRID_ENLARGED = 3  # Pixels of the page per pixel of a grid, at most.

# A reader who comes from a number looks for what was measured first.
_FIRST_FIELDS = ("model_type", "path_type", "weights", "epoch", "nfe", "seed", "metric", *VALUE_FIELDS)
ROW_FIELDS = (*_FIRST_FIELDS, *(field for field in RESULT_FIELDS if field not in _FIRST_FIELDS))


def read_table(file: Path) -> list[Row]:
    """The rows of a results table, each with its `line` in the file, whose header is line 1.

    Raises FileNotFoundError if the file is missing, ValueError if it has no row, and what `read_numbered_rows` raises.
    """
    rows = read_numbered_rows(need_file(file, "Results table", "evaluate with eval_fid_batch.py first"))
    if not rows:
        raise ValueError(f"{file} holds no result; evaluate a checkpoint first with eval_fid_batch.py.")
    return [row | {"line": number} for number, row in rows.items()]


def _values(row: Row | Result, fields: Iterable[str]) -> tuple[str, ...]:
    return tuple(row[field] for field in fields)


def _grouped(rows: Iterable[Any], fields: Iterable[str]) -> dict[tuple[str, ...], list[Any]]:
    fields = tuple(fields)
    groups: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(_values(row, fields), []).append(row)
    return {name: groups[name] for name in sorted(groups, key=lambda name: [natural_order(text) for text in name])}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(field: str, result: Result) -> Number:
    digits = VALUE_LAYOUTS[field].digits
    mean, sd = result[f"{field}_mean"], result[f"{field}_sd"]
    text = f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")
    # A true minus is as wide as a digit and never taken for a hyphen.
    return Number(text.replace("-", "−"), [row["line"] for row in result["rows"] if row[field]])


def _best_of(field: str, results: Sequence[Result]) -> set[int]:
    # Positions of the best mean; nobody wins where nobody is worse.
    means = {k: result[f"{field}_mean"] for k, result in enumerate(results) if result is not None}
    means = {k: mean for k, mean in means.items() if mean is not None}
    better = VALUE_LAYOUTS[field].better
    if better is None or len(set(means.values())) < 2:
        return set()
    best = (min if better == "lower" else max)(means.values())
    return {k for k, mean in means.items() if mean == best}


def main_nfe(results: Iterable[Result]) -> str:
    """The NFE with most results; of equals 18, otherwise the largest."""
    counts = Counter(result["nfe"] for result in results)
    return max(counts, key=lambda nfe: (counts[nfe], nfe == str(DEFAULT_NFE), int(nfe)))


def headline_table(results: Sequence[Result], nfe: str) -> ScoreTable:
    """Every model and path at one NFE, its last epoch, one column per value; raw and EMA weights are blocks.

    A row is one checkpoint along one path.
    """
    results = [result for result in results if result["nfe"] == nfe]
    # Each model was trained to a last epoch of its own.
    last: dict[tuple[Series, str], int] = {}
    for result in results:
        key = result["series"].model, result["weights"]
        last[key] = max(int(result["epoch"]), last.get(key, 0))
    results = [r for r in results if int(r["epoch"]) == last[r["series"].model, r["weights"]]]
    one_epoch = len({result["epoch"] for result in results}) == 1
    fields = [f for f in VALUE_LAYOUTS if any(result[f"{f}_mean"] is not None for result in results)]
    blocks = []
    for (weights,), block in reversed(_grouped(results, ("weights",)).items()):
        by_row: dict[Series, list[Result]] = {}
        for result in sorted(block, key=lambda result: result["series"].rank):
            by_row.setdefault(result["series"], []).append(result)
        columns = []
        for field in fields:
            column = [next((r for r in row if r[f"{field}_mean"] is not None), None) for row in by_row.values()]
            best = _best_of(field, column)
            columns.append([r and _number(field, r)._replace(is_best=k in best) for k, r in enumerate(column)])
        labels = [[series.title, *([] if one_epoch else [row[0]["epoch"]])] for series, row in by_row.items()]
        rows = [(label, list(numbers)) for label, numbers in zip(labels, zip(*columns, strict=True), strict=True)]
        blocks.append((_capitalised(WEIGHTS_TITLES[weights]), rows))
    when = f"epoch {results[0]['epoch']}" if one_epoch else "last epoch measured"
    caption = " ".join([f"{nfe} network calls, {when}. {_described(results[0])}.", parameters_note(results)]).strip()
    columns = [_column_title(field) for field in fields]
    return ScoreTable(caption, ["Model and path", *([] if one_epoch else ["Epoch"])], columns, blocks)


def _column_title(field: str) -> str:
    arrow = {"lower": "\u00a0↓", "higher": "\u00a0↑", None: ""}[VALUE_LAYOUTS[field].better]
    return _capitalised(METRIC_TITLES[field]) + arrow


def _described(result: Result) -> str:
    images = f", {int(result['reference_images']):,} images" if result["reference_images"] else ""
    return (
        f"{int(result['num_images']):,} images per seed of {result['dataset']} against the reference "
        f"{result['reference']} ({result['reference_fingerprint']}{images}); features {result['metric_features']}, "
        f"resize {result['resize']}, {result['precision']}"
    )


def warnings_of(result: Result) -> list[str]:
    """Why the scores of a comparable group are to be read with care, in sentences."""
    count = int(result["num_images"])
    if result["metric_features"].startswith("inception") and count < INCEPTION_FEATURES:
        return [
            f"Not comparable: {count:,} images are fewer than the {INCEPTION_FEATURES:,} Inception features, so that "
            f"their covariance is singular and FID says little. These scores compare with nothing but each other."
        ]
    if count < MIN_FID_IMAGES:
        return [
            f"Few images: {count:,} per seed are fewer than {MIN_FID_IMAGES:,}, and the scores are biased by an amount "
            f"that depends on that number. They compare with scores over exactly as many images only."
        ]
    return []


def curve_points(results: Iterable[Result], field: str, axis: str) -> dict[str, dict[str, dict[int, Result]]]:
    """Results by weights (raw first), series, and `axis` ("epoch" or "nfe")."""
    panels: dict[str, dict[str, dict[int, Result]]] = {}
    for result in sorted(results, key=lambda r: (r["weights"] == "ema", r["series"].rank, int(r[axis]))):
        if result[f"{field}_mean"] is not None:
            points = panels.setdefault(result["weights"], {}).setdefault(result["series"].title, {})
            points[int(result[axis])] = result
    return panels


def draw_curves(results: Sequence[Result], nfe: str) -> list[tuple[Picture, ScoreTable]]:
    """Every value against the epoch (at `nfe`) and against NFE (at the epoch with most of them), if there are several.

    Each figure comes with the table of its numbers.
    """
    curves = []
    for field in CURVE_FIELDS:
        measured = [result for result in results if result[f"{field}_mean"] is not None]
        if not measured:
            continue
        spread = _grouped(measured, ("epoch",))
        (epoch,) = max(spread, key=lambda key: (len({r["nfe"] for r in spread[key]}), int(key[0])))
        at_nfe = [result for result in measured if result["nfe"] == nfe]
        axes = {"epoch": (at_nfe, f"{nfe} network calls"), "nfe": (spread[epoch,], f"epoch {epoch}")}
        for axis, (chosen, fixed) in axes.items():
            if len({result[axis] for result in chosen}) > 1:
                curves.append(_curve(field, axis, chosen, fixed))
    return curves


def _curve(field: str, axis: str, chosen: Sequence[Result], fixed: str) -> tuple[Picture, ScoreTable]:
    panels = curve_points(chosen, field, axis)
    plot = {"epoch": plot_scores_against_epoch, "nfe": plot_scores_against_nfe}[axis]
    scores = {
        weights: {
            name: {x: (result[f"{field}_mean"], result[f"{field}_sd"]) for x, result in points.items()}
            for name, points in curves.items()
        }
        for weights, curves in panels.items()
    }
    name = _capitalised(METRIC_TITLES[field])
    label = f"{name}, {int(chosen[0]['num_images']):,} images"
    what = {"epoch": "the epoch", "nfe": "network calls (NFE)"}[axis]
    caption = f"{name} against {what}, {fixed}: mean and band of ± one standard deviation over seeds."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curve.png"
        plot(scores, file, ylabel=label)
        picture = embed(file, f"Line chart of {name} against {what}. {_told(scores, field)}", caption)
    return picture, _curve_table(field, axis, panels, f"Numbers of the figure above: {name}, {fixed}.")


def _told(scores: dict[str, dict[str, dict[int, tuple[float, float | None]]]], field: str) -> str:
    # What a sighted reader takes from a line chart first: where each curve begins and ends.
    sentences = []
    for weights, curves in scores.items():
        ends = []
        for name, points in curves.items():
            (first, (start, _)), (last, (end, _)) = min(points.items()), max(points.items())
            digits = VALUE_LAYOUTS[field].digits
            span = f" at {first} to {end:.{digits}f} at {last}" if last > first else f" at {first} alone"
            ends.append(f"{name} from {start:.{digits}f}{span}" if last > first else f"{name} {start:.{digits}f}{span}")
        sentences.append(f"{_capitalised(WEIGHTS_TITLES[weights])}: {'; '.join(ends)}.")
    return " ".join(sentences)


def _curve_table(field: str, axis: str, panels: dict[str, dict[str, dict[int, Result]]], caption: str) -> ScoreTable:
    xs = sorted({x for curves in panels.values() for points in curves.values() for x in points})
    blocks = []
    for weights, curves in panels.items():
        columns = [[points.get(x) for points in curves.values()] for x in xs]
        best = [_best_of(field, column) for column in columns]
        rows = []
        for k, (name, points) in enumerate(curves.items()):
            row = [(c, points.get(x)) for c, x in enumerate(xs)]
            rows.append(([name], [r and _number(field, r)._replace(is_best=k in best[c]) for c, r in row]))
        blocks.append((_capitalised(WEIGHTS_TITLES[weights]), rows))
    unit = {"epoch": "Epoch", "nfe": "NFE"}[axis]
    return ScoreTable(caption, ["Model and path"], [f"{unit} {x}" for x in xs], blocks)


def _files(folder: Path, pattern: str) -> list[Path]:
    # Epoch 1000 comes after epoch 200, and EMA after raw weights, whether these are named or not.
    def order(file: Path) -> list[tuple[int, float, str]]:
        name = str(file.relative_to(folder)).replace("_raw", "")
        return [natural_order(part) for part in re.split(r"(\d+)", name)]

    return sorted(folder.glob(pattern), key=order)


def heatmap_pictures(folder: Path, scored: set[str]) -> tuple[list[Picture], list[str]]:
    """Error maps with captions from their .pth, and sentences on what is missing."""
    pictures, notes = [], []
    files = [*_files(folder, "heatmap_*ep*.png"), *_files(folder, "heatmap_*ep*.pth")]
    names = [file.stem.removesuffix("_maps") for file in files]
    for name in dict.fromkeys(names):
        source = folder / f"{name}.pth"
        content = load_heatmap(source) if source.is_file() else None
        about = f"{source.name} is missing, so its settings are unknown"
        if content is not None:
            try:
                about = _heatmap_caption(content, scored)
            except KeyError as error:
                raise ValueError(f"Heatmap {source} lacks {error}; make it with compute_heatmap_30.py.") from error
        views = {
            folder / f"{name}.png": (
                "Heat maps over coarse timestep (across) and fine timestep (up, clean on top): the error of a step on "
                "the fine scale and, for a model that predicts both, on both scales, brighter where larger, each with "
                "the path of least error from noise at the lower left to the clean image at the upper right.",
                "Error of a step at every pair of timesteps, with the optimal paths",
            ),
            folder / f"{name}_maps.png": (
                "Heat maps over the log SNR of both scales: the Jacobian blocks, and the denoising errors of the fine "
                "and of the coarse image, as far as they were measured, brighter where larger.",
                "What was measured: Jacobian blocks and denoising errors",
            ),
        }
        if not any(file.is_file() for file in views):
            notes.append(f"{source.name} has not been drawn; compute_heatmap_30.py --plot_only does it.")
        pictures += [embed(file, alt, f"{what}. {about}.") for file, (alt, what) in views.items() if file.is_file()]
    return pictures, notes


def _heatmap_caption(content: dict[str, Any], scored: set[str]) -> str:
    model_type = content.get("model_type", "dual")
    epoch = "Epoch" if model_type == "dual" else f"{model_type}, epoch"
    parts = [
        f"{epoch} {content['epoch']}, {WEIGHTS_TITLES[content['weights']]} ({content['fingerprint']}"
        f"{'' if content['fingerprint'] in scored else ', not in the results table'})",
        f"K = {content['K']}, {content['batch']} images of {content['data_fingerprint']}",
        f"{content['grid']} × {content['grid']} lines {content['grid_spacing']} of {content['beta_schedule']}",
    ]
    if "costs" in content:
        costs = ", ".join(f"DP-{name.title()} {cost:.4g}" for name, cost in content["costs"].items())
        parts.append(f"{content['num_steps']} steps, factor {content['factor']}, costs {costs}")
    return "; ".join(parts)


def path_pictures(folder: Path) -> list[Picture]:
    """Paths across epochs first, then those of one epoch beside each other."""
    across = "paths_across_epochs.png", "paths_epochs.png"
    pictures = []
    for file in sorted(_files(folder, "paths_*.png"), key=lambda file: file.name not in across):
        found = re.fullmatch(r"paths_(\d+)ep_(raw|ema)", file.stem)
        if file.name in across:
            alt = "Panels of fine against coarse timestep, one per epoch and kind of weights, each with the DP-64 and "
            alt += "the DP-Total path from noise at the lower left to clean at the upper right, beside the diagonal."
            caption = "Published paths, epochs side by side"
        else:
            alt = "Left: paths in the plane of fine and coarse timestep, from noise to clean. Right: both timesteps of "
            alt += "each path against the network calls made so far."
            of = f", epoch {found[1]}, {WEIGHTS_TITLES[found[2]]}" if found else ""
            caption = f"Paths beside each other{of}"
        pictures.append(embed(file, alt, f"{caption} ({file.name})."))
    return pictures


def sample_pictures(folder: Path, scored: set[str]) -> tuple[list[Picture], list[Picture]]:
    """Samples of equal seeds in rows (samples_*ep_*.png), and the grid of every folder of samples that has one."""
    rows = []
    for file in _files(folder, "samples_*ep_*.png"):
        found = re.fullmatch(r"samples_(\d+)ep_(raw|ema)", file.stem)
        of = f", epoch {found[1]}, {WEIGHTS_TITLES[found[2]]}" if found else ""
        alt = "Rows of generated images, one row per model and path as named at the left; images of a column share "
        alt += "their seed."
        rows.append(embed(file, alt, f"Samples of equal seeds{of} ({file.name})."))
    grids = []
    # Earlier versions drew the grid beside the images.
    for file in [*_files(folder, "samples/*/figures/grid.png"), *_files(folder, "samples/*/grid.png")]:
        place = file.parent.parent if file.parent.name == "figures" else file.parent
        alt = f"Grid of generated images of {place.name}, eight to a row, in the order of their seeds."
        grids.append(embed(file, alt, _samples_caption(place, scored), GRID_ENLARGED))
    return rows, grids


def _samples_caption(folder: Path, scored: set[str]) -> str:
    parts = []
    file = folder / "schedule.json"
    if file.is_file():
        path = load_schedule(file)
        parts.append(f"path {path.kind}, NFE {path.nfe}, fingerprint {path.fingerprint()}")
    file = folder / "settings.json"
    if file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            weights = settings.pop("weights_fingerprint")
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}); generate into another folder.") from error
        parts.append(f"weights {weights}{'' if weights in scored else ', not in the results table'}")
        parts += [f"{name} {value}" for name, value in settings.items() if name != "path_fingerprint"]
    seeds = sorted(int(png.stem) for png in folder.glob("*.png") if png.stem.isdigit())
    if seeds:
        parts.append(f"{len(seeds):,} images in the folder, seeds {seeds[0]} to {seeds[-1]}")
    missing = [name for name in ("schedule.json", "settings.json") if not (folder / name).is_file()]
    parts += [f"{name} is missing" for name in missing]
    return f"{folder.name}: {'; '.join(parts)}."


def fact_tables(rows: Sequence[Row]) -> list[FactTable]:
    """Checkpoints, references, paths and features, as they occur in the rows."""

    trained = {field: field for field in TRAINING_FIELDS}

    def table(caption: str, **fields: str) -> FactTable:
        # Rows of earlier versions say nothing of the training.
        fields = {name: title for name, title in fields.items() if name not in trained or any(r[name] for r in rows)}
        groups = _grouped(rows, fields)
        members = [(list(key), [row["line"] for row in group]) for key, group in groups.items()]
        return FactTable(caption, [name.replace("_", " ") for name in fields.values()], members)

    return [
        table(
            "Checkpoints",
            model_type="Model",
            regime="Timestep pairs",
            representation="Scales",
            epoch="Epoch",
            weights="Weights",
            checkpoint="File",
            checkpoint_fingerprint="Fingerprint",
            precision="Precision",
            **trained,
        ),
        table(
            "Paths",
            path_type="Path",
            coarse_from="Coarse image",
            solver="Solver",
            nfe="NFE",
            path_fingerprint="Fingerprint",
        ),
        table(
            "References",
            dataset="Data set",
            reference="Reference",
            reference_images="Images",
            floor_images="Real images of the floor",
            reference_fingerprint="Fingerprint",
        ),
        table(
            "Metrics",
            metric="Metric",
            metric_features="Features",
            resize="Resize filter",
            num_images="Images per seed",
        ),
    ]


def fact_tables_of_targets(rows: Sequence[Row], name: str) -> list[FactTable]:
    """Every result beside a target of the report `name`, those of all runs side by side."""
    tables = []
    for group in verdicts(rows, name):
        headers = [*LABELS, METRIC_TITLES[group[0].target.field], "target", "met"]
        members = [
            (
                [*verdict.labels, verdict.value, verdict.target.text, "yes" if verdict.met else "no"],
                [row["line"] for row in verdict.result["rows"] if row[verdict.target.field]],
            )
            for verdict in group
        ]
        tables.append(FactTable(target_title(name, group), [_capitalised(header) for header in headers], members))
    return tables


def gather(results: Path, folder: Path, title: str, nfe: int | None = None, targets: str | None = None) -> Content:
    """What a page says of a results table and of the folder with its figures; of `nfe` calls in the headline tables.

    targets: a name of `evaluation.targets.TARGETS`, against which the scores are set.

    Raises FileNotFoundError if the table or the folder is missing, and ValueError for a table without rows, a damaged
    picture, heatmap, schedule or settings file (named), and an NFE that no row has.
    """
    rows = read_table(results)
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"Folder {folder} does not exist"
        raise FileNotFoundError(f"{what}; pass the folder with the figures as --folder.")
    groups = []
    comparable = _grouped(named_results(rows), COMPARABLE)
    if nfe is not None and all(row["nfe"] != str(nfe) for row in rows):
        raise ValueError(f"{results} has no result of {nfe} network calls; pass another --nfe.")
    for members in comparable.values():
        has_nfe = any(result["nfe"] == str(nfe) for result in members)
        calls = str(nfe) if has_nfe else main_nfe(members)
        first = members[0]
        measured = [f for f in CURVE_FIELDS if any(result[f"{f}_mean"] is not None for result in members)]
        scores = ", ".join(METRIC_TITLES[field] for field in measured)
        title_of = f"{_capitalised(scores)}: {first['dataset']}, {int(first['num_images']):,} images"
        headline, curves = headline_table(members, calls), draw_curves(members, calls)
        groups.append((measured, Group(title_of, _described(first), warnings_of(first), headline, curves)))
    # Metrics come in the order of the table's columns.
    groups = [group for _, group in sorted(groups, key=lambda pair: [CURVE_FIELDS.index(f) for f in pair[0]])]
    scored = {row["checkpoint_fingerprint"] for row in rows}
    heatmaps, notes = heatmap_pictures(folder, scored)
    paths, (sample_rows, grids) = path_pictures(folder), sample_pictures(folder, scored)
    # What all rows share is said once.
    values = {field: {row[field] for row in rows} for field in ROW_FIELDS}
    shared = {field: min(v) for field, v in values.items() if len(v) == 1 and len(rows) > 1 and v != {""}}
    return Content(
        title=title,
        results=results.name,
        groups=groups,
        targets=fact_tables_of_targets(rows, targets) if targets else [],
        target_notes=unmeasured(rows, targets) if targets else [],
        heatmaps=heatmaps,
        heatmap_notes=notes,
        paths=paths,
        sample_rows=sample_rows,
        grids=grids,
        facts=fact_tables(rows),
        rows=rows,
        row_fields=[f for f in ROW_FIELDS if f not in shared and values[f] != {""}],
        shared=shared,
        empty_fields=[f for f in ROW_FIELDS if values[f] == {""}],
    )
