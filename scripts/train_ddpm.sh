#!/usr/bin/env bash
# Train the model of the DDPM report on CIFAR-10 or MNIST, and its ablations.
#
#   ./scripts/train_ddpm.sh cifar10|mnist [--wandb] [--ablation NAME...]
#
#   --wandb      log to Weights & Biases too
#   --ablation   train these, one after the other: none (the whole model, as without this flag); perceptual, features or
#                both, without these terms of the loss; attention, without it; schedule, linear in place of cosine; all
#
# Preset ddpm_report, Adam (AdamW without decay) at 2e-4, batches of 64, 100 epochs, images of 32x32 (MNIST padded from
# 28x28), unconditional. Runs are called ddpm_cifar10, ddpm_cifar10_without_attention and so on. Settings come from the
# environment (scripts/common.sh lists them), and beside them
#   CLASSES=1 ./scripts/train_ddpm.sh cifar10                  classes are told; the run is ddpm_cifar10_classes
#   VGG_WEIGHTS=FILE ./scripts/train_ddpm.sh cifar10           weights of VGG19 for the perceptual term, not downloaded
#   DATASET=FOLDER EPOCHS=20 GPUS_PER_JOB=4 ./scripts/train_ddpm.sh mnist
#
# Ctrl-C, SIGTERM and SIGUSR1 let the training that runs save and end, and keep another from starting; the same
# command with TRAIN_ARGS="--resume auto" goes on from there.
set -euo pipefail
source "$(dirname "$0")/ddpm.sh"
VGG_WEIGHTS=${VGG_WEIGHTS:-}

report_flags=(--preset ddpm_report --weight_decay 0)
[[ $1 != mnist ]] || report_flags+=(--pad)
[[ $CLASSES == 0 ]] || report_flags+=(--classes)
shift
ablations=()
while [[ $# != 0 ]]; do
    case "$1" in
        --wandb) report_flags+=(--wandb) ;;
        --ablation)
            [[ $# != 1 && $2 != --* ]] || refuse "--ablation needs a name, such as attention"
            while [[ $# != 1 && $2 != --* ]]; do
                [[ $2 == all || -v ablation_flags[$2] ]] || refuse "unknown ablation '$2'"
                [[ $2 == all ]] && ablations+=("${ABLATIONS[@]}") || ablations+=("$2")
                shift
            done
            ;;
        *) refuse "unknown argument '$1'" ;;
    esac
    shift
done
[[ ${#ablations[@]} != 0 ]] || ablations=(none)
set_launcher
setup_environment requirements.txt

# Trainings run in the background, since bash would hold the trap back until a command in the foreground has ended.
trap pass_on_stop INT TERM USR1
for ablation in "${ablations[@]}"; do
    set_run "$ablation"
    set_training_flags
    # shellcheck disable=SC2206
    flags=("${report_flags[@]}" ${ablation_flags[$ablation]})
    # The term that they are of may be what is left out.
    [[ -z $VGG_WEIGHTS || ${ablation_flags[$ablation]} == *perceptual* ]] || flags+=(--vgg_weights "$VGG_WEIGHTS")
    train train_baseline.py "${flags[@]}" &
    wait_for $!
done
