#!/usr/bin/env bash
# Set up and run the tests, on every core; further arguments go to pytest.
#
#   ./scripts/test.sh [--oldest] [PYTEST ARGUMENT...]
#
# --oldest: with the oldest version of every package that requirements.txt allows, in .venv-oldest; Python 3.11 or 3.12.
set -euo pipefail
source "$(dirname "$0")/common.sh"
if [[ ${1:-} == --oldest ]]; then
    shift
    export PYTHON=${PYTHON:-python3.11}
    setup_environment requirements-dev.txt .venv-oldest --constraint <(sed 's/>=/==/' requirements.txt)
else
    setup_environment requirements-dev.txt
fi

python -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"
