"""Series: whatever two trainings differ in is in their names, and nothing that differs is averaged or ranked unsaid."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_figures
from evaluation.report_content import gather
from evaluation.result_layout import layout_tables
from evaluation.results_table import GROUP_FIELDS, append_row
from evaluation.series import named_results
from evaluation.training_columns import TRAINING_FIELDS
from result_rows import OTHER_TRAINING, TRAINING, as_read, make_row

SILENT = dict.fromkeys(TRAINING, "")


def row_of(**changes):
    """A row as it is read, of weights of their own unless told otherwise."""
    training = [changes.get(name, TRAINING[name]) for name in TRAINING]
    weights = "-".join(map(str, [*training, changes.get("model_type"), changes.get("epoch"), changes.get("weights")]))
    one_scale = {"regime": "", "representation": ""} if changes.get("model_type") == "baseline" else {}
    return as_read(make_row(**{"checkpoint_fingerprint": weights, "num_images": 20_000} | one_scale | changes))


def titles(*rows):
    return [result["series"].title for result in sorted(named_results(rows), key=lambda result: result["series"].rank)]


def table_of(rows, what="raw weights"):
    [table] = [table for table in layout_tables(rows) if what in table.title]
    return table


def cells_of(table):
    return [[cell.text for cell in row] for row in table.rows]


def bold_of(table):
    return [cell.text for row in table.rows for cell in row if cell.best]


IMPROVED = {name: OTHER_TRAINING[name] for name in ("preset", "process", "prediction", "loss_weights", "run")}


def test_two_presets_are_two_columns():
    """They used to share the bold cell "190.29; 143.39"."""
    rows = [row_of(model_type="baseline", fid=190.29), row_of(model_type="baseline", fid=143.39, **IMPROVED)]
    table = table_of(rows)
    assert table.columns == ("epoch", "Baseline, improved", "Baseline, published")
    assert cells_of(table) == [["200", "143.39 (1)", "190.29 (1)"]] and bold_of(table) == ["143.39 (1)"]
    assert cells_of(table_of(rows, "best epochs")) == [
        ["Baseline, improved", "raw", "200", "143.39 (1)"],
        ["Baseline, published", "raw", "200", "190.29 (1)"],
    ]


SAID = {
    "preset": ("improved", "published"),
    "process": ("vp cosine", "vp cosine_clipped"),
    "prediction": ("epsilon prediction", "v prediction"),
    "loss_weights": ("loss weights 0.8,0.2", "loss weights 1,1"),
    "perceptual_weight": ("perceptual weight 0", "perceptual weight 0.1"),
    "feature_weight": ("feature weight 0", "feature weight 0.05"),
    "objective": ("denoising objective", "hybrid objective"),
    "vlb_weight": ("bound weight 0.002", "bound weight none"),
    "student": ("student 4calls", "student none"),
    "teacher": ("teacher c0ffee", "teacher none"),
    "student_images": ("51200 images of students", "none images of students"),
    "teacher_calls": ("102400 calls of teachers", "none calls of teachers"),
    "consistency": ("consistency ict over 200 epochs", "consistency none"),
    "consistency_solver": ("teacher's steps heun", "teacher's steps none"),
    "degradation": ("degraded by blur:8", "degraded by none"),
    "severity_schedule": ("linear severity", "none severity"),
    "input_noise": ("input noise 0", "input noise none"),
    "min_snr_gamma": ("min-SNR 5", "min-SNR none"),
    "timestep_weights": ("timestep weights published", "timestep weights sigma2"),
    "t_law": ("logit_normal:0,1 timesteps", "uniform timesteps"),
    "times": ("real times", "whole times"),
    "coupling": ("independent coupling", "ot coupling"),
    "start_data": ("from cats (c0ffee)", "from noise"),
    "lr": ("lr 0.0001", "lr 0.001"),
    "lr_schedule": ("lr constant", "lr cosine over 200 epochs"),
    "classes": ("classes cat,dog", "classes none"),
    "label_dropout": ("label dropout 0.1", "label dropout none"),
    "batch_size": ("batch size 32", "batch size 64"),
    "weight_decay": ("weight decay 0.01", "weight decay 0.1"),
    "grad_clip": ("gradient norm 0.5", "gradient norm 1"),
    "ema_decay": ("EMA decay 0.999", "EMA decay 0.9999"),
    "ema_rampup_ratio": ("EMA ramp-up 0", "EMA ramp-up 0.05"),
    "replan_every": ("epochs between plans 10", "epochs between plans none"),
    "replan_images": ("images of plans 16", "images of plans none"),
    "network": ("ddpm_unet", "unet"),
    "hidden_dims": ("widths 32,64", "widths 64,128,256,512"),
    "parameters": ("3,586,947 parameters", "58,123,456 parameters"),
    "resolution": ("32 px", "64 px"),
    "latents": ("latents none", "latents sd-vae (c0ffee)"),
    "training_images": ("640 training images", "1,280 training images"),
    "training_data": ("data cafe", "data feedbeef"),
    "flip": ("flip no", "flip yes"),
    "training_precision": ("trained in bf16", "trained in fp32"),
    "training_seed": ("training seed 42", "training seed 43"),
    "images_seen": ("640 images per epoch", "1,280 images per epoch"),
    "run": ("run first", "run second"),
}


@pytest.mark.parametrize("field", TRAINING_FIELDS)
def test_what_differs_is_in_the_name_and_nothing_else_is(field):
    rows = [row_of(), row_of(**{field: OTHER_TRAINING[field]})]
    assert sorted(titles(*rows)) == sorted(f"LIFT diagonal, {words}" for words in SAID[field])
    assert titles(rows[0]) == titles(rows[1]) == ["LIFT diagonal"]
    # What is trained unlike another is so beside any other model, too, unless models differ in it by themselves.
    other = row_of(model_type="baseline", **{field: OTHER_TRAINING[field]})
    assert (len(titles(rows[0], other)[1]) > len("LIFT diagonal")) == (
        field not in ("run", "parameters", "loss_weights")
    )
    # On pages of other data it is not.
    assert titles(rows[0], rows[1] | {"dataset": "dogs"}) == ["LIFT diagonal"] * 2


@pytest.mark.parametrize("field", TRAINING_FIELDS)
def test_curves_of_trainings_are_not_joined(field):
    """Not even where they have no epoch in common."""
    seen = {} if field == "images_seen" else {"images_seen": "512000"}
    rows = [row_of(fid=1), row_of(fid=2, epoch=400, **{field: OTHER_TRAINING[field]} | seen)]
    assert [row[1:] for row in cells_of(table_of(rows))] in (
        [["1.00 (1)", ""], ["", "2.00 (1)"]],
        [["", "1.00 (1)"], ["2.00 (1)", ""]],
    )


def test_a_training_has_one_name_at_all_its_epochs():
    rows = [
        row_of(epoch=epoch, images_seen=1280 * epoch, path_type=path, weights=weights, path_fingerprint=path)
        for epoch, path, weights in itertools.product((200, 400), ("diagonal", "kl"), ("raw", "ema"))
    ]
    assert set(titles(*rows)) == {"LIFT diagonal", "LIFT KL"}
    faster = [row | {"lr": "0.01", "checkpoint_fingerprint": row["checkpoint_fingerprint"] + "x"} for row in rows]
    assert set(titles(*rows, *faster)) == {
        f"{name}, lr {rate}" for name in ("LIFT diagonal", "LIFT KL") for rate in ("0.0001", "0.01")
    }


def test_a_changed_preset_tells_less():
    changed = {"preset": "improved (changed)", "process": "vp linear", "prediction": "v", "loss_weights": "[0.8,0.2]"}
    assert titles(row_of(**IMPROVED), row_of(**changed)) == [
        "LIFT diagonal, improved",
        "LIFT diagonal, improved (changed), vp linear",
    ]
    # Nor does one that meant something else when the checkpoint was made.
    assert titles(row_of(**IMPROVED), row_of(**IMPROVED | {"process": "vp linear"})) == [
        "LIFT diagonal, vp cosine",
        "LIFT diagonal, vp linear",
    ]


def test_models_differ_in_size_by_themselves():
    rows = [row_of(), row_of(model_type="baseline", parameters="58000000", loss_weights="[1]", run="other")]
    table = table_of(rows)
    assert table.columns == ("epoch", "Baseline", "LIFT diagonal")
    assert "Parameters: Baseline 58,000,000, LIFT 58,123,456." in table.note
    assert "Parameters" not in table_of([rows[0], row_of(path_type="kl")]).note
    wider = row_of(hidden_dims="[8]", parameters="1000", path_type="kl")
    assert "Parameters: Baseline 58,000,000, LIFT 1,000 or 58,123,456." in table_of([*rows, wider]).note


def test_training_seeds_are_columns():
    rows = [row_of(training_seed=seed, seed=k, fid=10 * seed + k) for seed in (42, 9, 100) for k in (1, 2)]
    table = table_of(rows)
    assert table.columns[1:] == tuple(f"LIFT diagonal, training seed {seed}" for seed in (9, 42, 100))
    assert cells_of(table) == [["200", "91.50 ± 0.71 (2)", "421.50 ± 0.71 (2)", "1001.50 ± 0.71 (2)"]]


def test_the_same_command_run_twice_is_told_apart_by_its_name():
    rows = [row_of(run=run, fid=k) for k, run in enumerate(("a", "b"))]
    assert titles(*rows) == ["LIFT diagonal, run a", "LIFT diagonal, run b"]
    # Even if both ended in the same bits.
    rows = [row | {"checkpoint_fingerprint": "c0ffee"} for row in rows]
    assert cells_of(table_of(rows)) == [["200", "0.00 (1)", "1.00 (1)"]]


def test_a_run_that_got_its_name_later_is_one():
    rows = [row_of(run=run, epoch=epoch, images_seen=1280 * epoch) for run, epoch in (("", 200), ("a", 400))]
    assert titles(*rows) == ["LIFT diagonal"] * 2
    # Unless there are two of one epoch.
    names = titles(*rows, row_of(run="", epoch=400, images_seen=512000))
    assert names == ["LIFT diagonal", "LIFT diagonal", "LIFT diagonal, run a"]


def test_checkpoints_of_trainings_that_nobody_recorded_are_columns():
    rows = [row_of(**SILENT, checkpoint_fingerprint=name, fid=fid) for name, fid in (("a", 190.29), ("b", 143.39))]
    table = table_of(rows)
    assert table.columns[1:] == ("LIFT diagonal, checkpoint a", "LIFT diagonal, checkpoint b")
    assert cells_of(table) == [["200", "190.29 (1)", "143.39 (1)"]] and bold_of(table) == ["143.39 (1)"]


def test_what_was_not_recorded_is_said_beside_what_was():
    old = row_of(**SILENT, checkpoint_fingerprint="a")
    assert titles(old) == ["LIFT diagonal"]
    assert titles(old, row_of(model_type="baseline")) == ["Baseline", "LIFT diagonal, training not recorded"]
    # A new row of the same weights tells it for the old ones.
    assert titles(old, row_of(checkpoint_fingerprint="a", seed=43), row_of(model_type="baseline")) == [
        "Baseline",
        "LIFT diagonal",
    ]


def test_the_best_epochs_say_how_many_images_were_seen_where_that_differs():
    rows = [row_of(epoch=200), row_of(epoch=400, images_seen=512000, model_type="baseline")]
    table = table_of(rows, "best epochs")
    assert table.columns == ("model and path", "weights", "best epoch", "images seen", "FID") and table.num_labels == 4
    assert [row[:4] for row in cells_of(table)] == [
        ["Baseline", "raw", "400", "512,000"],
        ["LIFT diagonal", "raw", "200", "256,000"],
    ]
    rows = [row_of(), row_of(model_type="baseline")]
    assert "images seen" not in table_of(rows, "best epochs").columns


def test_solvers_are_columns_with_diagonals_of_their_own():
    rows = [
        row_of(path_type=path, solver=f"ddim eta {eta} clean", path_fingerprint=f"{path}-{eta}", fid=fid)
        for eta, fids in ((0, (50, 40)), (1, (90, 88)))
        for path, fid in zip(("diagonal", "kl"), fids, strict=True)
    ]
    assert table_of(rows).columns[1:] == tuple(
        f"{path}, ddim eta {eta} clean" for path in ("LIFT diagonal", "LIFT KL") for eta in (0, 1)
    )
    assert cells_of(table_of(rows, "improvement")) == [["200", "raw", "10.00 (20.0 %, 1)", "2.00 (2.2 %, 1)"]]


def test_an_improvement_names_the_diagonal_where_there_are_two():
    rows = [row_of(fid=50, path_fingerprint="a"), row_of(fid=45, path_fingerprint="b")]
    rows.append(row_of(fid=40, path_type="kl", path_fingerprint="c"))
    table = table_of(rows, "improvement")
    assert table.columns[2:] == ("LIFT KL, over path a", "LIFT KL, over path b")
    assert [row[2:] for row in cells_of(table)] == [["10.00 (20.0 %, 1)", "5.00 (11.1 %, 1)"]]


def test_improvements_stay_within_one_training():
    rows = [
        row_of(path_type=path, lr=lr, fid=fid)
        for lr, fids in (("0.1", (50, 40)), ("0.2", (30, 27)))
        for path, fid in zip(("diagonal", "kl"), fids, strict=True)
    ]
    rows.append(row_of(path_type="kl", lr="0.3", fid=1))
    table = table_of(rows, "improvement")
    assert table.columns[2:] == ("LIFT KL, lr 0.1", "LIFT KL, lr 0.2")
    assert [row[2:] for row in cells_of(table)] == [["10.00 (20.0 %, 1)", "3.00 (10.0 %, 1)"]]


def test_published_numbers_stand_beside_no_other_training():
    ours = {"dataset": "huggan/AFHQv2", "num_images": 15803, "reference_images": 15803, "model_type": "baseline"}
    ours |= {"nfe": 18, "epoch": 200}
    text = "[33.07 ± 0.13]"
    assert text in cells_of(table_of([row_of(**ours)]))[0][1]
    assert text in cells_of(table_of([row_of(**ours, **SILENT)]))[0][1]
    for field in ("preset", "lr", "batch_size", "hidden_dims", "min_snr_gamma", "flip"):
        assert "[" not in cells_of(table_of([row_of(**ours, **{field: OTHER_TRAINING[field]})]))[0][1]


# Whatever is drawn


VARIED = {
    **{name: ["", TRAINING[name], OTHER_TRAINING[name]] for name in TRAINING},
    "solver": ["ddim eta 0 clean", "ddim eta 1 clean", "heun"],
    "guidance": ["", "guidance 1", "guidance 3"],
    "model_type": ["dual", "baseline", "single_t"],
    "path_type": ["diagonal", "kl", "shift:1"],
    "regime": ["independent", "band:2"],
    "representation": ["overcomplete", "residual"],
    "coarse_from": ["", "x0", "noisy"],
    "weights": ["raw", "ema"],
    "epoch": ["100", "200", "400"],
    "nfe": ["8", "18"],
    "seed": ["42", "43"],
    "checkpoint_fingerprint": ["a", "b"],
    "path_fingerprint": ["p", "q"],
}
# What two rows of one column may differ in, as lines or the heading say it, or as it says nothing by itself.
OF_A_LINE = {"epoch", "weights", "nfe", "seed", "images_seen", "checkpoint_fingerprint", "path_fingerprint"}


@st.composite
def drawn_tables(draw):
    """Rows that differ in few fields or in many, each with a score that tells it from all others."""
    fields = draw(st.lists(st.sampled_from(sorted(VARIED)), min_size=1, max_size=6, unique=True))
    if draw(st.booleans()):
        fields = sorted({*fields, "checkpoint_fingerprint"})
    rng = random.Random(draw(st.integers(0, 10**6)))
    rows = []
    for k in range(draw(st.integers(2, 14))):
        choice = {field: rng.choice(VARIED[field]) for field in fields}
        rows.append(row_of(**{"checkpoint_fingerprint": "a", "path_fingerprint": "p"} | choice, fid=str(2**k)))
    return rows


def rows_behind(number, rows, seeds):
    """The rows whose scores have this mean: powers of two, which add up in one way only."""
    total = round(number * seeds)
    found = [row for row in rows if total & int(row["fid"])]
    assert sum(int(row["fid"]) for row in found) == total and len(found) == seeds
    return found


def may_be_averaged(rows):
    """Whether rows are seeds of one evaluation: they agree in all else."""
    groups = {tuple(row[field] for field in GROUP_FIELDS) for row in rows}
    return len(groups) == 1 and len({row["seed"] for row in rows}) == len(rows)


def may_share_a_series(rows):
    same = {*VARIED, *TRAINING} - OF_A_LINE - {"run"}
    return (
        all(len({row[field] for row in rows}) == 1 for field in same) and len({row["run"] for row in rows} - {""}) < 2
    )


def told(rows):
    """Rows with what all others of the same weights say where they say nothing."""
    rows = [dict(row) for row in rows]
    for field in TRAINING:
        said = {}
        for row in rows:
            said.setdefault(row["checkpoint_fingerprint"], set()).add(row[field])
        for row in rows:
            values = said[row["checkpoint_fingerprint"]] - {""}
            row[field] = row[field] or (values.pop() if len(values) == 1 else "")
    return rows


def last_of_each(rows):
    """Without rows that a later one repeats."""
    kept = {}
    for row in rows:
        kept[tuple(value for field, value in row.items() if field != "fid")] = row
    return list(kept.values())


@settings(max_examples=200, deadline=None)
@given(drawn_tables())
def test_no_cell_of_any_table_averages_or_ranks_over_a_difference(rows):
    columns = {}
    tables, rows = layout_tables(rows), told(rows)
    for table in tables:
        assert len(set(table.columns)) == len(table.columns)
        for line in table.rows:
            assert not any(";" in cell.text for cell in line)
        if "improvement" in table.title:
            continue
        for line in table.rows:
            for title, cell in list(zip(table.columns, line, strict=True))[table.num_labels :]:
                if cell.text:
                    mean, _, rest = cell.text.partition(" ")
                    found = rows_behind(float(mean), rows, int(rest[rest.rindex("(") + 1 : -1]))
                    assert may_be_averaged(found), (cell.text, found)
                    name = line[0].text if "best epochs" in table.title or "ablations" in table.title else title
                    columns.setdefault(name, []).extend(found)
    for name, found in columns.items():
        assert may_share_a_series(found), (name, found)


@settings(max_examples=150, deadline=None)
@given(drawn_tables())
def test_every_row_is_in_one_result_and_no_two_results_are_one_point(rows):
    results = named_results(rows)
    found = [row for result in results for row in result["rows"]]
    assert len({row["fid"] for row in found}) == len(found) <= len(last_of_each(rows))
    points = {(r["series"].title, *(r[name] for name in ("weights", "epoch", "nfe"))) for r in results}
    assert len(points) == len(results)
    # What stands on one page with no word of a difference has none, but for what follows from the type of model.
    for one, other in itertools.combinations(results, 2):
        if one["series"].training == other["series"].training:
            apart = any(one[name] != other[name] for name in ("model_type", "representation"))
            for field in {*TRAINING} - {"run", *(("parameters", "loss_weights") if apart else ())}:
                assert rate(field, one) == rate(field, other), field


def rate(field, result):
    """The value of a field, or of the images seen those of an epoch."""
    if field == "images_seen" and result[field]:
        return int(result[field]) / int(result["epoch"])
    return result[field]


@settings(max_examples=60, deadline=None)
@given(drawn_tables())
def test_figures_and_report_have_the_same_series(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("table")
    file, drawn = folder / "results.csv", []
    for row in rows:
        append_row(file, row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_figures, "plot_scores", lambda rows, *others: drawn.extend(rows))
        make_figures.draw_scores(make_figures.ScoresSettings(inputs=(str(file),), output="figure.png"))
        patch.setattr("evaluation.report_content.draw_curves", lambda results, nfe: [])
        content = gather(file, folder, "")
    results = {(r["series"].title, r["weights"], r["epoch"], r["nfe"]): r["fid_mean"] for r in named_results(rows)}
    assert {(row["name"], row["weights"], row["epoch"], row["nfe"]): row["fid_mean"] for row in drawn} == results
    assert len(drawn) == len(results)
    [group] = content.groups
    for _, block in group.headline.blocks:
        for (name, *_), [number] in block:
            assert number is not None and name in {key[0] for key in results}
            assert may_be_averaged([told(rows)[line - 2] for line in number.lines])
