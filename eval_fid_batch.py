"""Score checkpoints: FID, KID, Inception score, precision and recall, SWD, memorisation of images sampled along paths.

    python eval_fid_batch.py --model_type baseline --device 0                      # every epoch, FID
    python eval_fid_batch.py --model_type lift --path_type diagonal dp_64 dp_total --epochs 400 --ema
    python eval_fid_batch.py --weights raw ema --num_steps 6 10 18 36 --multi-seed --metrics fid fid_infinity kid is pr
    python eval_fid_batch.py --run NAME --ema                                      # all that a run has
    python eval_fid_batch.py --metrics swd nn --num_images 1000 --seeds 42 43 44   # needs no Inception weights
    python eval_fid_batch.py --metrics fd cs ca --judge checkpoints/classifier_200ep.pth  # by a classifier trained here
    python eval_fid_batch.py --model_type lift --path_type cascade:2,6 cascade:best shift:1 lead:2 heuristic:0.8
    python eval_fid_batch.py --model_type single_t no_t --path_type diagonal dp_64 --coarse_from x0 noisy
    torchrun --standalone --nproc_per_node=4 eval_fid_batch.py --epochs 400        # every job on four GPUs
    python eval_fid_batch.py --write_reference results/fid_real                    # for python -m pytorch_fid

Every checkpoint in --checkpoint_dir, or of --run or --checkpoint, x weights x path type x number of steps x seed is one
job, for models that predict the fine image alone (single_t, no_t) also x --coarse_from; its rows, one per metric, are
appended to results/fid_results.csv, or of a run with a name to results/NAME/fid_results.csv. A job whose rows exist is
skipped unless --force, and one that another process is at is left to it, so the same command may run on many GPUs and
hosts at once. The dp and kl paths and cascade:best need the heatmap of
the same weights, which is used as it is and computed when it is missing. A job that fails does not keep the others from
running. --list_jobs prints the jobs as single commands, and --write_reference writes the images that the first of them
is compared with.
"""

import runtime.startup  # noqa: F401

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import cli
from checkpoint import FILE_STEMS
from evaluation.jobs import Evaluation, EvaluationSettings, Job, find_jobs
from evaluation.reference_set import write_images
from evaluation.results_table import check_table
from runtime.device import is_out_of_memory
from runtime.distributed import PATIENCE, Processes
from runtime.settings import option, parse_settings


@dataclass(frozen=True, kw_only=True)
class StageSettings(EvaluationSettings):
    """An evaluation, or the list of its jobs."""

    list_jobs: bool = option(False, "print one command per job and stop")
    write_reference: str | None = option(
        None,
        "write what images are compared with into this folder, all or --num_images of them, and stop",
        metavar="FOLDER",
    )


def parse_args() -> StageSettings:
    """The settings of this stage, from its flags."""
    # An abbreviated --list_jobs would stay in the commands it prints.
    return parse_settings(StageSettings, __doc__, allow_abbrev=False)


def job_command(job: Job, settings: StageSettings) -> str:
    """The command that runs one job with every other flag as given."""
    kept = [word for word in sys.argv if word not in ("--list_jobs", "--multi-seed")]
    if settings.checkpoint is not None:
        where = {"--checkpoint": job.checkpoint}
    else:
        name, epoch = re.fullmatch(r"(.+)_(\d+)ep", job.checkpoint.stem).groups()
        where = {"--model_type": next(key for key, stem in FILE_STEMS.items() if stem == name), "--epochs": epoch}
        where |= {"--run": job.checkpoint.parent.name} if settings.run else {}
    chosen = where | {
        "--weights": job.weights,
        "--path_type": job.path_type,
        "--num_steps": job.num_steps,
        "--seeds": job.seed,
    }
    if settings.num_calls and settings.solver != "ode":
        chosen["--num_calls"] = settings.calls(job.num_steps)
    if job.coarse_from:
        chosen["--coarse_from"] = job.coarse_from
    return shlex.join(["python", *kept, *(str(word) for pair in chosen.items() for word in pair)])


def main() -> None:
    """Run every job; those that other processes are at come last, and by then have their rows."""
    settings = parse_args()
    jobs = find_jobs(settings)
    if settings.list_jobs:
        print("\n".join(job_command(job, settings) for job in jobs))
        return
    if settings.write_reference:
        reference = Evaluation(settings, Processes(settings.device, PATIENCE)).reference(jobs[0])
        count = settings.num_images or reference.count
        write_images(reference, Path(settings.write_reference), settings.num_images, settings.force)
        print(f"{count} images of the reference '{reference.name}' in {settings.write_reference}")
        return
    for table in {job.output for job in jobs}:
        check_table(table)  # One that cannot be added to is refused before anything is computed.
    processes = Processes(settings.device, PATIENCE)
    evaluation = Evaluation(settings, processes)
    failures: dict[str, Exception] = {}

    def attempt(job: Job, wait: bool) -> bool:
        try:
            return evaluation.run(job, wait)
        except (ValueError, RuntimeError) as error:
            # Other processes of this run would wait for one that goes on, and memory stays short.
            if processes.count > 1 or is_out_of_memory(error):
                raise
            failures[str(error)] = error
            if len(jobs) > 1:
                print(f"{job}: failed: {' '.join(str(error).split())}", file=sys.stderr)
            return True

    taken = [job for job in jobs if not attempt(job, wait=False)]
    for job in taken:
        if processes.is_main:
            print(f"{job}: waiting for the process that is at it")
        attempt(job, wait=True)
    processes.close()
    if failures:
        # One cause of however many failures is the end of the run; of several the first is.
        raise next(iter(failures.values()))


if __name__ == "__main__":
    cli.run_stage(main)
