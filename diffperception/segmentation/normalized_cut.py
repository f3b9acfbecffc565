"""Recursive normalised cuts of a graph (Shi and Malik, 2000, section 3), dense: for up to a few thousand nodes."""

import numpy as np
from scipy.linalg import eigh

CANDIDATES = 10  # places at which the eigenvector is cut, even over its range, of which the best is taken


def recursive_cuts(affinity: np.ndarray, threshold: float) -> np.ndarray:
    """Segments (N,) int64 of nodes, numbered by their first nodes: parts are cut in two while that costs little.

    Args:
        affinity: (N, N) symmetric, 0 or more.
        threshold: no part is cut where that costs more than this, the normalised cut, 0..2.
    """
    labels = np.zeros(len(affinity), dtype=np.int64)
    open_parts, count = [np.arange(len(affinity))], 1
    while open_parts:
        part = open_parts.pop()
        cut = best_cut(affinity[np.ix_(part, part)])
        if cut is None or cut[1] > threshold:
            continue
        labels[part[cut[0]]] = count
        count += 1
        open_parts += [part[cut[0]], part[~cut[0]]]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]


def best_cut(affinity: np.ndarray) -> tuple[np.ndarray, float] | None:
    """One side (N,) bool of the cut in two that is the cheapest along the second eigenvector, and its normalised cut.

    None where there is nothing to cut.
    """
    degree = affinity.sum(1)
    if len(affinity) < 2 or degree.min() <= 0:
        return None
    # (D - W) y = lambda D y, as the symmetric problem of D^(1/2) y; of the largest eigenvalues of its complement.
    root = degree**-0.5
    _, vectors = eigh(root[:, None] * affinity * root, subset_by_index=[len(affinity) - 2, len(affinity) - 2])
    order = root * vectors[:, 0]
    sides = order > np.linspace(order.min(), order.max(), CANDIDATES + 1)[:-1, None]  # (candidates, N)
    sides = sides[sides.any(1) & ~sides.all(1)]
    if not len(sides):
        return None
    chosen = sides.astype(affinity.dtype)
    volume = chosen @ degree
    between = volume - np.einsum("cn,cn->c", chosen @ affinity, chosen)
    costs = between / volume + between / (degree.sum() - volume)
    best = int(costs.argmin())
    return sides[best], float(costs[best])
