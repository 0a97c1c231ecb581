"""Statistics of an evaluation: intervals, agreement of two labellings, distance of two sets of features."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg, special, stats

GROUPS = 20  # of the jackknife: enough for an interval, few enough to be quick


class Figure(NamedTuple):
    """An estimate with its 95 % interval; what cannot be told is NaN.

    n: Values (clips, unless said otherwise) that it rests on.
    """

    mean: float
    low: float
    high: float
    n: int


NOT_MEASURED = Figure(math.nan, math.nan, math.nan, 0)


def figure(values: np.ndarray | Sequence[float], groups: np.ndarray | None = None) -> Figure:
    """Mean of values and Student's 95 % interval of it; NaNs are left out.

    Args:
      groups: For each value a number; values of the same group, as clips of one level, count as dependent (cluster
        robust, Liang and Zeger 1986). By default all are independent.
    """
    found = np.asarray(values, np.float64)
    known = ~np.isnan(found)
    groups = np.arange(len(found)) if groups is None else np.asarray(groups)
    found, groups = found[known], np.unique(groups[known], return_inverse=True)[1]
    n, num_groups = len(found), int(groups.max(initial=-1)) + 1
    if n == 0:
        return NOT_MEASURED
    mean = float(found.mean())
    off = np.bincount(groups, weights=found - mean)  # sum over each group
    error = math.sqrt(num_groups / (num_groups - 1) * float(np.sum(off**2))) / n if num_groups > 1 else math.nan
    return _with_interval(mean, error, num_groups - 1, n)


def _with_interval(mean: float, standard_error: float, freedom: int, n: int) -> Figure:
    half = float(stats.t.ppf(0.975, freedom) * standard_error) if freedom > 0 else math.nan
    return Figure(mean, mean - half, mean + half, n)


def difference(
    a: Figure, b: Figure, pairs: tuple[np.ndarray, np.ndarray] | None = None, groups: np.ndarray | None = None
) -> Figure:
    """b - a with its 95 % interval.

    Args:
      pairs: Values of a and b on the same clips, where there are such: what the clips have in common then cancels.
        Otherwise a and b count as independent.
      groups: Of the pairs; see `figure`.
    """
    if pairs is not None:
        return figure(np.asarray(pairs[1], np.float64) - np.asarray(pairs[0], np.float64), groups)
    half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    return Figure(b.mean - a.mean, b.mean - a.mean - half, b.mean - a.mean + half, min(a.n, b.n))


def jackknife(
    statistic: Callable[..., float], *samples: np.ndarray, groups: Sequence[np.ndarray | None] | None = None
) -> Figure:
    """A statistic of samples with rows 0 ... n - 1 each, and its interval, leaving out a part of the rows at a time.

    A bootstrap would draw rows twice, which flattens covariances and biases a Fréchet distance.

    Args:
      groups: For each sample a number for each row; rows of a group are left out together. By default, or where it is
        None, each row is a group.
    """
    n = min(len(sample) for sample in samples)
    value = statistic(*samples)
    of = [None] * len(samples) if groups is None else groups
    rows = [
        np.arange(len(x)) if k is None else np.unique(k, return_inverse=True)[1]
        for x, k in zip(samples, of, strict=True)
    ]
    g = min(GROUPS, *(int(row.max(initial=-1)) + 1 for row in rows))
    if g < 2 or math.isnan(value):
        return Figure(value, math.nan, math.nan, n)
    rest = []
    for k in range(g):
        kept = [sample[row % g != k] for sample, row in zip(samples, rows, strict=True)]
        rest.append(statistic(*kept))
    return _with_interval(value, float(np.std(rest) * (g - 1) ** 0.5), g - 1, n)


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features (Heusel et al. 2017).

    |μa - μb|² + tr Σa + tr Σb - 2 tr (Σa Σb)^½. The last trace is the sum of the singular values of A Bᵀ, where A and B
    are the centred features over √(n - 1): no root of a matrix, and exact with fewer samples than features.
    """
    if min(len(a_NF), len(b_NF)) < 2:
        return math.nan
    a_NF, b_NF = np.asarray(a_NF, np.float64), np.asarray(b_NF, np.float64)
    A, B = ((x - x.mean(axis=0)) / (len(x) - 1) ** 0.5 for x in (a_NF, b_NF))
    # A = Q R with orthonormal Q, so that R has the same singular values in the product and is small.
    Ra, Rb = (linalg.qr(X, mode="r")[0][: X.shape[1]] for X in (A, B))
    cross = linalg.svdvals(Ra @ Rb.T).sum()
    mean = np.sum((a_NF.mean(axis=0) - b_NF.mean(axis=0)) ** 2)
    return max(float(mean + np.sum(A**2) + np.sum(B**2) - 2 * cross), 0.0)


def contingency(a: np.ndarray, b: np.ndarray, num_a: int, num_b: int) -> np.ndarray:
    """How often label i of `a` meets label j of `b`: int64 (num_a, num_b)."""
    table = np.zeros((num_a, num_b), np.int64)
    np.add.at(table, (np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)), 1)
    return table


def adjusted_mutual_information(table: np.ndarray) -> float:
    """Agreement of two labellings, corrected for chance: 1 for equal, about 0 for unrelated.

    Vinh, Epps and Bailey 2010: (MI - E[MI]) / (mean of the entropies - E[MI]). The expectation is over all labellings
    with the same sizes of classes, in which the cells of the table are hypergeometric.
    """
    table = np.asarray(table, np.int64)
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    n = int(table.sum())
    if n == 0:
        return math.nan
    a, b = table.sum(axis=1), table.sum(axis=0)
    if len(a) == len(b) == 1:
        return 1.0
    entropies = [-float(np.sum(special.xlogy(p, p))) for p in (a / n, b / n)]
    p = table / n
    mutual = float(np.sum(special.xlogy(p, p))) + sum(entropies)
    expected = 0.0
    for x in a:
        for y in b:
            k = np.arange(max(1, x + y - n), min(x, y) + 1)
            chance = stats.hypergeom.pmf(k, n, x, y)
            expected += float(np.sum(k / n * np.log(n * k / (x * y)) * chance))
    room = (entropies[0] + entropies[1]) / 2 - expected
    return (mutual - expected) / room if abs(room) > 1e-12 else 0.0


def best_map(codes: np.ndarray, labels: np.ndarray, num_codes: int, num_labels: int) -> np.ndarray:
    """For each code the label it met most often; for a code that did not occur, the most frequent label."""
    table = contingency(codes, labels, num_codes, num_labels)
    return np.where(table.sum(axis=1) > 0, table.argmax(axis=1), table.sum(axis=0).argmax())
