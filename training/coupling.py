"""Which noise goes with which image in a training step: any, or by optimal transport within the batch.

    independent  every image has fresh noise of its own
    ot           the noise of a step is dealt out again so that the squared distances between images and their noise are
                 least in the sum (arXiv 2302.00482, section 3.2; 2304.14772): lines then cross less

Both are functions of seed and step, and look at the whole step before processes share it. The same noise is there after
it as before, each once, so that noise and images keep their laws and only what goes with what has changed.
"""

import torch
from scipy.optimize import linear_sum_assignment

from images.representation import Images

INDEPENDENT, OPTIMAL = "independent", "ot"
COUPLINGS = (INDEPENDENT, OPTIMAL)


def optimal_partners(clean: Images, noise: Images, labels: torch.Tensor | None = None) -> torch.Tensor:
    """For each image the row of its noise, int64 `[B]`, by which squared distances of all scales sum to the least.

    clean, noise: `[B, C, H, W]` by scale. With labels, int64 `[B]`, noise moves within classes alone. Waits for a GPU.
    """
    # The squares in |x - e|^2 are the same whatever goes with what.
    gains = sum(x.flatten(1).double() @ e.flatten(1).double().T for x, e in zip(clean, noise, strict=True)).cpu()
    everything, partners = torch.arange(len(gains)), torch.empty(len(gains), dtype=torch.int64)
    # Across classes each would get the noise that is near to its images, so that what is learned of a class would be
    # the flow from a part of the noise, while samples of the class start from all of it.
    classes = [everything] if labels is None else [everything[labels.cpu() == label] for label in labels.cpu().unique()]
    for rows in classes:
        _, order = linear_sum_assignment(gains[rows][:, rows].numpy(), maximize=True)
        partners[rows] = rows[torch.from_numpy(order)]
    return partners.to(clean[0].device)
