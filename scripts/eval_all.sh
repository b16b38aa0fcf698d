#!/usr/bin/env bash
# Score everything over all epochs (baseline; LIFT on the diagonal and along optimal paths), then tabulate and draw.
#
#   ./scripts/eval_all.sh [--multi-seed] [--force] [--ema]
#
#   --multi-seed   seeds 42 to 46, and mean ± sd over them
#   --force        score again what has been scored
#   --ema          the EMA weights
#
# Rows go to $RESULTS_DIR/fid_results.csv, the table to $RESULTS_DIR/fid_table.csv and .md. Other settings come
# from the environment (scripts/common.sh lists them).
set -euo pipefail
source "$(dirname "$0")/common.sh"

for flag in "$@"; do
    case "$flag" in
        --multi-seed) SEEDS="42 43 44 45 46" ;;
        --force) FORCE=1 ;;
        --ema) EMA=1 ;;
        *) refuse "unknown flag '$flag'" ;;
    esac
done
export SEEDS FORCE EMA
setup_environment requirements.txt

if compgen -G "$CHECKPOINT_DIR/baseline_*ep.pth" >/dev/null; then
    ./scripts/eval_baseline.sh
else
    echo "no baseline checkpoint in $CHECKPOINT_DIR: LIFT is scored alone" >&2
fi
./scripts/eval_lift.sh
./scripts/eval_lift_dp.sh

# Figures: the score, the losses, and for the last epoch paths and samples of equal seeds beside each other.
epoch=$(lift_epochs | tail -1)
weights=raw
[[ $EMA == 0 ]] || weights=ema
name=${epoch}ep_$weights
figures=("${METRICS%% *}.png" "samples_$name.png" "paths_$name.png")

flags=(--metric "${METRICS%% *}" --nfe "$NUM_STEPS" --output "$RESULTS_DIR/${figures[0]}")
[[ -z $NUM_IMAGES ]] || flags+=(--num_images "$NUM_IMAGES")
python make_figures.py scores "$RESULTS_DIR/fid_results.csv" "${flags[@]}"
if [[ -e $LOG_DIR/baseline/metrics.jsonl && -e $LOG_DIR/lift_dual_timestep/metrics.jsonl ]]; then
    python make_figures.py losses "$LOG_DIR/baseline" "$LOG_DIR/lift_dual_timestep" --output "$RESULTS_DIR/losses.png"
    figures+=(losses.png)
fi

samples=() schedules=()
generate() {
    local title=$1 stem=$2 path_type=$3
    local folder="$RESULTS_DIR/samples/${stem}_${name}_${path_type}_$NUM_STEPS"
    local flags=(--checkpoint "$CHECKPOINT_DIR/${stem}_${epoch}ep.pth" --path_type "$path_type" --output "$folder")
    flags+=("${sampling_flags[@]}" --heatmap "$(heatmap_name "$epoch")" --num_images 12 --trajectory)
    [[ $EMA == 0 ]] || flags+=(--ema)
    [[ $FORCE == 0 ]] || flags+=(--force)
    python generate_with_path_30.py "${flags[@]}" --precision "$PRECISION" ${DEVICE:+--device "$DEVICE"}
    samples+=("$title=$folder") schedules+=("$title=$folder/schedule.json")
}
[[ ! -e $CHECKPOINT_DIR/baseline_${epoch}ep.pth ]] || generate Baseline baseline diagonal
generate "LIFT diagonal" lift_dual_timestep diagonal
generate "LIFT DP-64" lift_dual_timestep dp_64
generate "LIFT DP-Total" lift_dual_timestep dp_total
generate "LIFT KL diagonal" lift_dual_timestep kl_diagonal
generate "LIFT KL" lift_dual_timestep kl
title="epoch $epoch, $weights weights"
python make_figures.py samples "${samples[@]}" --output "$RESULTS_DIR/samples_$name.png" \
    --title "$title, $NUM_STEPS network calls"
python make_figures.py paths "${schedules[@]}" --output "$RESULTS_DIR/paths_$name.png" --title "$title"

python aggregate_results.py --input "$RESULTS_DIR/fid_results.csv" --output "$RESULTS_DIR/fid_table"
python plan_path.py --heatmap "$(heatmap_name "$epoch")" --output "$RESULTS_DIR/plan_$name" "${criterion_flags[@]}"
echo "Figures in $RESULTS_DIR: ${figures[*]}"
heatmap=$(basename "$(heatmap_name "$epoch")" .pth)
echo "Error map of epoch $epoch: $RESULTS_DIR/$heatmap.png and ${heatmap}_maps.png; trajectories: samples/*/trajectory.png"
