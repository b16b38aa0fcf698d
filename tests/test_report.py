"""The report: every number is the mean of the rows it links to, and the page works in a real browser."""

import base64
import csv
import io
import re
import shutil
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import figures.page
import report
from conftest import run_stage
from evaluation.report_content import gather, main_nfe
from evaluation.results_table import append_row
from figures.page import render, runs_of
from paths.path import Path as PathOfTimesteps
from paths.schedule_file import save_schedule
from planning.map_file import save_heatmap
from scheduler import DDIMScheduler

SERIES = {
    ("baseline", "diagonal"): "Baseline",
    ("dual", "diagonal"): "LIFT diagonal",
    ("dual", "dp_64"): "LIFT DP-64",
}
VOID = {"meta", "link", "img", "wbr"}


class Node:
    """An element: its tag, attributes, and children, which are elements and texts."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def __getitem__(self, name):
        return self.attributes[name]

    @property
    def text(self):
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())

    def all(self, tag, **attributes):
        """Elements below this one, in the order of the page."""
        for child in self.children:
            if isinstance(child, Node):
                wanted = {name.rstrip("_"): value for name, value in attributes.items()}
                if child.tag == tag and wanted.items() <= child.attributes.items():
                    yield child
                yield from child.all(tag, **attributes)

    def one(self, tag, **attributes):
        (found,) = self.all(tag, **attributes)
        return found


class Tree(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.root = Node("document", {})
        self.open = [self.root]
        self.feed(page)
        assert self.open == [self.root], "an element is not closed"

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes)
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.open[-1].children.append(data)


def build(*arguments, **options):
    """The page of these files, as the stage makes it."""
    return render(gather(*arguments, **options))


def parse(page):
    return Tree(page).root


def make_row(k, **changes):
    """Row k: FID of an own checkpoint, like no other row's."""
    rng = np.random.default_rng(k)
    return {
        "checkpoint_fingerprint": "c0ffee",
        "weights": "raw",
        "path_fingerprint": "abc",
        "nfe": 18,
        "seed": 42,
        "num_images": 15803,
        "metric": "fid",
        "metric_features": "inception-0123456789abcdef",
        "resize": "pytorch-fid",
        "reference_fingerprint": "def",
        "precision": "fp32",
        "dataset": "cats",
        "reference": "train",
        "reference_images": 15803,
        "model_type": "dual",
        "epoch": 200,
        "path_type": "diagonal",
        "fid": round(rng.uniform(20, 90), 4) if changes.get("metric", "fid") == "fid" else None,
        "date": "2025-01-31T23:59:59Z",
    } | changes


def write_table(file):
    """Three series, both weights, two epochs, two NFEs, three seeds; a torn line and a repetition among them."""
    k = 0
    for model, path in SERIES:
        for weights in ("raw", "ema"):
            for epoch, nfe in ((200, 18), (400, 18), (400, 6)):
                for seed in (42, 43, 44):
                    k += 1
                    fixed = {
                        "weights": weights,
                        "epoch": epoch,
                        "nfe": nfe,
                        "seed": seed,
                        "path_fingerprint": path + str(nfe),
                    }
                    fixed |= {
                        "model_type": model,
                        "path_type": path,
                        "checkpoint_fingerprint": f"{model}{weights}{epoch}",
                    }
                    append_row(file, make_row(k, **fixed))
                    if nfe == 18 and epoch == 400:
                        values = {"metric": "kid", "kid": round(0.001 * k, 5), "kid_sd": 0.0001}
                        append_row(file, make_row(k, **fixed, **values))
                    if k == 7:
                        with open(file, "a") as stream:
                            stream.write("c0ffee,raw,ab\n")
                    if k == 12:  # The same evaluation again, with another value, which counts.
                        append_row(file, make_row(k, **fixed, fid=77.0))


def lines_of(file):
    """What is in the file, by line number, found without the code under test."""
    lines = file.read_text().splitlines()
    fields = lines[0].split(",")
    rows = {k: next(csv.reader([line])) for k, line in enumerate(lines[1:], start=2)}
    return {k: dict(zip(fields, row, strict=True)) for k, row in rows.items() if len(row) == len(fields)}


def write_png(file, seed=0, size=(40, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def write_heatmap(file, **changes):
    settings = {"fingerprint": "dualema400", "weights": "ema", "epoch": 400, "K": 3, "batch": 24, "grid": 30}
    settings |= {"grid_spacing": "uniform_t", "data_fingerprint": "feed", "beta_schedule": "cosine_clipped"}
    settings |= {"factor": "B", "num_steps": 18, "costs": {"64": 0.9325, "total": 4.6666}, "t_grid": torch.arange(3)}
    save_heatmap(file, settings | changes)


EMPTY_MAP = {"t_grid": torch.arange(3), "fingerprint": "f"}


def write_samples(folder, first=42_000_000, count=3):
    write_png(folder / "figures/grid.png", 5, (274, 70))
    for k in range(count):
        write_png(folder / f"{first + k:012d}.png", k, (8, 8))
    (folder / "settings.json").write_text('{"weights_fingerprint": "dualraw400", "eta": 0.5, "end": "clean"}')
    path = PathOfTimesteps([(999, 999), (500, 400), (0, 0)], "dp_64", {})
    log_snr = DDIMScheduler(beta_schedule="cosine_clipped").log_snr.numpy()
    save_schedule(path, folder / "schedule.json", log_snr, solver={"name": "ddim"})
    return path


PICTURES = (
    "heatmap_30_400ep.png",
    "heatmap_30_400ep_maps.png",
    "heatmap_30_400ep_ema.png",
    "heatmap_30_400ep_ema_maps.png",
    "paths_across_epochs.png",
    "paths_400ep_raw.png",
    "paths_400ep_ema.png",
    "samples_400ep_raw.png",
    "samples_400ep_ema.png",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a table and one picture of every kind."""
    folder = tmp_path_factory.mktemp("results")
    write_table(folder / "fid_results.csv")
    for k, name in enumerate(PICTURES):
        write_png(folder / name, k, (1590, 810) if k < 2 else (900, 300))
    write_heatmap(folder / "heatmap_30_400ep_ema.pth")
    write_heatmap(folder / "heatmap_30_400ep.pth", weights="raw", fingerprint="0dd")
    write_heatmap(folder / "heatmap_30_1000ep.pth", epoch=1000)
    write_samples(folder / "samples" / "lift_400ep_raw_dp_64_2")
    write_png(folder / "samples" / "no_grid" / "000042000000.png")
    return folder


@pytest.fixture(scope="module")
def page(place):
    with pytest.warns(UserWarning, match="line 12 is not a whole result"):
        return build(place / "fid_results.csv", place, "A title")


def cells_with_numbers(root, section):
    """(caption, block, row label, column, cell) of every number in the tables of a section."""
    for table in root.one("section", id=section).all("table"):
        columns = [th.text for th in table.one("thead").all("th")]
        for body in table.all("tbody"):
            block, *rows = body.all("tr")
            for row in rows:
                entries = [child for child in row.children if isinstance(child, Node)]
                assert len(entries) == len(columns)
                for column, cell in zip(columns, entries, strict=True):
                    if cell.attributes.get("class") == "number":
                        yield table.one("caption").text, block.text, entries[0].text, column, cell


def test_feeds_and_regimes_have_rows_of_their_own(tmp_path):
    file = tmp_path / "fid_results.csv"
    made = []
    for k, (model, feed, regime, epoch) in enumerate(
        [
            ("dual", "", "independent", 400),
            # Its last epoch is another one.
            ("dual", "", "shift:2", 200),
            ("single_t", "x0", "independent", 400),
            ("single_t", "noisy", "independent", 400),
        ]
    ):
        prints = {"checkpoint_fingerprint": f"{model}{regime}", "path_fingerprint": f"abc-{feed}"}
        made.append(make_row(k, model_type=model, coarse_from=feed, regime=regime, epoch=epoch, **prints))
        append_row(file, made[-1])
    root = parse(build(file, tmp_path, "A title"))
    found = {label: cell.text.split()[0] for _, _, label, _, cell in cells_with_numbers(root, "scores")}
    names = ["LIFT diagonal", "LIFT diagonal, shift:2", "single_t diagonal, x0", "single_t diagonal, noisy"]
    assert found == {name: f"{row['fid']:.2f}" for name, row in zip(names, made, strict=True)}


def links_of(cell):
    return [int(link["href"].removeprefix("#row-")) for link in cell.all("a")]


def check_number(cell, field, digits, rows, **wanted):
    """The cell says mean ± sd of the rows it links to, and these are all that agree with `wanted`, by seed the last."""
    wanted = {name: str(value) for name, value in wanted.items()}
    matching = {row["seed"]: k for k, row in rows.items() if wanted.items() <= row.items() and row[field]}
    assert sorted(links_of(cell)) == sorted(matching.values()) and len(matching) == 3
    values = [float(rows[k][field]) for k in matching.values()]
    text = f"{sum(values) / 3:.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    assert re.fullmatch(f"{re.escape(text)} (best )?n = 3: [0-9 ]+", cell.text)
    return sum(values) / 3


WEIGHTS = {"Raw weights": "raw", "EMA weights": "ema"}
TYPES = {title: {"model_type": model, "path_type": path} for (model, path), title in SERIES.items()}


def test_headline_numbers_are_the_means_of_the_rows_they_link_to(place, page):
    rows, means = lines_of(place / "fid_results.csv"), {}
    for caption, block, label, column, cell in cells_with_numbers(parse(page), "scores"):
        assert "18 network calls, epoch 400. 15,803 images per seed of cats" in caption
        assert "train (def, 15,803 images)" in caption and "inception-0123456789abcdef" in caption
        field, digits = {"FID ↓": ("fid", 2), "KID ↓": ("kid", 5)}[column]
        wanted = TYPES[label] | {"weights": WEIGHTS[block], "epoch": 400, "nfe": 18, "metric": field}
        means[block, column, label] = check_number(cell, field, digits, rows, **wanted), "best" in cell.text
    assert len(means) == 2 * 2 * 3
    for block, column in {key[:2] for key in means}:
        marked = {label: means[block, column, label] for label in TYPES}
        assert [label for label, (_, best) in marked.items() if best] == [min(marked, key=lambda k: marked[k][0])]


def test_numbers_of_curves_are_the_means_of_the_rows_they_link_to(place, page):
    rows, count = lines_of(place / "fid_results.csv"), 0
    for caption, block, label, column, cell in cells_with_numbers(parse(page), "curves"):
        axis, x = column.split()
        fixed = {"nfe": 18} if "18 network calls" in caption else {"epoch": 400}
        wanted = TYPES[label] | {"weights": WEIGHTS[block], "metric": "fid", axis.lower(): x} | fixed
        check_number(cell, "fid", 2, rows, **wanted)
        count += 1
    assert count == 2 * 2 * 3 * 2  # figures, weights, series, points


def test_a_repetition_counts_once_and_the_last_one(place, page):
    rows = lines_of(place / "fid_results.csv")
    (last,) = (k for k, row in rows.items() if row["fid"] == "77.0")
    fields = ("model_type", "path_type", "weights", "epoch", "nfe", "seed", "metric")
    repeated = [k for k in rows if all(rows[k][f] == rows[last][f] for f in fields)]
    assert len(repeated) == 2
    linked = {k for *_, cell in cells_with_numbers(parse(page), "scores") for k in links_of(cell)}
    assert not {k for k in repeated if k != last} & linked


def test_every_row_of_the_table_is_there_with_its_values(place, page):
    root, rows = parse(page), lines_of(place / "fid_results.csv")
    section = root.one("section", id="rows")
    shared = dict(zip((dt.text for dt in section.all("dt")), (dd.text for dd in section.all("dd")), strict=True))
    assert shared["dataset"] == "cats" and "seed" not in shared
    fields = [th.text.replace("_ ", "_") for th in section.one("thead").all("th")]
    for k, row in rows.items():
        cells = [cell.text for cell in section.one("tr", id=f"row-{k}").children if isinstance(cell, Node)]
        shown = dict(zip(fields, cells, strict=True))
        assert shown.pop("row") == str(k)
        assert {name: value for name, value in (shared | shown).items() if value} == {
            name: value for name, value in row.items() if value
        }
    assert len(list(section.all("tr"))) == len(rows) + 1


def test_links_lead_somewhere_and_nothing_is_loaded(page):
    root = parse(page)
    ids = [
        node["id"] for tag in "main section h2 tr caption".split() for node in root.all(tag) if "id" in node.attributes
    ]
    assert len(ids) == len(set(ids))
    for link in root.all("a"):
        assert link["href"].startswith("#") and link["href"][1:] in ids
    for tag in ("script", "iframe", "object", "embed", "video", "audio", "source"):
        assert not list(root.all(tag))
    assert all(node["src"].startswith("data:image/png;base64,") for node in root.all("img"))
    assert all(node["href"].startswith("data:") for node in root.all("link"))
    style = root.one("style").text
    assert "url(" not in style and "@import" not in style and "http" not in page.replace(style, "")


def test_structure_is_semantic(page):
    root = parse(page)
    assert root.one("html")["lang"] == "en" and "width=device-width" in root.one("meta", name="viewport")["content"]
    assert root.one("title").text == root.one("h1").text == "A title"
    headings = re.findall(r"<h(\d)", page)
    assert headings[0] == "1" and all(int(b) <= int(a) + 1 for a, b in zip(headings, headings[1:], strict=False))
    assert next(root.one("body").all("a"))["href"] == "#content"
    for table in root.all("table"):
        assert table.one("caption").text
        assert all(th["scope"] in ("col", "row", "rowgroup") for th in table.all("th"))
    assert all(len(node["alt"]) > 40 for node in root.all("img"))


def test_pictures_are_embedded_byte_for_byte_with_their_captions(place, page):
    root = parse(page)
    captions = {}
    for figure in root.all("figure"):
        data = base64.b64decode(figure.one("img")["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (int(figure.one("img")["width"]), int(figure.one("img")["height"]))
        captions[data] = figure.one("figcaption").text
    grid = place / "samples" / "lift_400ep_raw_dp_64_2" / "figures/grid.png"
    files = [*(place / name for name in PICTURES), grid]
    assert len(captions) == len(files) + 2  # two curves
    captions = {file.name: captions[file.read_bytes()] for file in files}
    assert "Epoch 400, EMA weights (dualema400); K = 3, 24 images of feed" in captions["heatmap_30_400ep_ema.png"]
    assert "18 steps, factor B, costs DP-64 0.9325, DP-Total 4.667" in captions["heatmap_30_400ep_ema_maps.png"]
    assert "Epoch 400, raw weights (0dd, not in the results table)" in captions["heatmap_30_400ep.png"]
    assert "epoch 400, EMA weights" in captions["samples_400ep_ema.png"]
    assert "epoch 400, raw weights" in captions["paths_400ep_raw.png"]
    fingerprint = PathOfTimesteps([(999, 999), (500, 400), (0, 0)], "dp_64", {}).fingerprint()
    assert captions["grid.png"].endswith(
        f"lift_400ep_raw_dp_64_2: path dp_64, NFE 2, fingerprint {fingerprint}; weights dualraw400; eta 0.5; "
        "end clean; 3 images in the folder, seeds 42000000 to 42000002."
    )
    assert "heatmap_30_1000ep.pth has not been drawn" in page
    # Samples come first, raw weights before EMA.
    names = (*PICTURES[7:], *PICTURES[4:7])
    order = [page.index(captions[name].partition(" ")[2].partition(" ")[2][:60]) for name in names]
    order.insert(2, page.index('<section id="scores"'))
    assert order == sorted(order)


def test_the_same_files_give_the_same_bytes(place, page):
    with pytest.warns(UserWarning):
        assert build(place / "fid_results.csv", place, "A title") == page


def test_sections_without_input_are_one_sentence(tmp_path):
    append_row(tmp_path / "results.csv", make_row(1))
    root = parse(build(tmp_path / "results.csv", tmp_path, "title"))
    assert not list(root.all("img"))
    for section, words in {
        "curves": "more than one epoch or number of network calls",
        "maps": "no picture of an error map",
        "paths": "no figure of paths",
        "samples": "no samples",
    }.items():
        node = root.one("section", id=section)
        assert words in node.one("p").text and node.text.count(". ") <= 1
    # A single seed has no deviation, and a single row nothing that it shares.
    *_, cell = next(cells_with_numbers(root, "scores"))
    assert re.fullmatch(r"\d\d\.\d\d n = 1: 2", cell.text)
    assert not list(root.all("dl"))


def test_names_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    for seed in (42, 43):
        append_row(
            tmp_path / "results.csv", make_row(1, seed=seed, dataset="<b>cats", path_type=evil, reference='"><i>')
        )
    write_png(tmp_path / "samples" / "<b>" / "grid.png")
    page = build(tmp_path / "results.csv", tmp_path, evil)
    root = parse(page)  # which fails for a <b> that is not closed
    assert root.one("h1").text == evil and "<script" not in page
    assert "<b>cats" in root.one("section", id="scores").text
    assert root.one("figcaption").text.endswith("<b>: schedule.json is missing; settings.json is missing.")


@pytest.mark.parametrize(
    "count, metric, words",
    [
        (2047, "fid", "Not comparable: 2,047 images are fewer than the 2,048 Inception features"),
        (2048, "fid", "Few images: 2,048 per seed"),
        (9999, "fid", "Few images: 9,999 per seed"),
        (10000, "fid", None),
        (1000, "swd", "Few images: 1,000 per seed"),
    ],
)
def test_few_images_are_warned_of(count, metric, words, tmp_path):
    features = {"fid": {}, "swd": {"metric_features": "swd-7x7-64-32", "resize": "none", "swd": 5.0}}[metric]
    append_row(tmp_path / "results.csv", make_row(1, num_images=count, metric=metric, **features))
    warnings = list(parse(build(tmp_path / "results.csv", tmp_path, "")).all("p", class_="warning"))
    assert [words in warning.text for warning in warnings] == ([True] if words else [])


def test_what_does_not_compare_has_tables_of_its_own(tmp_path):
    others = [{}, {"num_images": 9}, {"resize": "clean"}, {"reference_fingerprint": "x"}, {"precision": "bf16"}]
    for change in [*others, {"dataset": "dogs"}, {"metric_features": "inception-f"}]:
        append_row(tmp_path / "results.csv", make_row(1, **change))
    tables = list(parse(build(tmp_path / "results.csv", tmp_path, "")).one("section", id="scores").all("table"))
    assert len(tables) == 7


def test_checkpoints_and_paths_of_one_name_are_told_apart(tmp_path):
    for k, change in enumerate([{}, {"checkpoint_fingerprint": "decaf"}, {"path_fingerprint": "xyz"}]):
        append_row(tmp_path / "results.csv", make_row(k, **change))
        append_row(tmp_path / "results.csv", make_row(k + 5, nfe=6, **change))
    root = parse(build(tmp_path / "results.csv", tmp_path, ""))
    labels = {label: links_of(cell) for _, _, label, _, cell in cells_with_numbers(root, "scores")}
    assert labels == {
        "LIFT diagonal, checkpoint c0ffee, path abc": [2],
        "LIFT diagonal, checkpoint decaf": [4],
        "LIFT diagonal, checkpoint c0ffee, path xyz": [6],
    }
    curves = [(label, links_of(cell)) for _, _, label, _, cell in cells_with_numbers(root, "curves")]
    assert sorted(curves) == sorted((label, [line]) for label, [first] in labels.items() for line in (first, first + 1))


def test_a_model_without_a_value_has_a_dash(tmp_path):
    append_row(tmp_path / "results.csv", make_row(1))
    append_row(tmp_path / "results.csv", make_row(1, path_type="kl", metric="kid", kid=-0.001, kid_sd=0.1))
    cells = {
        (row, c): cell.text
        for _, _, row, c, cell in cells_with_numbers(parse(build(tmp_path / "results.csv", tmp_path, "")), "scores")
    }
    assert cells["LIFT diagonal", "KID ↓"] == cells["LIFT KL", "FID ↓"] == "–"
    assert cells["LIFT KL", "KID ↓"] == "−0.00100 n = 1: 3"


def test_main_nfe_has_most_results_then_is_18_then_the_largest():
    def nfe(*counts):
        return main_nfe({"nfe": str(nfe)} for nfe in counts)

    assert nfe(6, 6, 18) == "6" and nfe(6, 18, 36) == "18" and nfe(6, 9, 36) == "36" and nfe(100, 9) == "100"


@pytest.mark.filterwarnings("ignore:.*is not a whole result")
def test_another_nfe_can_head_the_page(place, tmp_path):
    output = tmp_path / "new" / "a.html"
    flags = ("--results", place / "fid_results.csv", "--folder", tmp_path, "--output", output, "--nfe", 6)
    end = run_stage(report, *flags)
    assert end.status == 0 and end.output.startswith(f"{output}, 0.")
    captions = [caption for caption, *_ in cells_with_numbers(parse(output.read_text(encoding="utf-8")), "scores")]
    assert captions and all("6 network calls, epoch 400" in caption for caption in captions)
    assert list(output.parent.iterdir()) == [output]


def test_runs_are_first_and_last():
    assert runs_of([7, 2, 3, 4, 9, 10]) == [(2, 4), (7, 7), (9, 10)]
    assert runs_of([]) == []


def damage_picture(folder):
    file = folder / "paths_400ep_raw.png"
    write_png(file)
    file.write_bytes(file.read_bytes()[:-100])


def damage_heatmap(folder):
    write_png(folder / "heatmap_30_400ep.png")
    (folder / "heatmap_30_400ep.pth").write_bytes(b"half a heatmap")


def damage_settings(folder):
    write_samples(folder / "samples" / "a")
    (folder / "samples" / "a" / "settings.json").write_text("{")


def damage_schedule(folder):
    write_samples(folder / "samples" / "a")
    (folder / "samples" / "a" / "schedule.json").write_text("{}")


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda folder: (folder / "results.csv").unlink(), "results.csv does not exist; evaluate"),
        (lambda folder: (folder / "results.csv").write_text(""), "results.csv holds no result"),
        (lambda folder: (folder / "results.csv").write_text("a,b\n"), "results.csv is not a results table"),
        (damage_picture, "paths_400ep_raw.png is damaged"),
        (damage_heatmap, "heatmap_30_400ep.pth is damaged"),
        (lambda folder: save_heatmap(folder / "heatmap_1ep.pth", EMPTY_MAP), "heatmap_1ep.pth lacks 'epoch'"),
        (damage_settings, "a/settings.json is damaged"),
        (damage_schedule, "a/schedule.json is not a schedule file"),
    ],
)
def test_bad_input_is_named_and_the_old_page_stays(harm, words, tmp_path):
    append_row(tmp_path / "results.csv", make_row(1))
    output = tmp_path / "report.html"
    output.write_text("precious")
    harm(tmp_path)
    end = run_stage(report, "--results", tmp_path / "results.csv", "--folder", tmp_path, "--output", output)
    assert end.status == 1 and words in end.message and output.read_text() == "precious"


def test_missing_folder_and_nfe_are_refused(tmp_path):
    append_row(tmp_path / "results.csv", make_row(1))
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        build(tmp_path / "results.csv", tmp_path / "none", "")
    with pytest.raises(ValueError, match="no result of 7 network calls"):
        build(tmp_path / "results.csv", tmp_path, "", nfe=7)


def test_size_is_said_when_large(place, monkeypatch):
    monkeypatch.setattr(figures.page, "LARGE_PAGE_MB", 0.5)
    with pytest.warns(UserWarning):
        page = build(place / "fid_results.csv", place, "")
    megabytes = int(re.search(r"take (\d+) MB", page)[1])
    assert megabytes == round(sum(len(node["src"]) for node in parse(page).all("img")) / 1e6)


# In a browser

FLAGS = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync no-first-run"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(names)} is on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[f"--{flag}" for flag in FLAGS.split()])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(page, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page, encoding="utf-8")
    return file.as_uri()


def opened(browser, address, scheme="light", width=1280, height=900):
    """The page in a tab that fails at what the browser complains of or fetches."""
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    tab.on("requestfailed", lambda request: complaints.append(request.url[:80]))
    tab.goto(address)
    return tab, complaints


@pytest.mark.parametrize("width, height", [(360, 740), (1280, 900)])
def test_page_fits_its_window_and_shows_every_picture(width, height, browser, address):
    tab, complaints = opened(browser, address, width=width, height=height)
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    sizes = tab.evaluate(
        "[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.getBoundingClientRect().width])"
    )
    assert len(sizes) == len(PICTURES) + 3 and all(loaded and shown > 200 for loaded, shown in sizes)
    # What is wider than the window scrolls in a region that the keyboard reaches.
    assert tab.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).overflowX == 'auto').every(e => e.tabIndex == 0 && e.getAttribute('role') == 'region')"
    )
    tab.close()
    assert complaints == []


def test_a_row_can_be_reached_from_its_number(browser, address):
    tab, _ = opened(browser, address)
    link = tab.locator("#scores td.number a").first
    line = link.inner_text()
    link.click()
    assert tab.evaluate("document.querySelector(':target').cells[0].innerText") == line
    assert tab.evaluate(
        "(b => b.top >= 0 && b.bottom <= innerHeight)(document.querySelector(':target').getBoundingClientRect())"
    )
    tab.close()


def test_skip_link_is_the_first_stop_and_shows_itself(browser, address):
    tab, _ = opened(browser, address)
    tab.keyboard.press("Tab")
    assert tab.evaluate(
        "[document.activeElement.className, document.activeElement.getBoundingClientRect().left >= 0]"
    ) == [
        "skip",
        True,
    ]
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "content"
    tab.close()


def test_page_prints(browser, address):
    tab, _ = opened(browser, address, scheme="dark")
    pdf = tab.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf)) > 1
    tab.emulate_media(media="print", color_scheme="dark")
    colors = tab.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert colors == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert not tab.locator("nav").is_visible()
    # As wide as paper within its margins, at 96 pixels an inch: 182 mm upright, 273 mm across.
    for selector, width in (("section:not(#rows) table, figure, p", 687), (".all", 1031)):
        tab.set_viewport_size({"width": width, "height": 900})
        rights = tab.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.getBoundingClientRect().right)")
        assert rights and max(rights) <= width + 1
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_no_violation_of_accessibility(scheme, browser, address):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    tab, _ = opened(browser, address, scheme=scheme, width=360, height=740)
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 26)"
    assert dark == (scheme == "dark")
    found = axe.Axe().run(tab)
    tab.close()
    assert found.violations_count == 0, found.generate_report()
    assert {"color-contrast", "image-alt", "region"} <= {rule["id"] for rule in found.response["passes"]}
