"""Pages say what is there: every relative link and anchor, every file named, and every flag of every command."""

import importlib
import re
import shlex
import sys

import pytest

from conftest import ROOT, run_stage
from evaluation.results_table import read_rows

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")])
# Folders whose files a run writes.
WRITTEN = ("results/", "checkpoints/", "logs/", "cache/", "exports/")
FOLDERS = [folder.name for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]


def name_of(file):
    return str(file.relative_to(ROOT))


def anchors(page):
    """The anchors of the headings of a page, as GitHub makes them of their text."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        base = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        same = sum(anchor == base or re.fullmatch(rf"{re.escape(base)}-\d+", anchor) is not None for anchor in found)
        found.add(f"{base}-{same}" if same else base)
    return found


def without_code(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of a page or a docstring: each as its words, lines that go on joined."""
    joined = re.sub(r"\\+\n\s*", " ", text)
    for line in joined.splitlines():
        inline = re.findall(r"`(?:python )?((?:\w+/)?[a-z]\w*\.py)( [^`]*--[^`]*)`", line)
        whole = re.findall(r"(?:^|\s)(?:python|torchrun\b.*?) ((?:\w+/)?\w+\.py)((?: [^`]*)?)$", line)
        for script, words in [*inline, *whole]:
            yield script, shlex.split(words, comments=True)


@pytest.fixture(scope="session")
def flags_of():
    """`flags_of(script, words)`: the flags that a Python script of the project has, with its command if it has some."""
    known = {}

    def read(script, words):
        module = importlib.import_module(script.split("/")[-1].removesuffix(".py"))
        if script not in known:
            said = run_stage(module, "--help").output
            names = re.findall(r"^  \{([\w,]+)\}", said, re.MULTILINE)
            commands_said = {
                name: run_stage(module, name, "--help").output for name in ",".join(names).split(",") if name
            }
            known[script] = {None: said} | commands_said
        said = known[script].get(words[0] if words else None, known[script][None])
        return set(re.findall(r"(?<![\w-])--[\w-]+", said))

    return read


def test_there_are_pages_and_commands():
    assert len(PAGES) > 10
    assert sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_named_exist(page):
    missing = []
    for name in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        if name in ("__init__.py", "sample.py"):  # The second is written by export.py.
            continue
        in_a_room = "/" in name and name.split("/")[0] in FOLDERS and not name.startswith(WRITTEN)
        if (in_a_room or name.endswith((".py", ".sh", ".sbatch"))) and not (
            (ROOT / name).exists() or (page.parent / name).exists() or (ROOT / "scripts" / name).exists()
        ):
            missing.append(name)
    assert not missing


def test_functions_named_exist():
    missing = []
    for page in PAGES:
        for file, name in re.findall(r"`((?:\w+/)?\w+\.py)::?(\w+)`", page.read_text(encoding="utf-8")):
            if not re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
                missing.append((page.name, file, name))
    assert not missing


def check_commands(text, flags_of):
    unknown = []
    for script, words in commands(text):
        if not (ROOT / script).exists():
            unknown.append(script)
            continue
        given = [re.match(r"--[\w-]*", word)[0] for word in words if word.startswith("--")]
        unknown += [f"{script} {flag}" for flag in given if flag not in flags_of(script, words)]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_these_flags(page, flags_of):
    assert not check_commands(page.read_text(encoding="utf-8"), flags_of)


@pytest.mark.parametrize(
    "file", sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py")]), ids=name_of
)
def test_commands_of_docstrings_have_these_flags(file, flags_of):
    docstring = re.match(r'"""(.*?)"""', file.read_text(encoding="utf-8"), re.DOTALL)
    assert not check_commands(docstring[1], flags_of)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_named_exist(page):
    for name in re.findall(r"\./(scripts/[\w.]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    points, rows = capsys.readouterr().out, read_rows("results/fid_results.csv")
    assert "(0, 0)) 6" in points
    assert [(row["path_type"], row["nfe"], row["num_images"]) for row in rows] == [
        ("diagonal", "6", "32"),
        ("kl", "6", "32"),
    ]


def test_the_readme_is_short():
    # As one reads it: code blocks and tables too.
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1400


def test_what_is_checked_can_fail(flags_of, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert check_commands("    python train_lift.py --no_such_flag", flags_of) == ["train_lift.py --no_such_flag"]
    assert check_commands("    python no_such_stage.py --ema", flags_of) == ["no_such_stage.py"]
    assert check_commands("    python export.py FILE --ema OUT", flags_of) == []
    assert check_commands("`make_figures.py losses LOGS --title T`", flags_of) == ["make_figures.py --title"]
