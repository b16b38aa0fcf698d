#!/usr/bin/env bash
# eval_all.sh with the EMA weights, by the name that the published guide gives it.
#
#   ./scripts/eval_all_ema.sh [--multi-seed] [--force]
set -euo pipefail
exec "$(dirname "$0")/eval_all.sh" --ema "$@"
