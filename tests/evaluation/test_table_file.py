"""Tables of earlier versions and of spreadsheets: read as they are meant or refused by name, and never mixed up."""

import csv
import io
import itertools
import multiprocessing
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from evaluation.results_table import (
    FORMAT,
    RESULT_FIELDS,
    append_row,
    check_table,
    has_row,
    read_numbered_rows,
    read_rows,
)
from evaluation.table_file import csv_line
from planning.regimes import default_regime
from result_rows import EARLIER_HEADERS, TRAINING, as_read, make_row, table_text

CURRENT = csv_line(RESULT_FIELDS)
MODELS = ("baseline", "dual", "shared_t", "single_t")


def old_rows():
    """Rows as earlier versions had them: every model, two metrics, another solver."""
    rows = []
    for k, model in enumerate(MODELS):
        more = {"model_type": model, "seed": k, "dataset": "cats", "coarse_from": ""}
        more |= {"regime": default_regime(model) or "", "representation": "" if model == "baseline" else "overcomplete"}
        more |= dict.fromkeys(TRAINING, "")
        rows.append(make_row(**more))
        swd = {"metric": "swd", "metric_features": "swd-7x7-16", "resize": "none", "fid": None, "swd": 5.5}
        solver = {"path_fingerprint": "abc-eta0.5-t0", "solver": "ddim eta 0.5 t0"}
        rows.append(make_row(**more | swd | solver))
    return rows


@pytest.fixture(params=EARLIER_HEADERS)
def old(request, tmp_path):
    """A table with the header of an earlier version."""
    file = tmp_path / "results.csv"
    file.write_text(table_text(EARLIER_HEADERS[request.param].split(","), old_rows()))
    return file


def expected(row, header):
    """An old row as it is read: what its header lacks is as it was when that was written."""
    lacks = {"precision": "unknown", "reference_images": ""}
    return as_read(row) | {column: text for column, text in lacks.items() if column not in header}


def test_headers_of_earlier_versions_are_those_they_had(request):
    assert sorted(EARLIER_HEADERS) == [21, 22, 35, 37, 38, 63, 66, 83, 91]
    for file in ROOT.glob("results/**/*.csv"):
        header = file.read_text(encoding="utf-8").partition("\n")[0]
        if header.startswith(RESULT_FIELDS[0]):
            assert header in EARLIER_HEADERS.values() or header == CURRENT.strip()


def test_committed_tables_are_read_with_defaults():
    tables = 0
    for file in ROOT.glob("results/**/*.csv"):
        with open(file, newline="", encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream))
        if next(iter(lines[0])) == RESULT_FIELDS[0]:
            tables += 1
            for row, line in zip(read_rows(file), lines, strict=True):
                assert line.items() <= row.items()
                assert "solver" in line or row["solver"].startswith("ddim eta 0 ")
                assert not any(row[field] for field in set(TRAINING) - line.keys())
    assert tables >= 10


def test_an_earlier_table_is_read_with_defaults(old):
    header = old.read_text().partition("\n")[0].split(",")
    assert read_rows(old) == [expected(row, header) for row in old_rows()]


def test_an_earlier_table_is_added_to_and_nothing_of_it_changes(old):
    before = old.read_bytes()
    read = read_rows(old)
    check_table(old)
    for row in old_rows():
        # What the old version did not say does not make it another evaluation.
        assert has_row(old, as_read(row) | {"run": "any"})
        assert not has_row(old, as_read(row) | {"seed": 99})
    new = [make_row(seed=99), make_row(seed=100, lr=0.5, run="")]
    for row in new:
        append_row(old, row)
    assert old.read_bytes() == before + (CURRENT + "".join(csv_line(as_read(row).values()) for row in new)).encode()
    assert read_rows(old) == [*read, *map(as_read, new)]
    # Lines are counted as an editor counts them.
    assert list(read_numbered_rows(old)) == [*range(2, 2 + len(read)), len(read) + 3, len(read) + 4]
    assert has_row(old, new[0]) and not has_row(old, new[0] | {"seed": 101})


@pytest.mark.parametrize("width", EARLIER_HEADERS)
def test_a_crash_while_the_new_header_is_written_costs_that_row_alone(tmp_path, width):
    file = tmp_path / "results.csv"
    file.write_text(table_text(EARLIER_HEADERS[width].split(","), old_rows()[:2]))
    before, read = file.read_bytes(), read_rows(file)
    append_row(file, make_row(seed=98))
    whole = file.read_bytes()
    for length in range(len(before) + 1, len(whole), 7):
        file.write_bytes(whole[:length])
        kept = quietly_read(file)
        assert kept[: len(read)] == read and len(kept) - len(read) == (length == len(whole) - 1)
        append_row(file, make_row(seed=99))
        append_row(file, make_row(seed=100))
        assert quietly_read(file) == [*kept, as_read(make_row(seed=99)), as_read(make_row(seed=100))]
        assert file.read_bytes().startswith(whole[:length])
        # Whole headers are not repeated.
        assert file.read_text().count(CURRENT) == 1


def quietly_read(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_rows(file)


def test_a_process_of_an_earlier_version_may_still_add_its_row(old):
    header = old.read_text().partition("\n")[0].split(",")
    append_row(old, make_row(seed=98))
    late = old_rows()[0] | {"seed": 97}
    with open(old, "a") as stream:
        stream.write(table_text(header, [late]).partition("\n")[2])
    append_row(old, make_row(seed=99))
    assert [row["seed"] for row in read_rows(old)[-3:]] == ["98", "97", "99"]
    assert read_rows(old)[-2] == expected(late, header)
    assert old.read_text().count(CURRENT) == 1


def append_some(file, process):
    for seed in range(12):
        append_row(file, make_row(seed=seed, path_fingerprint=f"process{process}"))


def test_processes_that_meet_at_an_earlier_table_add_one_header(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text(table_text(EARLIER_HEADERS[38].split(","), old_rows()))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_some, args=(file, k)) for k in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = read_rows(file)
    assert len(rows) == len(old_rows()) + 48 and file.read_text().count(CURRENT) == 1
    assert {(row["path_fingerprint"], row["seed"]) for row in rows[len(old_rows()) :]} == {
        (f"process{k}", str(seed)) for k in range(4) for seed in range(12)
    }


@pytest.mark.parametrize("first", [True, False])
def test_a_later_version_is_named(tmp_path, first):
    file = tmp_path / "results.csv"
    later = [*RESULT_FIELDS[:-1], "phase_of_the_moon", "date"]
    rows = [] if first else [csv_line(RESULT_FIELDS), csv_line(as_read(make_row()).values())]
    file.write_text("".join([*rows, csv_line(later)]))
    place = f"{file} is not" if first else f"{file} line 3 is not"
    with pytest.raises(ValueError, match=f"{place}.*it has a column 'phase_of_the_moon', which is unknown here"):
        read_rows(file)


def test_columns_may_stand_in_another_order_between_the_first_and_the_last(tmp_path):
    file = tmp_path / "results.csv"
    order = [RESULT_FIELDS[0], *reversed(RESULT_FIELDS[1:-1]), RESULT_FIELDS[-1]]
    file.write_text(table_text(order, [make_row()]))
    append_row(file, make_row(seed=43))
    assert read_rows(file) == [as_read(make_row()), as_read(make_row(seed=43))]


# Spreadsheets


def saved(
    header, rows, delimiter=",", decimal=".", quoting=csv.QUOTE_MINIMAL, line_end="\n", bom=False, padding=0, date=None
):
    """A table as a spreadsheet might save it."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
    writer.writerow([*header, *[""] * padding])
    for row in rows:
        cells = as_read(row)
        for name in FORMAT.numbers:
            cells[name] = cells[name].replace(".", decimal)
        cells["date"] = date or cells["date"]
        writer.writerow([*(cells[name] for name in header), *[""] * padding])
        if padding:
            writer.writerow([""] * (len(header) + padding))
    return stream.getvalue().encode("utf-8-sig" if bom else "utf-8")


numbers = st.decimals(-1000, 1000, places=4, allow_nan=False).map(lambda value: f"{value:.4f}")


@settings(max_examples=150, deadline=None)
@given(
    fids=st.lists(numbers, min_size=1, max_size=4),
    delimiter=st.sampled_from(",;\t"),
    comma=st.booleans(),
    header=st.sampled_from([RESULT_FIELDS, *(tuple(header.split(",")) for header in EARLIER_HEADERS.values())]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
    padding=st.integers(0, 3),
    date=st.sampled_from([None, "2025-01-31 23:59:59"]),
)
def test_what_a_spreadsheet_saves_is_read_as_it_was(tmp_path_factory, fids, delimiter, comma, header, **style):
    rows = [make_row(seed=k, fid=fid, dataset='a "b"; c, d', lr=0.0001) for k, fid in enumerate(fids)]
    plain, file = tmp_path_factory.mktemp("plain") / "results.csv", tmp_path_factory.mktemp("saved") / "results.csv"
    plain.write_bytes(saved(header, rows))
    file.write_bytes(saved(header, rows, delimiter, "," if comma and delimiter != "," else ".", **style))
    assert read_rows(file) == read_rows(plain)
    content = file.read_bytes()
    if delimiter == "," and not style["padding"]:
        append_row(file, make_row(seed=99))
        added = file.read_bytes().removeprefix(content)
        assert read_rows(file) == [*read_rows(plain), as_read(make_row(seed=99))]
        # One kind of line ends, as before.
        assert style["line_end"] != "\r\n" or added.count(b"\r\n") == added.count(b"\n") > 0
        assert style["line_end"] != "\n" or b"\r" not in added
    else:
        for add in (lambda: append_row(file, make_row(seed=99)), lambda: check_table(file)):
            with pytest.raises(ValueError, match="saved by a spreadsheet with .* its columns.*save it as CSV"):
                add()
        assert file.read_bytes() == content


def write(file, row, **style):
    file.write_bytes(saved(RESULT_FIELDS, [make_row(seed=k, **row) for k in range(2)], **style))
    return file


ALONE = {"seconds": None, **dict.fromkeys(TRAINING)}  # No other number is in the row.
COMMAS = {"delimiter": ";", "decimal": ","}
REFUSED = [
    (COMMAS, {"fid": 33.251, **ALONE}, "may stand between thousands"),
    ({"delimiter": ";"}, {"fid": "33,25", "seconds": 1.5}, "points in others, as in line 2"),
    ({"delimiter": ";"}, {"fid": "1.033,25", **ALONE}, "column fid: '1.033,25' is not .* but one with a comma"),
    ({}, {"fid": "33,25"}, "column fid: '33,25' is not .* but one with a comma, as spreadsheets"),
    ({"date": "01/02/2025 23:59"}, {}, "column date: '01/02/2025 23:59' .* in the form of a spreadsheet"),
    ({"date": "31.01.2025 23:59:59"}, {}, "column date: .* in the form of a spreadsheet"),
    ({}, {"checkpoint_fingerprint": "1.23457E+15"}, "column checkpoint_fingerprint: .* the number that a spreadsheet"),
]


@pytest.mark.parametrize(("style", "row", "message"), REFUSED)
def test_what_a_spreadsheet_made_doubtful_is_refused_with_its_cause(tmp_path, style, row, message):
    file = write(tmp_path / "results.csv", row, **style)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        read_rows(file)
    assert str(error.value).startswith(str(file)) and file.read_bytes() == before


def test_decimal_commas_prove_themselves(tmp_path):
    """A number with three digits behind its comma is one of its kind where another has not."""
    file = write(tmp_path / "results.csv", {"fid": 33.251, "seconds": 1.5}, **COMMAS)
    assert [row["fid"] for row in read_rows(file)] == ["33.251"] * 2


def test_a_rate_in_another_notation_is_the_same_rate(tmp_path):
    file = tmp_path / "results.csv"
    for rate in ("1e-05", "1.00E-05", "0.00001"):
        append_row(file, make_row(lr=rate, ema_decay="0.50"))
    assert {(row["lr"], row["ema_decay"]) for row in read_rows(file)} == {("1e-05", "0.5")}


def test_other_encodings_are_named(tmp_path):
    file = tmp_path / "results.csv"
    file.write_bytes(saved(RESULT_FIELDS, [make_row()], "\t").decode().encode("utf-16"))
    for use in (read_rows, lambda file: append_row(file, make_row())):
        with pytest.raises(ValueError, match="UTF-16; save it as CSV in UTF-8"):
            use(file)


def test_a_date_without_seconds_or_of_a_torn_line_is_none_of_the_other(tmp_path):
    file = write(tmp_path / "results.csv", {}, date="2025-01-31 23:59")
    assert {row["date"] for row in read_rows(file)} == {"2025-01-31T23:59:00Z"}
    whole = file.read_bytes()
    append_row(file, make_row(seed=7))
    content = file.read_bytes()
    for length in range(len(whole) + 1, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.warns(UserWarning, match="line 4 is not a whole result"):
            assert len(read_rows(file)) == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_mixed_table_that_a_spreadsheet_sorted_is_read_all_the_same(tmp_path, order):
    """Rows know their columns by their number, wherever the headers are."""
    file = tmp_path / "results.csv"
    file.write_text(table_text(EARLIER_HEADERS[38].split(","), [old_rows()[0]]))
    append_row(file, make_row(seed=99))
    read = sorted(read_rows(file), key=lambda row: row["seed"])
    header, *lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([header, *(lines[k] for k in order)]))
    assert sorted(read_rows(file), key=lambda row: row["seed"]) == read and len(read) == 2
