"""Flows from one data set to another: exact between Gaussians, paired as they say, resumed to the bit, else refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import compute_heatmap_30
import distill
import encode
import eval_fid_batch
import evaluate_likelihood
import export
import generate_with_path_30
import train_baseline
from checkpoint import START_IMAGES, load_model, read_checkpoint
from conftest import assert_same
from data import ImageSet, TwoScaleBatches, coarse, read_png, to_float
from diffusion.sampler import image_seeds, sample_seeds
from diffusion.solvers import make_solver
from diffusion.starts import Starts, check_walk, rows_in_turn
from evaluation.results_table import read_rows
from evaluation.training_columns import describe_training
from images.representation import REPRESENTATIONS
from paths.families import diagonal
from paths.path import Path
from scheduler import DDIMScheduler
from training.coupling import optimal_partners
from training.mapping_batches import MappingBatches
from training.objective import Denoising, step_generator
from training.settings import TrainingSettings

CPU = torch.device("cpu")
FLOW = DDIMScheduler(beta_schedule="flow", prediction_type="velocity", clip_sample=False)
# Start and end of lines: N(M1, S1^2) at tau = 1 and N(M0, S0^2) at tau = 0, every pixel by itself.
M1, S1, M0, S0 = 0.3, 0.5, -0.2, 0.2


def gaussian_velocity(z, tau, correlation):
    """E[x1 - x0 | z] of jointly Gaussian ends: 0 correlation independent, 1 the affine map of optimal transport."""
    tau = tau.view(-1, 1, 1, 1)
    mean, cross = tau * M1 + (1 - tau) * M0, correlation * S0 * S1
    variance = (tau * S1) ** 2 + ((1 - tau) * S0) ** 2 + 2 * tau * (1 - tau) * cross
    covariance = tau * S1**2 - (1 - tau) * S0**2 + (1 - 2 * tau) * cross
    return M1 - M0 + covariance / variance * (z - mean)


def exact(correlation):
    """The exact network of one scale."""
    return lambda xs, ts: (gaussian_velocity(xs[0].double(), ts[0].double() / 999, correlation),)


def walk(correlation, steps, solver, starts):
    scales = lambda seeds: starts.scales(list(seeds), 1, CPU)  # noqa: E731
    path = diagonal(steps, "uniform_t", num_scales=1)
    [(_, samples)] = sample_seeds(
        exact(correlation), FLOW, path, range(len(starts)), [(3, 4, 4)], 99, solver=make_solver(solver), starts=scales
    )
    return samples.images[0]


def pixels(count, seed, side=4, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def image_set(count, seed, name="set"):
    return ImageSet(pixels(count, seed), name, f"{seed}")


@pytest.mark.parametrize("steps", [1, 5])
def test_affine_coupling_walks_exactly(steps):
    """Lines of the transport between Gaussians do not cross: any number of Euler's steps ends where they do."""
    starts = Starts(pixels(3, 1))
    x_1 = to_float(torch.from_numpy(starts.pixels))
    torch.testing.assert_close(walk(1.0, steps, "ddim", starts), M0 + S0 / S1 * (x_1 - M1), rtol=0, atol=2e-5)


def test_independent_coupling_ends_at_the_same_map():
    """Its lines cross and its trajectories bend, but z_tau has the same laws, and the only rising map is that one."""
    starts = Starts(pixels(3, 1))
    x_1 = to_float(torch.from_numpy(starts.pixels))
    wanted = M0 + S0 / S1 * (x_1 - M1)
    apart = [(walk(0.0, steps, "heun", starts) - wanted).abs().max().item() for steps in (10, 20, 40)]
    assert apart[2] < 1e-3 and apart[2] < apart[1] / 3 < apart[0] / 9
    assert (walk(0.0, 1, "ddim", starts) - M0).abs().max() < 1e-6  # One step from there is the mean of the end.


@pytest.mark.parametrize("points", [((999, 999), (0, 0)), ((999, 999), (700, 400), (200, 300), (0, 0))])
def test_bands_with_clocks_of_their_own_walk_exactly(points):
    """Of an affine map the residual is scaled and the coarse image mapped, each on lines of its own."""
    scheduler = DDIMScheduler(
        beta_schedule="flow", prediction_type="velocity", clip_sample=False, representation="residual"
    )

    def denoise(xs, ts):
        tau = [t.double().view(-1, 1, 1, 1) / 999 for t in ts]
        scales = [(S1 - S0) / (S0 + (S1 - S0) * each) for each in tau]
        shift = M1 - M0 - scales[1] * (tau[1] * M1 + (1 - tau[1]) * M0)
        return scales[0] * xs[0], scales[1] * xs[1] + shift

    starts = Starts(pixels(3, 1))
    walks = sample_seeds(
        denoise, scheduler, Path(points, "by hand", {}), range(3), [(3, 4, 4), (3, 2, 2)], 2,
        starts=lambda seeds: starts.scales(list(seeds), 2, CPU),
    )  # fmt: skip
    made = torch.cat([samples.images[0] for _, samples in walks])
    wanted = M0 + S0 / S1 * (to_float(torch.from_numpy(starts.pixels)) - M1)
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-5)


def objective(coupling=None, **config):
    said = {"t_pairs": None, "t_pairs_points": None, "coupling": coupling, "model_type": "baseline", "times": "real"}
    return Denoising(said | {"start_dataset": "cats"} | config, FLOW)


def test_the_loss_that_is_left_is_known():
    """Var(x1 - x0 | z) is S0^2 S1^2 / (tau^2 S1^2 + (1 - tau)^2 S0^2), whose integral is pi S0 S1 / 2; of pairs 0."""
    generator = torch.Generator().manual_seed(0)
    ends, starts = (m + s * torch.randn(40_000, 1, 2, 2, generator=generator) for m, s in ((M0, S0), (M1, S1)))
    minimised, left = objective(), {}
    for correlation, noise in ((0.0, starts), (1.0, M1 + S1 / S0 * (ends - M0))):
        batch = minimised.draw(ends, coarse(ends), step_generator(1, 1, CPU), noise=(noise, coarse(noise)))
        assert torch.equal(batch.noise_64, noise)
        left[correlation] = minimised.losses(exact(correlation), batch)["loss_64"].mean().item()
    assert left[0.0] == pytest.approx(math.pi * S0 * S1 / 2, rel=0.02)
    assert left[1.0] < 1e-10


def test_transport_in_a_batch_sorts_in_one_dimension():
    generator = torch.Generator().manual_seed(0)
    ends, starts = torch.randn(2, 64, 1, 1, 1, generator=generator)
    dealt = starts[optimal_partners((ends,), (starts,))]
    assert torch.equal(dealt[ends.flatten().argsort()].flatten(), starts.flatten().sort().values)


@pytest.mark.parametrize("model_type, representation", [("baseline", "overcomplete"), ("dual", "residual")])
def test_starts_are_dealt_out_and_split_as_images_are(model_type, representation):
    scheduler = DDIMScheduler(beta_schedule="flow", prediction_type="velocity", representation=representation)
    said = {"t_pairs": "independent" if model_type == "dual" else None, "t_pairs_points": None, "start_dataset": "cats"}
    ends, starts = (to_float(torch.from_numpy(pixels(6, k))) for k in (1, 2))
    drawn = {}
    for coupling in (None, "ot"):
        minimised = Denoising(said | {"coupling": coupling, "model_type": model_type}, scheduler)
        noise = starts, coarse(starts)
        drawn[coupling] = minimised.draw(ends, coarse(ends), step_generator(1, 1, CPU), noise=noise)
    pair = REPRESENTATIONS[representation].split
    plain, dealt, count = drawn[None], drawn["ot"], 1 if model_type == "baseline" else 2
    torch.testing.assert_close((plain.noise_64, plain.noise_32), pair(starts))
    partners = optimal_partners(pair(ends)[:count], pair(starts)[:count])
    assert partners.tolist() != list(range(6))
    assert torch.equal(dealt.noise_64, plain.noise_64[partners])
    assert torch.equal(dealt.noise_32, plain.noise_32[partners])
    assert torch.equal(dealt.t_64, plain.t_64)


def test_batches_pair_what_they_say():
    ends, starts = image_set(14, 1), image_set(5, 2)
    batches, plain = MappingBatches(ends, starts, 4, 7, CPU), TwoScaleBatches(ends, 4, 7, CPU)
    assert len(batches) == 3 and batches.nbytes == plain.nbytes + starts.pixels.nbytes
    seen = []
    for epoch in range(2):
        shown = list(batches.epoch(epoch))
        for (x_64, x_32, labels, noise), own in zip(shown, plain.epoch(epoch), strict=True):
            assert torch.equal(x_64, own[0]) and torch.equal(x_32, own[1]) and labels is None
            assert torch.equal(noise[1], coarse(noise[0]))
            seen += [
                next(k for k in range(5) if torch.equal(x, to_float(torch.from_numpy(starts.pixels[k]))))
                for x in noise[0]
            ]
        # From anywhere on they are the same.
        for one, other in zip(shown[2], next(batches.epoch(epoch, 2)), strict=True):
            assert all(map(torch.equal, one, other)) if isinstance(one, tuple) else one is other or one.equal(other)
    assert seen == rows_in_turn(7, range(24), 5) != rows_in_turn(8, range(24), 5)
    assert all(sorted(seen[k : k + 5]) == list(range(5)) for k in range(0, 20, 5))  # All before any comes again.
    assert len({tuple(seen[k : k + 5]) for k in range(0, 20, 5)}) > 1


def test_starts_are_mirrored_by_themselves():
    ends, starts = image_set(64, 1), image_set(64, 2)
    batches, plain = (MappingBatches(ends, starts, 64, 7, CPU, flip) for flip in (True, False))
    x, own = batches.starts(0)[0], plain.starts(0)[0]
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(x, own, strict=True)])
    assert torch.where(mirrored[:, None, None, None], own.flip(-1), own).equal(x) and 16 < mirrored.sum() < 48


def test_images_of_seeds_depend_on_the_seed_alone():
    starts, seeds = Starts(pixels(5, 1)), image_seeds(42, 12)
    [whole] = starts.of_seeds(seeds, 1, CPU)
    assert torch.equal(starts.of_seeds(seeds[7:9], 2, CPU)[0], whole[7:9])
    assert len({x.numpy().tobytes() for x in whole[:5]}) == 5
    assert not torch.equal(starts.of_seeds(image_seeds(43, 12), 1, CPU)[0], whole)


def test_walks_that_images_cannot_start_are_refused():
    check_walk(diagonal(3, "uniform_t", num_scales=2), make_solver("heun"), FLOW)
    with pytest.raises(ValueError, match="--solver ddim with --eta draws noise"):
        check_walk(diagonal(3, "uniform_t", num_scales=1), make_solver("ddim", eta=0.5), FLOW)
    with pytest.raises(ValueError, match="belong at timestep 999"):
        check_walk(SimpleNamespace(points=((999, 800), (0, 0))), make_solver("ddim"), FLOW)


def mapping(**changes):
    return TrainingSettings(
        **{"model_type": "baseline", "preset": "flow", "dataset": "a/cats", "target_dataset": "dogs"} | changes
    )


def test_what_a_run_makes_is_its_data_set():
    settings = mapping()
    said = settings.recorded()
    assert (said["dataset"], said["start_dataset"]) == ("dogs", "a/cats") and "target_dataset" not in said
    assert settings.run == "baseline-flow-64px-cats-to-dogs-seed42"
    assert settings.but(epochs=3).recorded() == said | {"epochs": 3}
    assert (settings.given()["dataset"], settings.given()["target_dataset"]) == ("a/cats", "dogs")
    plain = TrainingSettings(model_type="baseline", preset="flow", dataset="dogs")
    assert plain.recorded()["start_dataset"] is plain.before_choices()["start_fingerprint"] is None


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"preset": "improved"}, "which only the process flow has, not vp"),
        ({"classes": "any"}, "pixels without classes; leave it or --classes out"),
        ({"latents": "vae"}, "pixels without classes; leave it or --latents out"),
        ({"model_type": "single_t"}, "a 'single_t' model does not"),
        ({"model_type": "dual"}, "pass --representation residual or --t_pairs same"),
        ({"model_type": "dual", "representation": "residual", "t_pairs": "follow:2"}, "--t_pairs follow:2"),
        ({"start_dataset": "birds"}, "exclude each other"),
        ({"model_type": "classifier", "classes": "any", "preset": "published"}, "to which --start_dataset belongs"),
    ],
)
def test_trainings_without_such_lines_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        mapping(**changes)


@pytest.mark.parametrize("more", [{"model_type": "shared_t"}, {"model_type": "dual", "t_pairs": "same"}])
def test_over_complete_scales_share_a_clock(more):
    assert mapping(**more).start_dataset == "a/cats"


@pytest.fixture(scope="module")
def mapped(stage, tiny, tmp_path_factory):
    """A folder with a trained model of one scale, and the flags of its training."""
    folder = tmp_path_factory.mktemp("mapped")
    for name, count, shape in (("cats", 9, (20, 16)), ("other", 9, (20, 16, 3)), ("mine", 3, (18, 24, 3))):
        (folder / name).mkdir()
        for k in range(count):
            array = np.random.default_rng((count, len(name), k)).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(array).save(folder / name / f"{name}{k}.png")
    data = ["--dataset", folder / "cats", "--target_dataset", "synthetic", "--limit", 9, "--holdout", 2]
    flags = [*tiny(folder), "--preset", "flow", "--lr_schedule", "constant", *data, "--batch_size", 3, "--flip"]
    flags = [*flags, "--coupling", "ot", "--network", "unet"]
    stage(train_baseline, *flags)
    return SimpleNamespace(folder=folder, flags=flags, checkpoint=folder / "checkpoints/baseline_2ep.pth")


def test_a_resumed_run_ends_with_the_same_bits(mapped, stage, tiny, refused, tmp_path):
    places = tiny(tmp_path)[-6:-2]
    stage(train_baseline, *mapped.flags, *places, "--epochs", 1)
    stage(train_baseline, *mapped.flags, *places, "--resume", "auto")
    own, straight = (read_checkpoint(file / "checkpoints/baseline_2ep.pth") for file in (tmp_path, mapped.folder))
    assert_same(own["model_state"], straight["model_state"])
    config = straight["config"]
    assert config["dataset"] == "synthetic" and config["start_dataset"] == str(mapped.folder / "cats")
    assert config["start_dataset_is_here"] and config["data_fingerprint"] != config["start_fingerprint"]
    other = ["--dataset", mapped.folder / "other"]
    refused(train_baseline, *mapped.flags, *places, *other, "--resume", "auto", says=("start_fingerprint",))
    assert (mapped.folder / "logs/baseline/samples_2ep_fine.png").exists()


def test_every_image_given_becomes_one(mapped, stage, refused):
    folder, words = mapped.folder, ["--checkpoint", mapped.checkpoint, "--device", "cpu", "--num_steps", 3]
    out = folder / "made"
    made = stage(generate_with_path_30, *words, "--start", folder / "mine", "--output", out)
    assert "3 images in" in made.output and "3 new with 3 network calls" in made.output
    assert sorted(file.name for file in out.glob("*.png")) == ["mine0.png", "mine1.png", "mine2.png"]
    assert (out / "figures/starts.png").exists() and read_png(out / "mine1.png").shape == (3, 16, 16)
    again = stage(generate_with_path_30, *words, "--start", folder / "mine/mine1.png", "--output", folder / "alone")
    assert "1 new" in again.output
    assert torch.equal(read_png(folder / "alone/mine1.png"), read_png(out / "mine1.png"))
    assert (
        "all there already" in stage(generate_with_path_30, *words, "--start", folder / "mine", "--output", out).output
    )
    for flags, says in (
        ([], ("walks from images of", "not from noise; name images to start from by --start")),
        (["--start", folder / "mine", "--eta", 1], ("draws noise on the way",)),
        (["--start", folder / "none.png", folder / "mine/mine1.png"], ("--start", "does not exist")),
        (["--start", folder / "mine", "--output", folder / "mine"], ("is the folder of the --start",)),
    ):
        refused(generate_with_path_30, *words, *flags, says=says, keeps=(folder,))


def test_models_of_noise_take_no_images(run, refused, mapped):
    words = ["--checkpoint", run.folder / "checkpoints/baseline_2ep.pth", "--device", "cpu"]
    refused(generate_with_path_30, *words, "--start", mapped.folder / "mine", says=("starts from noise",))


def test_scores_start_from_images_held_out(mapped, stage, refused):
    table = mapped.folder / "scores.csv"
    words = ["--checkpoint", mapped.checkpoint, "--device", "cpu", "--num_steps", 2, "--metrics", "swd"]
    words += ["--cache_dir", mapped.folder / "cache", "--output", table]
    says = ("7 images are to be scored, but 2 there are to start from", "pass --num_images 2 or fewer")
    refused(eval_fid_batch, *words, says=says)
    stage(eval_fid_batch, *words, "--num_images", 2)
    [row] = read_rows(table)
    loaded = load_model(mapped.checkpoint, given=(START_IMAGES,))
    assert row["dataset"] == "synthetic" and row["start_data"] == describe_training(loaded, None)["start_data"]
    assert row["start_data"] == f"cats ({loaded.config['start_fingerprint']})"


@pytest.mark.parametrize(
    "module, flags",
    [
        (encode, ["--checkpoint", "FILE", "--input", "mine"]),
        (evaluate_likelihood, ["--checkpoint", "FILE"]),
        (compute_heatmap_30, ["--checkpoint", "FILE"]),
        (export, ["FILE", "out"]),
        (distill, ["--teacher", "FILE", "--method", "reflow"]),
    ],
)
def test_what_asks_for_noise_refuses(module, flags, mapped, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [mapped.checkpoint if word == "FILE" else word for word in flags]
    refused(module, *words, says=("was trained to walk from images of", "not from noise"), keeps=(mapped.folder,))
