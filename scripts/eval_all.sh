#!/usr/bin/env bash
# Score everything over all epochs (baseline; LIFT on the diagonal and along optimal paths), then tabulate, draw, report.
#
#   ./scripts/eval_all.sh [--multi-seed] [--force] [--ema]
#
#   --multi-seed   seeds 42 to 46, and mean ± sd over them
#   --force        score again what has been scored
#   --ema          the EMA weights
#
# Rows go to $RESULTS_DIR/fid_results.csv, tables to $RESULTS_DIR/fid_table.csv, .md and .tex, and all of it with the
# figures into $RESULTS_DIR/report.html. Other settings come from the environment (scripts/common.sh lists them), such as
# WEIGHTS="raw ema" SCORED_STEPS="6 10 18 36".
set -euo pipefail
source "$(dirname "$0")/common.sh"

for flag in "$@"; do
    case "$flag" in
        --multi-seed) SEEDS="42 43 44 45 46" ;;
        --force) FORCE=1 ;;
        --ema) WEIGHTS=ema ;;
        *) refuse "unknown flag '$flag'" ;;
    esac
done
export SEEDS FORCE WEIGHTS
setup_environment requirements.txt

models="baseline lift"
if ! compgen -G "$CHECKPOINT_DIR/baseline_*ep.pth" >/dev/null; then
    echo "no baseline checkpoint in $CHECKPOINT_DIR: LIFT is scored alone" >&2
    models=lift
fi
mapfile -t epochs < <(lift_epochs)
[[ ${#epochs[@]} != 0 ]] || refuse "no LIFT checkpoint in $CHECKPOINT_DIR: train one, or run eval_baseline.sh"
# Their figures are drawn here; jobs that need a map would compute it themselves.
# shellcheck disable=SC2086
! need_map $PATHS || ./scripts/compute_heatmap.sh "${epochs[@]}"
evaluate "$models" "$PATHS"
# What figures show of the baseline has a score too.
[[ $models == lift || " $PATHS " == *" diagonal "* ]] || evaluate baseline diagonal

# Figures: the scores, the losses, and for the last epoch paths and samples of equal seeds beside each other.
epoch=${epochs[-1]}
metric=${METRICS%% *}
value=$metric
case "$metric" in
    is) value=inception_score ;;
    pr) value=manifold_precision ;;
    nn) value=authenticity ;;
esac
figures=("$value.png")
flags=(--metric "$value")
[[ -z $NUM_IMAGES ]] || flags+=(--num_images "$NUM_IMAGES")
# Of NUM_STEPS where these were scored; the report shows the others too.
nfe=${SCORED_STEPS##* }
[[ " $SCORED_STEPS " != *" $NUM_STEPS "* ]] || nfe=$NUM_STEPS
python make_figures.py scores "$RESULTS_DIR/fid_results.csv" --nfe "$nfe" "${flags[@]}" --output "$RESULTS_DIR/$value.png"
if [[ -e $LOG_DIR/baseline/metrics.jsonl && -e $LOG_DIR/lift_dual_timestep/metrics.jsonl ]]; then
    python make_figures.py losses "$LOG_DIR/baseline" "$LOG_DIR/lift_dual_timestep" --output "$RESULTS_DIR/losses.png"
    figures+=(losses.png)
fi

declare -A titles=([diagonal]="LIFT diagonal" [dp_64]="LIFT DP-64" [dp_total]="LIFT DP-Total")
titles+=([image_diagonal]="LIFT image diagonal" [kl_diagonal]="LIFT KL diagonal" [kl]="LIFT KL")
# Samples of "$1" (a checkpoint's name) with weights "$2" along "$3", called "$4" in figures.
generate() {
    local stem=$1 weights=$2 path_type=$3 title=$4
    # Parameters of a path come with colons and commas, and with slashes where it is a file.
    local folder="$RESULTS_DIR/samples/${stem}_${epoch}ep_${weights}_${path_type//[:,\/ ]/_}_$NUM_STEPS"
    local flags=(--checkpoint "$CHECKPOINT_DIR/${stem}_${epoch}ep.pth" --path_type "$path_type" --output "$folder")
    flags+=("${sampling_flags[@]}" --heatmap "$(heatmap_name "$epoch" "$weights")" --num_images 12 --trajectory)
    [[ $weights == raw ]] || flags+=(--ema)
    [[ $FORCE == 0 ]] || flags+=(--force)
    python generate_with_path_30.py "${flags[@]}" --precision "$PRECISION" ${DEVICE:+--device "$DEVICE"}
    samples+=("$title=$folder") schedules+=("$title=$folder/schedule.json")
}
real="$RESULTS_DIR/training_images"
flags=(--checkpoint "$CHECKPOINT_DIR/lift_dual_timestep_${epoch}ep.pth" --write_reference "$real" --num_images 12)
[[ $FORCE == 0 ]] || flags+=(--force)
# Where the images lie by now may be among the further flags.
# shellcheck disable=SC2086
python eval_fid_batch.py $EVAL_ARGS "${flags[@]}" --cache_dir "$CACHE_DIR" --num_workers "$NUM_WORKERS"
for weights in $WEIGHTS; do
    name=${epoch}ep_$weights
    samples=() schedules=()
    [[ ! -e $CHECKPOINT_DIR/baseline_${epoch}ep.pth ]] || generate baseline "$weights" diagonal Baseline
    for path_type in $PATHS; do
        generate lift_dual_timestep "$weights" "$path_type" "${titles[$path_type]:-LIFT $path_type}"
    done
    title="epoch $epoch, $weights weights"
    python make_figures.py samples "${samples[@]}" --real "$real" --output "$RESULTS_DIR/samples_$name.png" \
        --title "$title, $NUM_STEPS network calls"
    python make_figures.py paths "${schedules[@]}" --output "$RESULTS_DIR/paths_$name.png" --title "$title"
    figures+=("samples_$name.png" "paths_$name.png")
    # shellcheck disable=SC2086
    if need_map $PATHS; then
        map=$(heatmap_name "$epoch" "$weights")
        flags=(--heatmap "$map" "${criterion_flags[@]}")
        [[ $FORCE == 0 ]] || flags+=(--force)
        # What every path costs is a long table.
        mkdir -p "$RESULTS_DIR"
        python plan_path.py "${flags[@]}" >"$RESULTS_DIR/plan_$name.txt"
        echo "what paths cost: $RESULTS_DIR/plan_$name.txt"
        figures+=("$(basename "$map" .pth).png" "$(basename "$map" .pth)_maps.png" "plan_$name*/*.png")
    fi
done

python report.py --results "$RESULTS_DIR/fid_results.csv" --folder "$RESULTS_DIR" --output "$RESULTS_DIR/report.html"
python aggregate_results.py --input "$RESULTS_DIR/fid_results.csv" --output "$RESULTS_DIR/fid_table" --brief
echo "All tables: $RESULTS_DIR/fid_table.md"
echo "Figures in $RESULTS_DIR: ${figures[*]}; trajectories: samples/*/figures/trajectory.png"
echo "Report: $RESULTS_DIR/report.html"
