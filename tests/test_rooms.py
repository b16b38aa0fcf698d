"""Imports between rooms, read from the source, run downwards only, and every room says what it is."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from conftest import ROOT

# Modules of the root by what they hold; every other file there is a stage.
ROOT_MODULES = {
    "networks and process": ("model", "baseline_model", "scheduler", "data"),
    "loading": ("checkpoint", "image_folder", "cli"),
}
# Room by room, from the bottom: those right below it. It may import what these may, too.
BELOW = {
    "runtime": (),
    "images": ("runtime",),
    "networks": ("images",),
    "paths": ("runtime",),
    "networks and process": ("networks",),
    "diffusion": ("networks and process", "paths"),
    "truth": ("diffusion",),
    "figures": ("paths", "images"),
    "loading": ("diffusion",),
    "planning": ("diffusion", "loading"),
    "training": ("planning", "figures"),
    "evaluation": ("planning", "figures"),
    "stages": ("evaluation", "training", "truth"),
    "benchmarks": ("stages",),
    "experiments": ("stages",),
}
SCRIPTS = ("benchmarks", "experiments")
ROOMS = [name for name in BELOW if name != "stages" and name not in ROOT_MODULES]


def room_of(module):
    """The room of a module by its dotted name, or None for one that is not of this project."""
    top = module.partition(".")[0]
    if top in ROOMS:
        return top
    if not (ROOT / f"{top}.py").is_file():
        return None
    return next((room for room, modules in ROOT_MODULES.items() if top in modules), "stages")


def modules():
    """Every module of the project by its dotted name."""
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imported(file):
    """Modules of the project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            # What is imported from a room is a module of it.
            known = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else node.module for name in known}
    # Scripts of benchmarks/ and experiments/ go by their plain names.
    scripts = {other.partition(".")[2]: other for other in MODULES if room_of(other) in SCRIPTS}
    return {scripts.get(name, name) for name in names if name in MODULES or name in scripts}


MODULES = modules()
IMPORTS = {name: imported(file) for name, file in MODULES.items()}


def reachable(room):
    """A room and all that lie below it."""
    return {room}.union(*(reachable(below) for below in BELOW[room]))


def test_every_module_has_a_room():
    assert {room_of(name) for name in MODULES} == set(BELOW)
    # A folder with Python files that is no room would go unchecked.
    folders = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("*/*.py")}
    assert folders - {"tests"} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downwards(name):
    upwards = {other for other in IMPORTS[name] if room_of(other) not in reachable(room_of(name))}
    assert not upwards


def test_there_is_no_circle():
    # Raises CycleError, naming the circle.
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(MODULES)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in SCRIPTS])
def test_a_room_opens_with_what_it_is(room):
    [sentence] = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(sentence.value.value, str)


@pytest.mark.parametrize("room", ROOMS)
def test_tests_mirror_the_rooms(room):
    assert list((ROOT / "tests" / room).glob("test_*.py"))


def test_no_stage_is_imported():
    imported_stages = {other for names in IMPORTS.values() for other in names if room_of(other) == "stages"}
    assert not imported_stages


def test_flags_end_at_the_door():
    """Only the settings know the parser; others may say in its words that a text is no value."""
    users = {}
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "argparse":
                users.setdefault(name, set()).add(node.attr)
    assert users.pop("runtime.settings") >= {"ArgumentParser"}
    users.pop("networks.standalone")  # A script that is exported, and runs without this project.
    assert set().union(*users.values()) <= {"ArgumentTypeError"}


def test_the_page_names_every_module_of_every_room():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for room in ROOMS:
        [row] = re.findall(rf"^\| `{room}/` .*$", page, re.MULTILINE)
        named = {word.removesuffix(".py") for word in re.findall(r"`(\w+(?:\.py)?)`", row)}
        there = {file.stem for file in (ROOT / room).glob("*.py")} - {"__init__"}
        assert named == there, room
