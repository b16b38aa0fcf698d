#!/usr/bin/env bash
# eval_all.sh with the EMA weights, by the name that the published guide gives it.
#
#   ./scripts/eval_all_ema.sh [--multi-seed] [--force]
set -euo pipefail
source "$(dirname "$0")/common.sh"
exec ./scripts/eval_all.sh --ema "$@"
