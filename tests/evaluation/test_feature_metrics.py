"""FID against pytorch-fid and closed forms, the other metrics of features against closed forms and brute force."""

import importlib
import itertools
import sys

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from evaluation import feature_metrics
from evaluation.feature_metrics import (
    FeatureMoments,
    fid_infinity,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    random_subsets,
)


def moments_of(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def correlated_features(seed, n, d, shift=0.0):
    generator = np.random.default_rng(seed)
    spectrum = np.exp(-np.arange(d) / (d / 6))
    return generator.normal(size=(n, d)) * spectrum @ generator.normal(size=(d, d)) / np.sqrt(d) + shift


# Fréchet distance


@pytest.mark.parametrize("n", [400, 80], ids=["full rank", "rank deficient"])
def test_frechet_distance_equals_the_nuclear_norm_of_the_features(n):
    """tr (Σ1^½ Σ2 Σ1^½)^½ is the nuclear norm of X1 X2ᵀ / sqrt((n1 - 1)(n2 - 1)) for centred features X."""
    x_1, x_2 = correlated_features(1, n, 128), correlated_features(2, n + 10, 128, shift=0.2)
    (mean_1, cov_1), (mean_2, cov_2) = moments_of(x_1), moments_of(x_2)
    product = (x_1 - mean_1) @ (x_2 - mean_2).T / np.sqrt((n - 1) * (n + 9))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2) - 2 * np.linalg.norm(product, "nuc")
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n", [400, 80], ids=["full rank", "rank deficient"])
def test_frechet_distance_equals_pytorch_fid(n):
    fid_score = importlib.import_module("pytorch_fid.fid_score")
    first = moments_of(correlated_features(1, n, 128))
    second = moments_of(correlated_features(2, n + 10, 128, shift=0.2))
    try:
        expected = fid_score.calculate_frechet_distance(*first, *second)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this SciPy has no sqrtm that pytorch-fid can call: {error}")
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [400, 80], ids=["full rank", "rank deficient"])
def test_frechet_distance_equals_torch_fidelity(n):
    library = importlib.import_module("torch_fidelity.metric_fid")
    sets = [correlated_features(seed, n, 128, shift=0.1 * seed) for seed in (1, 2)]
    statistics = [library.fid_features_to_statistics(torch.from_numpy(features)) for features in sets]
    expected = library.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*moments_of(sets[0]), *moments_of(sets[1])) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(40, 40)))[0]
    s_1, s_2 = generator.uniform(0, 5, 40), generator.uniform(0, 5, 40)
    s_1[:5], s_2[3:9] = 0, 0
    mean_1, mean_2 = generator.normal(size=(2, 40))
    expected = ((mean_1 - mean_2) ** 2).sum() + ((np.sqrt(s_1) - np.sqrt(s_2)) ** 2).sum()
    distance = frechet_distance(mean_1, (basis * s_1) @ basis.T, mean_2, (basis * s_2) @ basis.T)
    assert distance == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_equal_covariances_is_the_distance_of_the_means(monkeypatch):
    # Newer SciPy versions have another matrix square root.
    monkeypatch.delattr("scipy.linalg.sqrtm")
    for n in (30, 200):
        mean, cov = moments_of(correlated_features(0, n, 64))
        shift = np.linspace(0, 0.3, 64)
        assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx((shift**2).sum(), rel=1e-12)


@pytest.mark.parametrize("ranks", [(20, 90), (90, 20), (3, 200)])
def test_frechet_distance_where_one_covariance_has_the_lower_rank(ranks):
    (x_1, x_2) = (correlated_features(k, n, 128) for k, n in enumerate(ranks))
    (mean_1, cov_1), (mean_2, cov_2) = moments_of(x_1), moments_of(x_2)
    product = (x_1 - mean_1) @ (x_2 - mean_2).T / np.sqrt((len(x_1) - 1) * (len(x_2) - 1))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2) - 2 * np.linalg.norm(product, "nuc")
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_of_equal_and_of_degenerate_gaussians():
    mean, cov = moments_of(correlated_features(0, 30, 64))
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-12 * np.trace(cov)
    zero = np.zeros_like(cov)
    assert frechet_distance(mean, cov, mean, zero) == pytest.approx(np.trace(cov), rel=1e-14)
    assert frechet_distance(mean, zero, 3 * mean, zero) == pytest.approx(4 * (mean**2).sum(), rel=1e-14)


def test_frechet_distance_forgives_rounding_but_no_negative_variance():
    mean, cov = moments_of(correlated_features(0, 30, 64))
    rounded = cov.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < 0
    assert frechet_distance(mean, rounded, mean, cov) < 1e-4 * np.trace(cov)
    # A millionth of the largest eigenvalue is forgiven, and no more.
    zero, least = np.zeros(2), np.diag([2.0, -2e-6])
    assert frechet_distance(zero, least, zero, np.diag([2.0, 0])) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(zero, np.diag([2.0, -2.002e-6]), zero, least)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(mean, cov - 0.01 * np.eye(64), mean, cov)
    # Without any variance the first pivot ends the factorisation, and the covariances between features stay.
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(mean[:2], np.array([[0, 1], [1, 0]]), mean[:2], cov[:2, :2])
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(mean, cov, mean, -cov)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mean, cov, mean * np.nan, cov)
    # One value is enough, and in either of the two.
    for bad in (np.nan, np.inf):
        one_mean, one_cov = mean.copy(), cov.copy()
        one_mean[3] = one_cov[2, 5] = bad
        for moments in ((one_mean, cov), (mean, one_cov)):
            with pytest.raises(ValueError, match="not finite"):
                frechet_distance(*moments, mean, cov)
            with pytest.raises(ValueError, match="not finite"):
                frechet_distance(mean, cov, *moments)
    with pytest.raises(ValueError, match=r"\[63\]"):
        frechet_distance(mean[1:], cov, mean, cov)


# Moments


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [1, 150, 0, 49], [64, 64, 64, 8]])
def test_streamed_moments_equal_numpy_for_any_split(sizes):
    # A mean of a million times the spread leaves nothing of a variance taken as E[x²] - E[x]².
    features = correlated_features(0, 200, 12) + 1e6
    mean, cov = moments_of(features)
    moments = FeatureMoments()
    start = 0
    for size in sizes:
        moments.update(features[start : start + size])
        start += size
    assert moments.n == 200
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(moments.cov, cov, rtol=0, atol=1e-9 * np.abs(cov).max())


def test_single_precision_tensors_are_summed_in_double():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1000
    moments = FeatureMoments()
    for batch in features.split(7):
        moments.update(batch)
    np.testing.assert_allclose(moments.cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


def test_one_feature_has_a_mean_and_two_have_a_covariance():
    moments = FeatureMoments()
    moments.update(np.array([[1.0, 5.0]]))
    np.testing.assert_array_equal(moments.mean, [1, 5])
    moments.update(np.array([[3.0, 1.0]]))
    np.testing.assert_array_equal(moments.mean, [2, 3])
    np.testing.assert_array_equal(moments.cov, [[2, -4], [-4, 8]])


def test_moments_refuse_what_has_none():
    moments = FeatureMoments()
    with pytest.raises(ValueError, match="at least one"):
        _ = moments.mean
    moments.update(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least two"):
        _ = moments.cov
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        moments.update(np.ones((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        moments.update(np.full((2, 3), np.nan))
    assert moments.n == 1


# FID at infinitely many images


def test_extrapolation_takes_away_the_bias_of_few_images():
    """FID of n images of the reference's Gaussian moved by δ is, up to 1/n²,
    |δ|² + (tr Σ + ½ Σij λi λj (1 + [i = j]) / (λi + λj)) / n.

    The double sum is the expected second-order change of the Bures distance by a Wishart covariance.
    """
    d, n = 24, 1000
    variances = np.linspace(0.5, 2, d)
    products = np.outer(variances, variances) * (1 + np.eye(d)) / np.add.outer(variances, variances)
    bias = (variances.sum() + products.sum() / 2) / n
    shift = np.full(d, 0.1)
    limit = (shift**2).sum()
    plain, extrapolated = [], []
    for seed in range(16):
        features = np.random.default_rng(seed).normal(size=(n, d)) * np.sqrt(variances) + shift
        found = fid_infinity(features, np.zeros(d), np.diag(variances), seed=seed)
        plain.append(found.fids[-1])
        extrapolated.append(found.value)
    # The mean of n images lies (4 Σ δi² λi / n)^½ off along the shift, which both estimates take over in full.
    error = np.sqrt(4 * (shift**2 * variances).sum() / n / 16)
    assert np.mean(plain) - limit == pytest.approx(bias, abs=3 * error)
    assert abs(np.mean(extrapolated) - limit) < 3 * error
    assert bias > 6 * error


@pytest.mark.parametrize(("n", "d"), [(400, 12), (200, 300), (300, 128)], ids=["n > D", "n < D", "both"])
def test_every_point_of_the_line_is_the_distance_of_its_subset(n, d):
    features = correlated_features(3, n, d).astype(np.float32)
    mean, cov = moments_of(correlated_features(4, 2 * d, d))
    found = fid_infinity(torch.from_numpy(features), mean, cov, seed=5, num_sizes=7)
    subsets = random_subsets(n, 7, seed=5)
    assert found.sizes.tolist() == [len(subset) for subset in subsets]
    assert found.sizes[0] == n // 10 and found.sizes[-1] == n and np.ptp(np.diff(found.sizes)) <= 1
    for subset, fid in zip(subsets, found.fids, strict=True):
        assert len(set(subset.tolist())) == len(subset) and 0 <= subset.min() and subset.max() < n
        expected = frechet_distance(*moments_of(features[subset].astype(np.float64)), mean, cov)
        assert fid == pytest.approx(expected, rel=1e-9)
    assert found.value == pytest.approx(scipy.stats.linregress(1 / found.sizes, found.fids).intercept, rel=1e-9)
    assert fid_infinity(features, mean, cov, seed=5, num_sizes=7).value == found.value
    assert fid_infinity(features, mean, cov, seed=6, num_sizes=7).value != found.value


def test_extrapolation_from_few_features_is_refused():
    mean, cov = moments_of(correlated_features(0, 200, 8))
    assert fid_infinity(correlated_features(1, 100, 8), mean, cov).sizes.tolist()[::14] == [10, 100]
    with pytest.raises(ValueError, match="99 images.*at least 100"):
        fid_infinity(np.zeros((99, 8)), mean, cov)
    with pytest.raises(ValueError, match="7 features.*mean.*8"):
        fid_infinity(np.zeros((100, 7)), mean, cov)
    with pytest.raises(ValueError, match="not finite"):
        fid_infinity(np.full((100, 8), np.inf), mean, cov)


# Kernel distance


def polynomial_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kernel_distance_of_whole_sets_equals_the_sums_over_pairs():
    x, y = correlated_features(0, 40, 6), correlated_features(1, 40, 6, shift=0.3)
    among_x = sum(polynomial_kernel(x[[i]], x[[j]]).item() for i, j in itertools.permutations(range(40), 2))
    among_y = sum(polynomial_kernel(y[[i]], y[[j]]).item() for i, j in itertools.permutations(range(40), 2))
    between = polynomial_kernel(x, y).mean()
    mean, deviation = kernel_distance(x, y, seed=3)
    assert mean == pytest.approx((among_x + among_y) / (40 * 39) - 2 * between, rel=1e-10)
    assert deviation == 0


def test_kernel_distance_is_computed_in_double_precision():
    x, y = (correlated_features(k, 200, 6, shift=30).astype(np.float32) for k in (0, 1))
    exact = [array.astype(np.float64) for array in (x, y)]
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == kernel_distance(*exact)


@pytest.mark.parametrize(
    ("counts", "pairs", "size"),
    [
        ((1001, 1500), 100, 1000),
        ((1000, 1000), 1, 1000),
        ((1000, 1200), 100, 1000),
        ((30, 40), 100, 30),
        ((7, 7), 1, 7),
    ],
)
def test_subsets_are_a_hundred_pairs_of_up_to_a_thousand_images_and_one_where_they_are_the_sets(
    monkeypatch, counts, pairs, size
):
    asked = []

    def answer(*features, **options):
        asked.append((*map(len, features), options))
        return {"kernel_inception_distance_mean": 1.5, "kernel_inception_distance_std": 0.5}

    monkeypatch.setattr("torch_fidelity.metric_kid.kid_features_to_metric", answer)
    assert kernel_distance(*(np.zeros((count, 3)) for count in counts), seed=9) == (1.5, 0.5)
    options = {"kid_subsets": pairs, "kid_subset_size": size, "rng_seed": 9, "verbose": False}
    assert asked == [(*counts, options)]


# Two distributions on four points in the plane, of which every expectation is a finite sum.
POINTS = np.array([[0.0, 0], [2, 0], [0, 2], [2, 3]])
WEIGHTS = np.array([[0.4, 0.2, 0.3, 0.1], [0.1, 0.4, 0.3, 0.2]])


def draws(generator, which, n):
    return POINTS[generator.choice(4, n, p=WEIGHTS[which])]


@pytest.mark.parametrize("second", [0, 1], ids=["equal distributions", "two distributions"])
def test_kernel_distance_has_no_bias_at_few_images(second):
    difference = WEIGHTS[0] - WEIGHTS[second]
    kernel = polynomial_kernel(POINTS, POINTS)
    exact = difference @ kernel @ difference
    n, generator = 8, np.random.default_rng(0)
    found = [kernel_distance(draws(generator, 0, n), draws(generator, second, n))[0] for _ in range(3000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - exact) < 3 * error
    # Sums that keep the pairs of an image with itself exceed by (E k(x, x) - E k(x, x')) / n on either side.
    excess = sum(weights @ np.diag(kernel) - weights @ kernel @ weights for weights in WEIGHTS[[0, second]]) / n
    assert excess > 30 * error


def test_deviation_of_the_kernel_distance_is_the_spread_over_subsets(monkeypatch):
    monkeypatch.setattr(feature_metrics, "KID_SUBSET_SIZE", 20)
    generator = np.random.default_rng(0)
    x, y = draws(generator, 0, 4000), draws(generator, 1, 3000)
    mean, deviation = kernel_distance(x, y, seed=1)
    fresh = [kernel_distance(draws(generator, 0, 20), draws(generator, 1, 20))[0] for _ in range(2000)]
    assert mean == pytest.approx(np.mean(fresh), abs=4 * np.std(fresh) / np.sqrt(feature_metrics.KID_SUBSETS))
    assert deviation == pytest.approx(np.std(fresh), rel=0.4)
    assert kernel_distance(x, y, seed=1) == (mean, deviation) != kernel_distance(x, y, seed=2)


# Inception score


def test_inception_score_of_equal_and_of_confident_answers():
    generator = np.random.default_rng(0)
    assert inception_score(np.tile(generator.normal(size=8), (30, 1))) == pytest.approx((1, 0), abs=1e-12)
    # Each of ten parts holds a single image, whose answer is the mean answer.
    assert inception_score(50 * np.eye(10)) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_of_evenly_spread_confident_answers_is_their_number(monkeypatch):
    monkeypatch.setattr(feature_metrics, "SCORE_SPLITS", 1)
    for num_classes in (2, 7):
        logits = 60 * np.eye(num_classes)[np.arange(5 * num_classes) % num_classes]
        assert inception_score(logits) == pytest.approx((num_classes, 0), rel=1e-9)


def test_inception_score_equals_its_formula_over_ten_parts():
    logits = torch.randn(95, 12, generator=torch.Generator().manual_seed(0)) * 3
    order = np.random.RandomState(4).permutation(95)
    p = scipy.special.softmax(logits.double().numpy()[order], axis=1)
    scores = []
    for k in range(10):
        part = p[k * 95 // 10 : (k + 1) * 95 // 10]
        # The entropy of the mean answer less the mean entropy of the answers is the mean divergence.
        divergence = scipy.stats.entropy(part.mean(axis=0)) - scipy.stats.entropy(part, axis=1).mean()
        scores.append(np.exp(divergence))
    mean, deviation = inception_score(logits, seed=4)
    assert mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert deviation == pytest.approx(np.std(scores), rel=1e-8)
    assert inception_score(logits, seed=5)[0] != mean


# Precision and recall


def blob(seed, n, centre, d=5):
    return np.random.default_rng(seed).normal(size=(n, d)) + centre


def test_precision_and_recall_of_known_manifolds():
    one, other = blob(0, 60, 0), blob(1, 60, 100)
    assert precision_recall(one, one.copy()) == (1, 1)
    assert precision_recall(one, other) == (0, 0)
    # The generated images are the first of two equally large clusters of real ones.
    precision, recall = precision_recall(one, np.concatenate([one, other]))
    assert (precision, recall) == (1, 0.5)
    # Turned round, half of the generated images are nowhere near a real one.
    assert precision_recall(np.concatenate([one, other]), one) == (0.5, 1)


@pytest.mark.parametrize("counts", [(20, 24), (300, 330)], ids=["direct distances", "distances by products"])
def test_precision_and_recall_equal_brute_force(counts):
    generated, real = blob(0, counts[0], 0, 3), blob(1, counts[1], 1.2, 3) * 1.4

    def share(points, centres):
        radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        return np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points])

    precision, recall = precision_recall(generated.astype(np.float64), torch.from_numpy(real))
    assert precision == pytest.approx(share(generated, real), abs=1e-6) and 0.2 < precision < 1
    assert recall == pytest.approx(share(real, generated), abs=1e-6) and 0.2 < recall < 1


def test_precision_and_recall_of_a_tight_cluster_far_from_zero():
    """In float32 the products of these features, 4e6 each, leave nothing of squared distances of 1e-4."""
    spread = np.random.default_rng(0).integers(0, 32, (200, 4)) / 2**12
    real, generated = (1000 + part.astype(np.float32) for part in (spread[:100], spread[100:]))
    exact = [part.astype(np.float64) - 1000 for part in (generated, real)]
    assert precision_recall(generated, real) == pytest.approx(precision_recall(*exact), abs=0.02)


def test_the_fewest_images_that_can_be_scored():
    # One pair on either side.
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    kernel = polynomial_kernel(np.concatenate([x, y]), np.concatenate([x, y]))
    expected = kernel[0, 1] + kernel[2, 3] - 2 * kernel[:2, 2:].mean()
    assert kernel_distance(x, y) == pytest.approx((expected, 0))
    # Four images, of which each is within reach of the third nearest other, the farthest.
    square = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    assert precision_recall(square, square + 0.5) == (1, 1) and precision_recall(square, square + 9) == (0, 0)
    assert inception_score(np.zeros((10, 3)))[0] == pytest.approx(1)


# What the three have in common


def test_features_that_cannot_be_scored_are_refused():
    features = blob(0, 20, 0)
    for metric, few in ((kernel_distance, 1), (precision_recall, 3)):
        for arguments in ((features[:few], features), (features, features[:few])):
            with pytest.raises(ValueError, match=rf"of {few} images.*at least {few + 1}"):
                metric(*arguments)
        with pytest.raises(ValueError, match="5 values with 4"):
            metric(features, features[:, :4])
        with pytest.raises(ValueError, match="reference images hold values that are not finite"):
            metric(features, features * np.nan)
    with pytest.raises(ValueError, match="of 9 images.*at least 10"):
        inception_score(features[:9])
    with pytest.raises(ValueError, match=r"\[N, D\].*\[20, 5, 1\]"):
        inception_score(features[:, :, None])


@pytest.mark.parametrize(
    ("metric", "module"),
    [
        (lambda x: kernel_distance(x, x), "metric_kid"),
        (inception_score, "metric_isc"),
        (lambda x: precision_recall(x, x), "metric_prc"),
    ],
)
def test_missing_package_says_what_to_install(monkeypatch, metric, module):
    monkeypatch.setitem(sys.modules, f"torch_fidelity.{module}", None)
    with pytest.raises(RuntimeError, match="torch-fidelity.*pip install.*--metrics"):
        metric(blob(0, 20, 0))
