"""What the scripts install."""

import re
import shutil
import subprocess

from conftest import ROOT


def bounds():
    return (ROOT / "requirements.txt").read_text().split()


def test_every_package_has_a_lower_bound():
    assert [line for line in bounds() if not re.fullmatch(r"[a-z0-9_-]+>=\d+\.\d+\.\d+", line)] == []


def test_the_oldest_packages_have_an_environment_of_their_own(checkout):
    """pip is told to take each lower bound and nothing else, and pytest runs there."""
    stub = checkout / ".venv-oldest/bin/python"
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/bin/bash\necho "$0 $*" >>oldest\n[[ $2 != pip ]] || cat "${@: -1}" >pins\n')
    stub.chmod(0o755)

    subprocess.run([checkout / "scripts/test.sh", "--oldest", "-k", "some"], cwd=checkout, check=True)

    pip, pytest = (checkout / "oldest").read_text().splitlines()
    assert " -m pip install " in pip and " -r requirements-dev.txt --constraint " in pip
    assert (checkout / "pins").read_text().split() == [line.replace(">=", "==") for line in bounds()]
    assert " -m pytest " in pytest and pytest.endswith(" -k some")
    assert not (checkout / "commands").exists()


def test_an_environment_is_made_and_filled_once(checkout):
    shutil.rmtree(checkout / ".venv")
    maker = checkout / "maker"
    maker.write_text('#!/bin/bash\nmkdir -p "$3/bin"\nprintf \'#!/bin/bash\\necho "$*" >>calls\\n\' >"$3/bin/python"\n')
    maker.write_text(maker.read_text() + 'chmod +x "$3/bin/python"\n')
    maker.chmod(0o755)

    environment = {"PYTHON": str(maker), "PATH": "/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run([checkout / "scripts/test.sh"], cwd=checkout, check=True, env=environment)

    calls = (checkout / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["pip", "pytest", "pytest"]
    assert "constraint" not in calls[0]
