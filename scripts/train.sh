#!/usr/bin/env bash
# Train the baseline, LIFT, or both: side by side where there are GPUs for both, one after the other elsewhere.
#
#   ./scripts/train.sh [baseline|lift|both]
#
# Settings come from the environment (scripts/common.sh lists them), for example
#   DATASET=path/to/images EPOCHS=400 HIDDEN_DIMS=32,64,128,256 ./scripts/train.sh lift
#   GPUS_PER_JOB=4 BATCH_SIZE=256 ./scripts/train.sh lift
#
# Ctrl-C, SIGTERM and SIGUSR1 let the training that runs save and end, and keep another from starting; the same
# command with TRAIN_ARGS="--resume auto" goes on from there.
set -euo pipefail
source "$(dirname "$0")/common.sh"
model=${1:-both}
[[ $model =~ ^(baseline|lift|both)$ ]] || refuse "unknown model '$model'"
[[ $# -le 1 ]] || refuse "unknown argument '$2'"
set_launcher
setup_environment requirements.txt

# `train` on GPUs of its own, the first of which is number $1 of those that are visible.
train_on() {
    local first=$1 script=$2 visible
    [[ $GPUS_PER_JOB -gt 1 ]] || train "$script" --device "$first"
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${visible[*]:first:GPUS_PER_JOB}") train "$script"
}

gpus=0
if [[ $model == both && -z $DEVICE ]]; then
    gpus=$(python -c "import torch; print(torch.cuda.device_count())")
fi
# Trainings run in the background, since bash would hold the trap back until a command in the foreground has ended.
trap pass_on_stop INT TERM USR1
if [[ $model != both ]]; then
    train "train_$model.py" &
    wait_for $!
elif [[ $gpus -ge $((2 * GPUS_PER_JOB)) ]]; then
    train_on 0 train_baseline.py &
    baseline=$!
    train_on "$GPUS_PER_JOB" train_lift.py &
    lift=$!
    failed=0
    wait_for "$lift" || {
        echo "LIFT ended with status $?; the baseline goes on unless it has ended" >&2
        failed=1
    }
    wait_for "$baseline" || {
        echo "the baseline ended with status $?" >&2
        failed=1
    }
    exit "$failed"
else
    for script in train_baseline.py train_lift.py; do
        train "$script" &
        wait_for $!
    done
fi
