#!/usr/bin/env bash
# Score the baseline at the epochs given, or at all that have a checkpoint.
#
#   ./scripts/eval_baseline.sh [EPOCH...]
#
# Settings come from the environment: METRICS, NUM_IMAGES, SEEDS, WEIGHTS, FORCE, DEVICE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_epochs "$@"
setup_environment requirements.txt

evaluate baseline diagonal "$@"
