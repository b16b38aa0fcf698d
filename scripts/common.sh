# Sourced by every script: the Python environment and the settings, each overridable from the environment.
# shellcheck shell=bash

# Print the comment block at the top of the calling script when asked for help.
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,/^set -euo/{/^#SBATCH/d;/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Make .venv, or the folder "$2", when it is missing, and install a requirements file when it has changed since the last
# time; further arguments go to pip.
setup_environment() {
    local requirements=$1 folder=${2:-.venv}
    local stamp="$folder/installed-$requirements"
    if ! cmp -s <(cat requirements*.txt) "$stamp"; then
        echo "setting up $folder from $requirements (several GB with PyTorch; once)" >&2
        [[ -x $folder/bin/python ]] || "${PYTHON:-python3}" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" "${@:3}"
        cat requirements*.txt >"$stamp"
    fi
    export PATH="$PWD/$folder/bin:$PATH"
}

refuse() {
    echo "error: $1; see $0 --help" >&2
    exit 2
}

# Every argument must be an epoch.
check_epochs() {
    local word
    for word in "$@"; do
        [[ $word =~ ^[0-9]+$ ]] || refuse "'$word' is not an epoch"
    done
}

# Wait for a process in the background to end and return its status. A trap that runs meanwhile must count the request
# to stop in stop_requests: it ends `wait` early, with a status that is not the process's.
stop_requests=0
wait_for() {
    local before status
    while true; do
        before=$stop_requests status=0
        wait "$1" || status=$?
        [[ $stop_requests != "$before" ]] || return "$status"
    done
}

# Whose results these are: a name for the run of both models gives it folders of its own.
RUN=${RUN:-}                           # such as afhq_improved; empty: the published places

# Data and training; the defaults are those of the Python scripts.
DATASET=${DATASET:-huggan/AFHQv2}
RESOLUTION=${RESOLUTION:-64}
LIMIT=${LIMIT:-}                       # first so many images only; empty: all
HIDDEN_DIMS=${HIDDEN_DIMS:-64,128,256,512}
EPOCHS=${EPOCHS:-2000}
BATCH_SIZE=${BATCH_SIZE:-64}
LR=${LR:-1e-4}
EMA_DECAY=${EMA_DECAY:-0.9999}
SAVE_EVERY=${SAVE_EVERY:-200}
SEED=${SEED:-42}
TRAIN_ARGS=${TRAIN_ARGS:-}             # further flags of train_*.py, such as "--flip --resume"
LIFT_ARGS=${LIFT_ARGS:-}               # of train_lift.py alone, such as "--representation residual"

# Evaluation.
NUM_IMAGES=${NUM_IMAGES:-}             # empty: as many as the reference has
NUM_STEPS=${NUM_STEPS:-18}             # of figures, and of scores unless SCORED_STEPS says otherwise
SCORED_STEPS=${SCORED_STEPS:-$NUM_STEPS} # such as "6 10 18 36"
PATHS=${PATHS:-diagonal dp_64 dp_total kl_diagonal kl} # that eval_all.sh scores; also such as cascade:2,6 shift:1
COARSE_FROM=${COARSE_FROM:-x0}         # x0, noisy or both: what single_t and no_t read as the coarse image
MAX_JUMP=${MAX_JUMP:-5}
FACTOR=${FACTOR:-B}                    # chain-rule factor of the dp paths
NORMALISATION=${NORMALISATION:-published} # of their errors: published, per_dim, sum
KL_WEIGHT=${KL_WEIGHT:-1}              # of the kl paths: 0 is KL, 1 weighs log SNR evenly
SPACING=${SPACING:-uniform_t}          # of the diagonal; published: 990, 935, ..., 55, 0
SOLVER=${SOLVER:-ddim}                 # how a step is taken: ddim, dpmpp_2m, unipc, heun, ...
ETA=${ETA:-0}                          # of ddim
END=${END:-clean}                      # where the last step lands; published: t0
SEEDS=${SEEDS:-42}
METRICS=${METRICS:-fid}                # of fid, fid_infinity, kid, is, pr, swd, nn, such as "fid swd"; with
                                       # EVAL_ARGS="--judge FILE" also fd, cs, ca
REFERENCE=${REFERENCE:-train}          # train, holdout, a folder, or an .npz of statistics
RESIZE=${RESIZE:-pytorch-fid}          # on the way to Inception: pytorch-fid, clean, bicubic-antialias
WEIGHTS=${WEIGHTS:-raw}                # raw, ema or "raw ema"
FORCE=${FORCE:-0}                      # 1: evaluate again what has been evaluated
GRID=${GRID:-30}
K=${K:-4}
HEATMAP_IMAGES=${HEATMAP_IMAGES:-16}
GRID_SPACING=${GRID_SPACING:-uniform_t} # uniform_log_snr is better for kl paths
MAP_ARGS=${MAP_ARGS:-}                 # further flags of compute_heatmap_30.py, such as "--maps mse --seen_only"
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-64}
EVAL_ARGS=${EVAL_ARGS:-}               # further flags of eval_fid_batch.py, such as "--inception_weights FILE"
PARALLEL=${PARALLEL:-}                 # scoring jobs at a time; empty: one per visible GPU, or one process for all

# Places and hardware.
CHECKPOINT_DIR=${CHECKPOINT_DIR:-checkpoints${RUN:+/$RUN}}
RESULTS_DIR=${RESULTS_DIR:-results${RUN:+/$RUN}}
LOG_DIR=${LOG_DIR:-${RUN:+checkpoints/$RUN/}logs}
CACHE_DIR=${CACHE_DIR:-cache}
NUM_WORKERS=${NUM_WORKERS:-4}
DEVICE=${DEVICE:-}                     # 0, cuda:1 or cpu; empty: the first GPU if there is one
PRECISION=${PRECISION:-auto}
GPUS_PER_JOB=${GPUS_PER_JOB:-1}        # of train.sh, for one model; BATCH_SIZE is the sum over them

hardware_flags=(--precision "$PRECISION" --num_workers "$NUM_WORKERS" --cache_dir "$CACHE_DIR")
[[ -z $DEVICE ]] || hardware_flags+=(--device "$DEVICE")
# Set training_flags from the settings.
set_training_flags() {
    training_flags=(--dataset "$DATASET" --resolution "$RESOLUTION" --hidden_dims "$HIDDEN_DIMS" --epochs "$EPOCHS")
    training_flags+=(--batch_size "$BATCH_SIZE" --lr "$LR" --ema_decay "$EMA_DECAY" --save_every "$SAVE_EVERY")
    training_flags+=(--seed "$SEED" --output_dir "$CHECKPOINT_DIR" --log_dir "$LOG_DIR" "${hardware_flags[@]}")
    [[ -z $RUN ]] || training_flags+=(--run "$RUN")
    [[ -z $LIMIT ]] || training_flags+=(--limit "$LIMIT")
}
set_training_flags
criterion_flags=(--max_jump "$MAX_JUMP" --factor "$FACTOR" --normalisation "$NORMALISATION" --kl_weight "$KL_WEIGHT")
path_flags=(--num_steps "$NUM_STEPS" "${criterion_flags[@]}")
solver_flags=(--spacing "$SPACING" --solver "$SOLVER" --end "$END")
[[ $SOLVER != ddim ]] || solver_flags+=(--eta "$ETA")
sampling_flags=("${path_flags[@]}" "${solver_flags[@]}")

# Epochs that have a checkpoint of the name "$1", ascending.
epochs_of() {
    local file
    for file in "$CHECKPOINT_DIR/$1"_*ep.pth; do
        [[ ! $file =~ _([0-9]+)ep\.pth$ ]] || echo "${BASH_REMATCH[1]}"
    done | sort -n
}

# Epochs that have a LIFT checkpoint, ascending.
lift_epochs() {
    epochs_of lift_dual_timestep
}

# The error map of epoch "$1" with weights "$2".
heatmap_name() {
    local suffix=""
    [[ $2 == raw ]] || suffix=_$2
    echo "$RESULTS_DIR/heatmap_${GRID}_$1ep$suffix.pth"
}

# Whether one of the paths given is an optimum on an error map.
need_map() {
    local path
    for path in "$@"; do
        [[ $path =~ ^(dp_|kl|cascade:best$) ]] && return
    done
    return 1
}

# Set launcher to what starts a training on GPUS_PER_JOB GPUs.
set_launcher() {
    [[ $GPUS_PER_JOB =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_JOB='$GPUS_PER_JOB' is not a number of GPUs"
    [[ $GPUS_PER_JOB == 1 || -z $DEVICE || $DEVICE == cpu ]] ||
        refuse "DEVICE='$DEVICE' names one GPU for $GPUS_PER_JOB"
    launcher=(python)
    if [[ $GPUS_PER_JOB -gt 1 ]]; then
        # With --standalone the system chooses a free port, so that two of these run beside each other.
        # Behind -- it leaves --run to the script.
        launcher+=(-m torch.distributed.run --standalone "--nproc_per_node=$GPUS_PER_JOB" --)
        # Otherwise torchrun fails on the Ctrl-C of a terminal, however well its processes end.
        export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGHUP,SIGQUIT
    fi
}

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

# Set evaluation_flags to score "$1" (model types) along "$2" (path types) at the epochs given, or at all of them.
set_evaluation_flags() {
    local models=$1 paths=$2
    shift 2
    # shellcheck disable=SC2206
    evaluation_flags=(--model_type $models --path_type $paths --num_steps $SCORED_STEPS)
    # shellcheck disable=SC2206
    evaluation_flags+=(--metrics $METRICS --coarse_from $COARSE_FROM)
    evaluation_flags+=("${criterion_flags[@]}" "${solver_flags[@]}" --grid "$GRID")
    evaluation_flags+=(--grid_spacing "$GRID_SPACING" --K "$K" --heatmap_images "$HEATMAP_IMAGES")
    evaluation_flags+=(--checkpoint_dir "$CHECKPOINT_DIR" --heatmap_dir "$RESULTS_DIR")
    [[ $# == 0 ]] || evaluation_flags+=(--epochs "$@")
    add_scoring_flags
}

# Add to evaluation_flags what does not depend on the models and how they are sampled.
add_scoring_flags() {
    # shellcheck disable=SC2206
    evaluation_flags+=(--weights $WEIGHTS --seeds $SEEDS --reference "$REFERENCE" --resize "$RESIZE")
    evaluation_flags+=(--batch_size "$EVAL_BATCH_SIZE" --output "$RESULTS_DIR/fid_results.csv" "${hardware_flags[@]}")
    [[ -z $NUM_IMAGES ]] || evaluation_flags+=(--num_images "$NUM_IMAGES")
    [[ $FORCE == 0 ]] || evaluation_flags+=(--force)
    # shellcheck disable=SC2206
    evaluation_flags+=($EVAL_ARGS)
}

# Score as set_evaluation_flags says.
evaluate() {
    set_evaluation_flags "$@"
    run_evaluation
}

# Score as evaluation_flags say: in one process, or with a process for each job, several at a time.
run_evaluation() {
    local gpus=0 visible slots=$PARALLEL
    if [[ -z $DEVICE ]]; then
        gpus=$(python -c "import torch; print(torch.cuda.device_count())")
        slots=${slots:-$gpus}
    fi
    if [[ ${slots:-1} -le 1 ]]; then
        python eval_fid_batch.py "${evaluation_flags[@]}"
        return
    fi
    [[ -z $DEVICE || $DEVICE == cpu ]] || refuse "PARALLEL=$PARALLEL jobs cannot share DEVICE=$DEVICE; leave it out"
    # Those that are visible, or none on a host without.
    visible=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((gpus - 1)))}
    # Each of the processes that run side by side has a slot of its own, and with it a GPU. A job that a signal kills
    # ends with a status, since xargs would start no other after it.
    # shellcheck disable=SC2016
    local job='IFS=, read -ra gpus <<<"$0"
        [[ ${#gpus[@]} == 0 ]] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
        bash -c "$1" || exit 1'
    python eval_fid_batch.py "${evaluation_flags[@]}" --list_jobs |
        xargs -r -d '\n' -n 1 -P "$slots" --process-slot-var=SLOT bash -c "$job" "$visible"
}
