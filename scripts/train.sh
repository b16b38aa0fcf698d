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
[[ $GPUS_PER_JOB =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_JOB='$GPUS_PER_JOB' is not a number of GPUs"
[[ $GPUS_PER_JOB == 1 || -z $DEVICE || $DEVICE == cpu ]] || refuse "DEVICE='$DEVICE' names one GPU for $GPUS_PER_JOB"
setup_environment requirements.txt

launcher=(python)
if [[ $GPUS_PER_JOB -gt 1 ]]; then
    # With --standalone the system chooses a free port, so that two of these run beside each other.
    # Behind -- it leaves --run to the script.
    launcher+=(-m torch.distributed.run --standalone "--nproc_per_node=$GPUS_PER_JOB" --)
    # Otherwise torchrun fails on the Ctrl-C of a terminal, however well its processes end.
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGHUP,SIGQUIT
fi

# Ask every training to stop, by SIGTERM as they ignore SIGINT until their loop runs.
pass_on_stop() {
    stop_requests=$((stop_requests + 1))
    local job processes
    for job in $(jobs -pr); do
        processes=$job
        # torchrun gives its processes 30 s and fails when it is asked itself, but ends well when they do.
        [[ $GPUS_PER_JOB == 1 ]] || processes=$(cat "/proc/$job/task/"*/children 2>/dev/null || true)
        # shellcheck disable=SC2086
        kill -TERM ${processes:-$job} 2>/dev/null || true
    done
}

# To be called in the background: replaces the shell, which would else get the signals that are meant for Python.
train() {
    local script=$1
    shift
    [[ $stop_requests == 0 ]] || exit 0
    # The Ctrl-C of a terminal comes here as well as to pass_on_stop, which is enough.
    trap '' INT
    local further=$TRAIN_ARGS
    [[ $script != train_lift.py ]] || further+=" $LIFT_ARGS"
    # shellcheck disable=SC2086
    exec "${launcher[@]}" "$script" "${training_flags[@]}" "$@" $further
}

# The same on GPUs of its own, the first of which is number $1 of those that are visible.
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
