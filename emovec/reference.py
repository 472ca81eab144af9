"""The one operation in plain torch: the oracle every backend is tested against.

Computed in fp64 from unpacked tensors, token by token where that is clearer. ``docs/op.md`` says the same in words.
It is also the backend of devices that have no kernel of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_(
    x: Tensor,
    readers: Tensor,
    directions: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    delta: Tensor | None = None,
    gate: Tensor | None = None,
    gate_threshold: Tensor | None = None,
    rule_concept: Tensor | None = None,
    rule_bounds: Tensor | None = None,
    rule_solve: Tensor | None = None,
    scores: Tensor | None = None,
    sqnorm: Tensor | None = None,
) -> None:
    """Read every token's scores and norm, then steer the tokens that have a row. ``x`` is changed in place.

    x, residual [N, d]; readers, directions [K, d]; mean, inv_std [K]; row [N] int32 (None: row 0 for every token).
    The steering table has R rows: delta [R, d]; gate [R, 2] int32 (concept or -1, row to use while closed or -1);
    gate_threshold [R] in score units; rule_concept [R, M] int32 (-1: no rule); rule_bounds [R, 3, M] (lo, hi and
    ``<delta, reader>``, all projections); rule_solve [R, M, M], the inverse of ``G_S = R_S V_S^T``, zero where unused.
    Outputs, if given: scores [N, K], sqnorm [N], both of the stream *before* steering.
    """
    f64 = torch.float64
    stream = x.to(f64) if residual is None else x.to(f64) + residual.to(f64)
    projection = stream @ readers.to(f64).T
    score = (projection - mean.to(f64)) * inv_std.to(f64)
    if scores is not None:
        scores.copy_(score)
    if sqnorm is not None:
        sqnorm.copy_((stream * stream).sum(-1))
    if delta is None:
        return
    assert gate is not None
    assert gate_threshold is not None
    assert rule_concept is not None
    assert rule_bounds is not None
    assert rule_solve is not None

    token = torch.arange(x.shape[0], device=x.device)
    j = torch.zeros_like(token) if row is None else row.long()
    token, j = token[j >= 0], j[j >= 0]
    concept, fallback = gate[j].long().unbind(-1)
    closed = (concept >= 0) & ~(score[token, concept.clamp_min(0)] > gate_threshold.to(f64)[j])
    j = torch.where(closed, fallback, j)
    token, j = token[j >= 0], j[j >= 0]

    update = delta.to(f64)[j]
    lo, hi, shift = rule_bounds.to(f64)[j].unbind(1)
    concept = rule_concept[j].long()
    used = (concept >= 0).to(f64)
    steered = projection[token].gather(1, concept.clamp_min(0)) + shift
    wanted = (steered.clamp(lo, hi) - steered) * used
    coefficient = (rule_solve.to(f64)[j] @ wanted.unsqueeze(-1)).squeeze(-1) * used
    for m in range(concept.shape[1]):
        update = update + coefficient[:, m, None] * directions.to(f64)[concept[:, m].clamp_min(0)]
    x[token] = (x[token].to(f64) + update).to(x.dtype)
