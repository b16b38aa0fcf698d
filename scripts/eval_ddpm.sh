#!/usr/bin/env bash
# Score the models of train_ddpm.sh, the whole one and every ablation there is, and set them against the report's targets.
#
#   ./scripts/eval_ddpm.sh cifar10|mnist [--multi-seed] [--force] [EPOCH...]
#
#   --multi-seed   seeds 42 to 46, and mean ± sd over them
#   --force        score again what has been scored
#   EPOCH...       these epochs; without, the last of each run
#
# Rows go to $RESULTS_DIR/fid_results.csv (results/ddpm_cifar10), tables to fid_table.csv, .md and .tex there, and all of it
# with samples into report.html. Settings come from the environment (scripts/common.sh lists them), and beside them
#   SAMPLERS="ancestral:1000 ddim:50,100 dpmpp_2m:20"   how images are made: SOLVER:STEPS[,STEPS...]
#   METRICS="fid is" WEIGHTS=ema                        what is measured, of which weights
#   JUDGE=FILE                                          a classifier of train_classifier.py, whose fd and cs are measured too
#   SAMPLE_IMAGES=64                                    images to look at, of every model
#   CLASSES=1                                           models that were told classes
# Without the Inception weights its scores fail, each with a sentence, the others are measured, and the status is 1.
set -euo pipefail
WEIGHTS=${WEIGHTS:-ema} METRICS=${METRICS:-fid is}
source "$(dirname "$0")/ddpm.sh"
SAMPLERS=${SAMPLERS:-ancestral:1000 ddim:50,100 dpmpp_2m:20}
JUDGE=${JUDGE:-}
SAMPLE_IMAGES=${SAMPLE_IMAGES:-64}

data_set=$1
shift
epochs=()
for word in "$@"; do
    case "$word" in
        --multi-seed) SEEDS="42 43 44 45 46" ;;
        --force) FORCE=1 ;;
        --*) refuse "unknown flag '$word'" ;;
        *) check_epochs "$word" && epochs+=("$word") ;;
    esac
done
for sampler in $SAMPLERS; do
    [[ $sampler =~ ^[a-z0-9_]+:[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || refuse "SAMPLERS: '$sampler' is not SOLVER:STEPS"
done

# The checkpoints to score: of every run those epochs that it has, or its last one.
checkpoints=() titles=() last_epoch=0
for ablation in "${ABLATIONS[@]}"; do
    set_run "$ablation"
    wanted=("${epochs[@]}")
    [[ ${#epochs[@]} != 0 ]] || mapfile -t wanted < <(epochs_of baseline | tail -n 1)
    for epoch in "${wanted[@]}"; do
        [[ -e $CHECKPOINT_DIR/baseline_${epoch}ep.pth ]] || continue
        [[ $epoch -le $last_epoch ]] || last_epoch=$epoch
        checkpoints+=("$CHECKPOINT_DIR/baseline_${epoch}ep.pth")
        titles+=("$([[ $ablation == none ]] && echo DDPM || echo "without $ablation")")
    done
done
set_run none
[[ ${#checkpoints[@]} != 0 ]] ||
    refuse "no checkpoint${epochs[*]:+ of epoch ${epochs[*]}} in $CHECKPOINT_DIR: train with train_ddpm.sh $data_set"
setup_environment requirements.txt
# A stage that is interrupted ends with a status like one that fails, after which others would go on.
trap 'exit 130' INT

judged=() without_inception=()
[[ -z $JUDGE ]] || judged=(fd cs)
for metric in $METRICS; do
    [[ $metric =~ ^(fid|fid_infinity|kid|is|pr)$ ]] || without_inception+=("$metric")
done
without_inception+=("${judged[@]}")

# Set evaluation_flags to "$1" (SOLVER:STEPS,...) and the metrics given, and score.
score() {
    local solver=${1%%:*} steps=${1#*:}
    shift
    # shellcheck disable=SC2206
    evaluation_flags=(--checkpoint "${checkpoints[@]}" --solver "$solver" --num_steps ${steps//,/ } --metrics "$@")
    evaluation_flags+=(--spacing "$SPACING" --end "$END")
    [[ $solver != ddim ]] || evaluation_flags+=(--eta "$ETA")
    [[ -z $JUDGE ]] || evaluation_flags+=(--judge "$JUDGE")
    add_scoring_flags
    run_evaluation
}

status=0
for sampler in $SAMPLERS; do
    # shellcheck disable=SC2086
    score "$sampler" $METRICS "${judged[@]}" || {
        status=1
        # All metrics of a job fail with one of them. What was scored is skipped.
        [[ ${#without_inception[@]} == 0 ]] || score "$sampler" "${without_inception[@]}" || true
    }
done

# Samples of equal seeds beside each other, by the last of the samplers.
sampler=${SAMPLERS##* }
solver=${sampler%%:*} steps=${sampler##*[:,]}
real="$RESULTS_DIR/training_images"
flags=(--checkpoint "${checkpoints[0]}" --write_reference "$real" --num_images 12)
[[ $FORCE == 0 ]] || flags+=(--force)
# shellcheck disable=SC2086
python eval_fid_batch.py $EVAL_ARGS "${flags[@]}" --cache_dir "$CACHE_DIR" --num_workers "$NUM_WORKERS"
for weights in $WEIGHTS; do
    samples=()
    for k in "${!checkpoints[@]}"; do
        file=${checkpoints[k]}
        [[ $file =~ _([0-9]+)ep\.pth$ ]]
        name="${titles[k]// /_}_${BASH_REMATCH[1]}ep_${weights}_${solver}_$steps"
        flags=(--checkpoint "$file" --output "$RESULTS_DIR/samples/$name" --solver "$solver" --num_steps "$steps")
        flags+=(--spacing "$SPACING" --end "$END" --num_images "$SAMPLE_IMAGES" --precision "$PRECISION")
        [[ $weights == raw ]] || flags+=(--ema)
        [[ $FORCE == 0 ]] || flags+=(--force)
        python generate_with_path_30.py "${flags[@]}" ${DEVICE:+--device "$DEVICE"}
        samples+=("${titles[k]}, epoch ${BASH_REMATCH[1]}=$RESULTS_DIR/samples/$name")
    done
    python make_figures.py samples "${samples[@]}" --real "$real" --title "$solver, $steps steps, $weights weights" \
        --output "$RESULTS_DIR/samples_${last_epoch}ep_$weights.png"
done

table="$RESULTS_DIR/fid_results.csv"
if [[ $status == 0 || -e $table ]]; then
    python report.py --results "$table" --folder "$RESULTS_DIR" --output "$RESULTS_DIR/report.html" \
        --title "DDPM on $data_set" --targets "$data_set"
    python aggregate_results.py --input "$table" --output "$RESULTS_DIR/fid_table" --targets "$data_set" --brief
    echo "All tables: $RESULTS_DIR/fid_table.md"
    echo "Report: $RESULTS_DIR/report.html"
fi
if [[ $status != 0 ]]; then
    echo "error: not all scores could be measured, as said above; Inception weights from elsewhere are" \
        "EVAL_ARGS=\"--inception_weights FILE\", and METRICS=swd or JUDGE=FILE need none" >&2
fi
exit "$status"
