"""How far two sets of rows are apart: made (N, D) and reference (M, D), the features of samples.

Any modality's metrics are built of these. The features decide what is compared: a figure means nothing without their
name. All arithmetic is in float64.
"""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


def frechet(made: Rows, reference: Rows) -> float:
    """Fréchet distance between the Gaussians with the rows' means and covariances.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), and with C = X^T X of centred rows over sqrt(N - 1) the trace of the
    root is the nuclear norm of X1 X2^T: no root of a matrix that is singular where N <= D.
    It falls as N grows: compare at equal N only. Source: Heusel et al. 2017, arXiv:1706.08500, equation 6.
    """
    means, roots, traces = [], [], []
    for rows in (made, reference):
        rows = np.asarray(rows, dtype=np.float64)
        means.append(rows.mean(0))
        centred = (rows - means[-1]) / np.sqrt(max(1, len(rows) - 1))
        traces.append(float((centred**2).sum()))
        # R of a QR has the same R^T R = X^T X in fewer rows.
        roots.append(
            np.asarray(np.linalg.qr(centred, mode="r")) if len(rows) > rows.shape[1] else centred
        )
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + sum(traces) - 2 * shared)


def kernel(made: Rows, reference: Rows) -> float:
    """Kernel distance: the squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3.

    Unbiased, so sets of one distribution give 0 on average and less than 0 at times; without the pairs of a row with
    itself. Source: Binkowski et al. 2018, arXiv:1801.01401, equation 4.
    """
    x, y = (np.asarray(rows, dtype=np.float64) for rows in (made, reference))

    def k(a: Rows, b: Rows) -> Rows:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def own(a: Rows) -> float:
        values = k(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return own(x) + own(y) - 2 * float(k(x, y).mean())


def precision(made: Rows, reference: Rows, k: int = 3) -> float:
    """The share of what was made that lies within the reference's manifold: balls around its rows that reach to the
    k-th neighbour. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991.
    """
    radii = _neighbours(reference, k)
    return float((squared(made, reference) <= radii).any(1).mean())


def recall(made: Rows, reference: Rows, k: int = 3) -> float:
    """The share of the reference that lies within the manifold of what was made: how much of it can be made.
    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991.
    """
    return precision(reference, made, k)


def nearest(rows: Rows, reference: Rows) -> Rows:
    """The distance of each row to the nearest of the reference, (N,)."""
    parts = [squared(part, reference).min(1) for part in np.array_split(rows, -(-len(rows) // 512))]
    return np.sqrt(np.concatenate(parts))


def nearest_other(rows: Rows) -> Rows:
    """The distance of each row to the nearest of the others, (N,)."""
    return np.sqrt(_neighbours(rows, 1))


def squared(a: Rows, b: Rows) -> Rows:
    """Squared Euclidean distances (N, M)."""
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (a, b))
    apart = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * (a @ b.T)
    return np.maximum(apart, 0.0)


def _neighbours(rows: Rows, k: int) -> Rows:
    """The squared distance of each row to its k-th nearest other, (N,)."""
    out = []
    for start in range(0, len(rows), 512):
        apart = squared(rows[start : start + 512], rows)
        apart[np.arange(len(apart)), start + np.arange(len(apart))] = np.inf
        out.append(
            np.partition(apart, min(k, len(rows) - 1) - 1, axis=1)[:, min(k, len(rows) - 1) - 1]
        )
    return np.concatenate(out)
