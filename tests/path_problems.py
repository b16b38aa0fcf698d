"""Maps and schedules to find paths on, and what every path of cells must satisfy, in plain Python."""

import numpy as np

CRITERIA = [(0.0, False), (0.0, True), (0.5, False), (1.0, False)]


def cosine_clipped_log_snr() -> np.ndarray:
    t = np.arange(1001) / 1000
    curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas_cumprod = np.cumprod(1 - np.clip(1 - curve[1:] / curve[:-1], 1e-4, 0.02))
    return np.log(alphas_cumprod / (1 - alphas_cumprod))


def random_problem(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    log_snr = np.cumsum(rng.uniform(0.1, 1.0, n)) - 5.0
    return rng.lognormal(sigma=2.0, size=(n, n)), rng.lognormal(sigma=2.0, size=(n, n)), log_snr


def kl_problem(n: int, seed: int, falling: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m64, m32, log_snr = random_problem(n, seed)
    if falling:
        detail, low = (np.cumsum(np.cumsum(m[::-1, ::-1], 0), 1)[::-1, ::-1] for m in (m64, m32))
        m64, m32 = detail + low, low / 4
    return m64, m32, np.exp(log_snr)


def trapezoid(e64, e32, lam, a, b):
    fine = (e64[a[0]][a[1]] + e64[b[0]][b[1]]) / 2 * abs(lam[b[0]] - lam[a[0]])
    coarse = (e32[a[0]][a[1]] + e32[b[0]][b[1]]) / 2 * abs(lam[b[1]] - lam[a[1]])
    return fine + coarse


def total_cost(e64, e32, lam, cells):
    return sum(trapezoid(e64, e32, lam, a, b) for a, b in zip(cells, cells[1:], strict=False))


def assert_legal(cells, n, num_steps, max_jump, start=0):
    assert len(cells) == num_steps + 1
    assert cells[0] == (start, start) and cells[-1] == (n - 1, n - 1)
    for (i, j), (k, m) in zip(cells, cells[1:], strict=False):
        assert 0 <= k - i <= max_jump and 0 <= m - j <= max_jump and (k, m) != (i, j)
