"""Cheapest paths of cells for a given cost of a step, by dynamic programming over the number of steps.

Cells are laid out in rows and columns, from the start in their first corner to the end in their last, and no step goes
back. Which pair of grid indices stands at a row and a column is for the caller to say.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

# Up to this many cells per step it is faster to hold the costs of all steps: 13 MB on a grid of 100 x 100.
LARGEST_WINDOWED_JUMP = 12

Cells = list[tuple[int, int]]
CellAt = Callable[[ArrayLike, ArrayLike], tuple[ArrayLike, ArrayLike]]
# Costs of steps from cells to cells, each a pair of indices or of index arrays, which broadcast.
StepCost = Callable[[tuple[ArrayLike, ArrayLike], tuple[ArrayLike, ArrayLike]], np.ndarray]


def cheapest_paths(
    step: StepCost,
    cell_at: CellAt,  # cells of rows and columns
    shape: tuple[int, int],  # rows and columns, from the start in their first corner to the end in their last
    steps: Sequence[int],
    max_jump: int | None = None,  # rows and columns that a step may cross at most
) -> dict[int, tuple[Cells, float]]:
    """Cheapest path of exactly N steps for each N of steps, from one forward pass: {N: (cells, cost)}.

    Among paths of equal cost it takes the one whose last step crosses the fewest rows, then the fewest columns, and so
    on backwards. The cost is inf if there is no path of N steps.
    """
    max_jump = max(shape) - 1 if max_jump is None else min(max_jump, max(shape) - 1)
    # Only minima are kept: the moves are found again later.
    minima = find_minima(step, cell_at, shape, max(steps), max_jump)
    return {n: (trace_back(minima[: n + 1], step, cell_at, max_jump), float(minima[n, -1, -1])) for n in steps}


def find_minima(step: StepCost, cell_at: CellAt, shape: tuple[int, int], num_steps: int, max_jump: int) -> np.ndarray:
    """Least cost of reaching each cell in 0, 1, ... steps, [num_steps + 1, rows, columns]; inf where no way leads."""
    find = _minima_by_step if max_jump <= LARGEST_WINDOWED_JUMP else _minima_by_cell
    return find(step, cell_at, shape, num_steps, max_jump)


def _minima_by_step(
    step: StepCost, cell_at: CellAt, shape: tuple[int, int], num_steps: int, max_jump: int
) -> np.ndarray:
    # Costs of all steps are held at once, so that a number of steps takes two array operations.
    rows, columns = (np.arange(size) for size in shape)
    jumps = np.arange(max_jump + 1)
    # Start cells off the grid take any cost here, since the margin of inf stands for them below.
    from_rows = np.maximum(rows - jumps[:, None], 0)[:, None, :, None]  # [J, 1, rows, 1]
    from_columns = np.maximum(columns - jumps[:, None], 0)[:, None]  # [J, 1, columns]
    costs = step(cell_at(from_rows, from_columns), cell_at(rows[:, None], columns))  # [J, J, rows, columns]
    costs[0, 0] = np.inf  # A step must move.
    padded = np.full((num_steps + 1, max_jump + shape[0], max_jump + shape[1]), np.inf)
    padded[0, max_jump, max_jump] = 0.0
    minima = padded[:, max_jump:, max_jump:]
    # Entry [k, di, dj, i, j] is the cost of reaching (i - di, j - dj); a view, so it follows every update.
    before = sliding_window_view(padded, shape, axis=(1, 2))[:, ::-1, ::-1]
    for reached, before_move in zip(minima[1:], before, strict=False):
        (before_move + costs).min((0, 1), out=reached)
    return minima


def _minima_by_cell(
    step: StepCost, cell_at: CellAt, shape: tuple[int, int], num_steps: int, max_jump: int
) -> np.ndarray:
    # As `_minima_by_step`, with the costs of the steps from one row at a time, for jumps with too many to hold.
    rows, columns = shape
    reach = max_jump + 1
    every = np.arange(columns)
    minima = np.full((num_steps + 1, rows, columns), np.inf)
    minima[0, 0, 0] = 0.0
    for row in range(rows):
        to_rows = np.arange(row, min(row + reach, rows))
        start = cell_at(row, every[:, None, None])
        costs = step(start, cell_at(to_rows[:, None], every))  # [columns, to_rows, columns]
        costs[every, 0, every] = np.inf  # A step must move.
        # Every cell is complete for all numbers of steps once the cells before it have been left.
        for column in range(columns):
            ahead = slice(column, column + reach)
            reached = minima[1:, row : row + reach, ahead]
            through = minima[:-1, row, column, None, None] + costs[column, :, ahead]
            np.minimum(reached, through, out=reached)
    return minima


def trace_back(minima: np.ndarray, step: StepCost, cell_at: CellAt, max_jump: int) -> Cells:
    """Cells of the cheapest path to the last cell in num_steps steps; minima [num_steps + 1, rows, columns]."""
    row, column = minima.shape[1] - 1, minima.shape[2] - 1
    cells = [cell_at(row, column)]
    for reached in minima[-2::-1]:
        first_row, first_column = max(row - max_jump, 0), max(column - max_jump, 0)
        from_rows, from_columns = np.arange(first_row, row + 1), np.arange(first_column, column + 1)
        costs = step(cell_at(from_rows[:, None], from_columns), cells[-1])
        # Moves in order of size, the fine axis first, so that argmin takes the smallest of equal ones.
        totals = (reached[first_row : row + 1, first_column : column + 1] + costs)[::-1, ::-1]
        totals[0, 0] = np.inf
        rows_back, columns_back = divmod(int(totals.argmin()), len(from_columns))
        row, column = row - rows_back, column - columns_back
        cells.append(cell_at(row, column))
    return cells[::-1]
