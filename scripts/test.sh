#!/usr/bin/env bash
# Set up and run the tests, on every core; further arguments go to pytest.
#
#   ./scripts/test.sh [PYTEST ARGUMENT...]
set -euo pipefail
source "$(dirname "$0")/common.sh"
setup_environment requirements-dev.txt

python -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"
