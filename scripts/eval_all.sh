#!/usr/bin/env bash
# Score everything over all epochs (baseline; LIFT on the diagonal, DP-64, DP-Total), then tabulate.
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
        *)
            echo "error: unknown flag '$flag'; see ./scripts/eval_all.sh --help" >&2
            exit 2
            ;;
    esac
done
export SEEDS FORCE EMA
setup_environment requirements.txt

./scripts/eval_baseline.sh
./scripts/eval_lift.sh
./scripts/eval_lift_dp.sh
python aggregate_results.py --input "$RESULTS_DIR/fid_results.csv" --output "$RESULTS_DIR/fid_table"

# Figures: the score, the losses, and for the last epoch paths and samples of equal seeds beside each other.
epoch=$(lift_epochs | tail -1)
weights=raw
[[ $EMA == 0 ]] || weights=ema
metric=${METRICS%% *}
python make_figures.py scores "$RESULTS_DIR/fid_results.csv" --metric "$metric" --output "$RESULTS_DIR/$metric.png"
if [[ -d $LOG_DIR/baseline && -d $LOG_DIR/lift_dual_timestep ]]; then
    python make_figures.py losses "$LOG_DIR/baseline" "$LOG_DIR/lift_dual_timestep" --output "$RESULTS_DIR/losses.png"
fi
samples=() schedules=()
generate() {
    local name=$1 stem=$2 path_type=$3
    local folder="$RESULTS_DIR/samples/${stem}_${epoch}ep_${weights}_$path_type"
    local flags=(--checkpoint "$CHECKPOINT_DIR/${stem}_${epoch}ep.pth" --path_type "$path_type" --output "$folder")
    flags+=(--num_steps "$NUM_STEPS" --max_jump "$MAX_JUMP" --heatmap "$(heatmap_name "$epoch")" --num_images 12)
    [[ $EMA == 0 ]] || flags+=(--ema)
    python generate_with_path_30.py "${flags[@]}" --precision "$PRECISION" ${DEVICE:+--device "$DEVICE"} --trajectory
    samples+=("$name=$folder") schedules+=("$name=$folder/schedule.json")
}
[[ ! -e $CHECKPOINT_DIR/baseline_${epoch}ep.pth ]] || generate Baseline baseline diagonal
generate "LIFT diagonal" lift_dual_timestep diagonal
generate "LIFT DP-64" lift_dual_timestep dp_64
generate "LIFT DP-Total" lift_dual_timestep dp_total
python make_figures.py samples "${samples[@]}" --output "$RESULTS_DIR/samples_${epoch}ep_$weights.png" \
    --title "epoch $epoch, $weights weights, $NUM_STEPS network calls"
python make_figures.py paths "${schedules[@]}" --output "$RESULTS_DIR/paths_${epoch}ep_$weights.png" \
    --title "epoch $epoch, $weights weights"
