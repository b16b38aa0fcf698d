# Sourced by train_ddpm.sh and eval_ddpm.sh: the settings of the DDPM report for the data set "$1", and its ablations.
# shellcheck shell=bash

CLASSES=${CLASSES:-0}                  # 1: a model that is told classes; the report's is told none
case "${1:-}" in
    cifar10) DATASET=${DATASET:-uoft-cs/cifar10} ;;
    mnist) DATASET=${DATASET:-ylecun/mnist} ;;
esac
RUN=${RUN:-ddpm_${1:-}$([[ $CLASSES != 1 ]] || echo _classes)} # of the whole model; ablations add a word to it
RESOLUTION=${RESOLUTION:-32} EPOCHS=${EPOCHS:-100} SAVE_EVERY=${SAVE_EVERY:-20} LR=${LR:-2e-4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -n ${1:-} ]] || refuse "name the data set, cifar10 or mnist"
[[ $1 =~ ^(cifar10|mnist)$ ]] || refuse "unknown data set '$1'"
[[ $CLASSES =~ ^[01]$ ]] || refuse "CLASSES='$CLASSES' is neither 0 nor 1"

# What each ablation changes, in the order in which tables of the report have them; none is the whole model.
ABLATIONS=(none perceptual features both attention schedule)
declare -A ablation_flags=(
    [none]=""
    [perceptual]="--perceptual_weight 0"
    [features]="--feature_weight 0"
    [both]="--perceptual_weight 0 --feature_weight 0"
    [attention]="--network ddpm_unet_plain"
    [schedule]="--beta_schedule linear"
)

whole_run=$RUN whole_checkpoints=$CHECKPOINT_DIR whole_logs=$LOG_DIR
# Set the name and the places of the run of ablation "$1": those of the whole model with a word behind them.
set_run() {
    local suffix=""
    [[ $1 == none ]] || suffix=_without_$1
    RUN=$whole_run$suffix CHECKPOINT_DIR=$whole_checkpoints$suffix LOG_DIR=$whole_logs$suffix
    [[ $whole_logs != "$whole_checkpoints"/* ]] || LOG_DIR=$CHECKPOINT_DIR${whole_logs#"$whole_checkpoints"}
}
