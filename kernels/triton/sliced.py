# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803  (constants of a kernel are in capitals)
"""The second half of a call on few tokens. Few tokens are few tiles, so the first half cuts their columns into slices, a program each;
here what the slices make of a token is added up, in their order, scores and norms are written, and the token is steered.

A program owns one token and a block of its columns. What decides on the token comes from the workspace alone, which nothing here writes, so
the programs of a token decide alike without meeting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import is_closed, look_up, slots_used, solve_rules, steer


@triton.jit
def total(parts, apart, known, SLICES: tl.constexpr):
    """The sum of what SLICES slices hold at ``parts``, each ``apart`` from the one before; 0 where not ``known``."""
    sums = tl.zeros(parts.shape, tl.float32)
    for begin in range(0, SLICES, 8):
        for i in tl.static_range(8):  # loads under way together
            sums += tl.load(parts + (begin + i) * apart, mask=known & (begin + i < SLICES), other=0.0)
    return sums


@triton.jit(do_not_specialize=["tokens", "rows", "x_stride", "scores_stride"])
def finish_kernel(
    x_ptr, directions_ptr, mean_ptr, inv_std_ptr, row_ptr, delta_ptr, gate_ptr, threshold_ptr, concept_ptr, bounds_ptr, solve_ptr,
    scores_ptr, sqnorm_ptr, parts_ptr, squares_ptr, tokens, rows, x_stride, scores_stride,
    WIDTH: tl.constexpr, CONCEPTS: tl.constexpr, RULES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
    SLICES: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The op's arguments as in ``apply_kernel``, and its workspace: parts [SLICES, tokens, CONCEPTS] and squares [SLICES, tokens]."""
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    there = token < tokens
    apart = tokens.to(tl.int64)
    parts = parts_ptr + token * CONCEPTS
    if tl.program_id(1) == 0:
        if sqnorm_ptr is not None:
            tl.store(sqnorm_ptr + token, total(squares_ptr + token, apart, there, SLICES))
        if scores_ptr is not None:
            for first in range(0, CONCEPTS, BK):
                concept = (first + tl.arange(0, BK))[None, :]
                known = concept < CONCEPTS
                projection = total(parts[:, None] + concept, apart * CONCEPTS, known, SLICES)
                mean = tl.load(mean_ptr + concept, mask=known, other=0.0)
                inv_std = tl.load(inv_std_ptr + concept, mask=known, other=0.0)
                score = (projection - mean) * inv_std
                tl.store(scores_ptr + token[:, None] * scores_stride + concept, score.to(scores_ptr.dtype.element_ty), mask=known)

    if delta_ptr is not None:
        row, gate, otherwise = look_up(row_ptr, gate_ptr, token, tokens, rows, CONCEPTS)
        projection = total(parts + gate, apart * CONCEPTS, gate >= 0, SLICES)
        row = tl.where(is_closed(projection, gate, row, mean_ptr, inv_std_ptr, threshold_ptr), otherwise, row)
        steered = row >= 0
        slot = tl.arange(0, SLOTS)
        most = 0
        coefficients = tl.zeros((1, SLOTS), tl.float32)
        if RULES > 0:
            most = tl.max(slots_used(concept_ptr, row, slot, RULES), 0)
            used = steered[:, None] & (slot < RULES)[None, :]
            concept = tl.load(concept_ptr + row[:, None] * RULES + slot[None, :], mask=used, other=-1)
            used = (concept >= 0) & (concept < CONCEPTS)
            projections = total(parts[:, None] + concept, apart * CONCEPTS, used, SLICES)
            coefficients = solve_rules(projections, row, steered, concept_ptr, bounds_ptr, solve_ptr, slot, most, CONCEPTS, RULES)
        at = tl.program_id(1) * BD + tl.arange(0, BD)
        write = steered[:, None] & (at < WIDTH)[None, :]
        x_row = x_ptr + token[:, None] * (x_stride * UNIT) + at[None, :]
        x = tl.load(x_row, mask=write, other=0.0)
        x = steer(x, row, steered, coefficients, at, write, slot, most, delta_ptr, directions_ptr, concept_ptr, WIDTH, RULES)
        tl.store(x_row, x, mask=write)
