# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)
"""The op as one Triton kernel. A program owns BM tokens, so nothing it writes is read by another and nothing is atomic.

Loop 1 streams the tokens once: projections and norms accumulate, and tokens whose row only adds are written back on the
way. Loop 2 runs where the tile has tokens with a gate or rules: these need complete projections first, so their stream
is read again (from L2, where the tile still is).

Concepts are taken K0 + K1 at a time: ``tl.dot`` wants powers of two, and 171 fits 128 + 64 with less waste than 256.
Only the tile's base is computed in 64 bits. Offsets inside of it and inside the bank and the table are 32 bits wide,
which halves their registers; the launcher refuses what does not fit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_scores(
    scores_ptr, acc, mean_ptr, inv_std_ptr, valid, first, scores_stride, CONCEPTS: tl.constexpr, BM: tl.constexpr, KT: tl.constexpr
):
    """Scores of KT concepts from ``first`` on; ``scores_ptr`` points at the tile's first token."""
    concept = first + tl.arange(0, KT)
    known = concept < CONCEPTS
    mean = tl.load(mean_ptr + concept, mask=known, other=0.0)
    inv_std = tl.load(inv_std_ptr + concept, mask=known, other=0.0)
    at = tl.arange(0, BM)[:, None] * scores_stride + concept[None, :]
    tl.store(scores_ptr + at, (acc - mean[None, :]) * inv_std[None, :], mask=valid[:, None] & known[None, :])


@triton.jit
def pick(acc0, acc1, concept, first, K0: tl.constexpr, K1: tl.constexpr):
    """Projections [BM] on one concept per token, 0 where it is not among these K0 + K1: exact, as every other term is 0."""
    in0 = (first + tl.arange(0, K0))[None, :] == concept[:, None]
    in1 = (first + K0 + tl.arange(0, K1))[None, :] == concept[:, None]
    return tl.sum(tl.where(in0, acc0, 0.0), 1) + tl.sum(tl.where(in1, acc1, 0.0), 1)


@triton.jit
def solve_rules(projection, row, pending, concept_ptr, bounds_ptr, solve_ptr, CONCEPTS: tl.constexpr, RULES: tl.constexpr, slot):
    """Coefficients [BM, SLOTS] of the rules' directions, 0 where there is no rule."""
    used = pending[:, None] & (slot < RULES)[None, :]
    concept = tl.load(concept_ptr + row[:, None] * RULES + slot[None, :], mask=used, other=-1)
    used = (concept >= 0) & (concept < CONCEPTS)
    bounds = bounds_ptr + row[:, None] * (3 * RULES) + slot[None, :]
    lo = tl.load(bounds, mask=used, other=0.0)
    hi = tl.load(bounds + RULES, mask=used, other=0.0)
    steered = projection + tl.load(bounds + 2 * RULES, mask=used, other=0.0)
    bounded = tl.where(steered < lo, lo, tl.where(steered > hi, hi, steered))
    wanted = tl.where(used, bounded - steered, 0.0)
    coefficients = tl.zeros_like(wanted)
    for m in range(RULES):
        solve = tl.load(solve_ptr + (row[:, None] * RULES + m) * RULES + slot[None, :], mask=used, other=0.0)
        coefficients = tl.where((slot[None, :] == m) & used, tl.sum(solve * wanted, 1)[:, None], coefficients)
    return coefficients


@triton.jit
def apply_kernel(
    x_ptr, residual_ptr, readers_ptr, directions_ptr, mean_ptr, inv_std_ptr, row_ptr,
    delta_ptr, gate_ptr, threshold_ptr, concept_ptr, bounds_ptr, solve_ptr, scores_ptr, sqnorm_ptr,
    tokens, rows, x_stride, residual_stride, scores_stride,
    WIDTH: tl.constexpr, CONCEPTS: tl.constexpr, RULES: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """The op's arguments; a pointer that is None was not given. SLOTS is RULES rounded up to a power of two."""
    STEER: tl.constexpr = delta_ptr is not None
    READ: tl.constexpr = scores_ptr is not None or sqnorm_ptr is not None
    WIDE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32

    base = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    valid = base + local < tokens
    x_tile = x_ptr + base * x_stride
    column = tl.arange(0, BD)
    slot = tl.arange(0, SLOTS)

    last = CONCEPTS
    if STEER:
        row = tl.zeros((BM,), tl.int32)
        if row_ptr is not None:
            row = tl.load(row_ptr + base + local, mask=valid, other=-1)
        active = valid & (row >= 0) & (row < rows)
        gate = tl.load(gate_ptr + 2 * row, mask=active, other=-1)
        gated = (gate >= 0) & (gate < CONCEPTS)
        otherwise = tl.load(gate_ptr + 2 * row + 1, mask=gated, other=-1)
        otherwise = tl.where(otherwise < rows, otherwise, -1)
        deferred = gated
        if RULES > 0:
            own = active[:, None] & (slot < RULES)[None, :]
            deferred |= tl.max(tl.load(concept_ptr + row[:, None] * RULES + slot[None, :], mask=own, other=-1), 1) >= 0
        if not READ:  # no projections are wanted for their own sake
            last = tl.where(tl.max(deferred.to(tl.int32), 0) > 0, CONCEPTS, 0)
        p_gate = tl.zeros((BM,), tl.float32)
        p_open = tl.zeros((BM, SLOTS), tl.float32)
        p_closed = tl.zeros((BM, SLOTS), tl.float32)

    for first in range(0, last, K0 + K1):
        acc0 = tl.zeros((BM, K0), tl.float32)
        acc1 = tl.zeros((BM, K1), tl.float32)
        square = tl.zeros((BM,), tl.float32)
        concept0 = first + tl.arange(0, K0)
        concept1 = first + K0 + tl.arange(0, K1)
        if STEER:
            streamed = active & (deferred == 0) & (first + K0 + K1 >= CONCEPTS)
        for start in range(0, WIDTH, BD):
            at = start + column
            inside = valid[:, None]
            known0 = (concept0 < CONCEPTS)[:, None]
            known1 = (concept1 < CONCEPTS)[:, None]
            if WIDTH % BD != 0:
                inside &= (at < WIDTH)[None, :]
                known0 &= (at < WIDTH)[None, :]
                known1 &= (at < WIDTH)[None, :]
            x_at = local[:, None] * x_stride + at[None, :]
            x = tl.load(x_tile + x_at, mask=inside, other=0.0)
            v0 = tl.load(readers_ptr + concept0[:, None] * WIDTH + at[None, :], mask=known0, other=0.0)
            v1 = tl.load(readers_ptr + concept1[:, None] * WIDTH + at[None, :], mask=known1, other=0.0)
            h = x.to(tl.float32)
            if residual_ptr is not None:
                residual_at = local[:, None] * residual_stride + at[None, :]
                residual = tl.load(residual_ptr + base * residual_stride + residual_at, mask=inside, other=0.0)
                h += residual.to(tl.float32)
                if not WIDE:  # <x + residual, v> as two products of 16-bit numbers: the sum may need more than 16 bits
                    acc0 = tl.dot(residual, v0.T, acc0)
                    acc1 = tl.dot(residual, v1.T, acc1)
            factor = h if WIDE else x
            acc0 = tl.dot(factor, v0.T, acc0, input_precision=PRECISION)
            acc1 = tl.dot(factor, v1.T, acc1, input_precision=PRECISION)
            square += tl.sum(h * h, 1)
            if STEER:
                write = inside & streamed[:, None]
                delta = tl.load(delta_ptr + row[:, None] * WIDTH + at[None, :], mask=write, other=0.0)
                tl.store(x_tile + x_at, (x.to(tl.float32) + delta).to(x.dtype), mask=write)
        if scores_ptr is not None:
            tile = scores_ptr + base * scores_stride
            write_scores(tile, acc0, mean_ptr, inv_std_ptr, valid, first, scores_stride, CONCEPTS, BM, K0)
            write_scores(tile, acc1, mean_ptr, inv_std_ptr, valid, first + K0, scores_stride, CONCEPTS, BM, K1)
        if sqnorm_ptr is not None:
            tl.store(sqnorm_ptr + base + local, square, mask=valid & (first == 0))
        if STEER:
            p_gate += pick(acc0, acc1, gate, first, K0, K1)
            for m in range(RULES):
                while_open = tl.load(concept_ptr + row * RULES + m, mask=active, other=-1)
                while_closed = tl.load(concept_ptr + otherwise * RULES + m, mask=otherwise >= 0, other=-1)
                p_open += tl.where(slot[None, :] == m, pick(acc0, acc1, while_open, first, K0, K1)[:, None], 0.0)
                p_closed += tl.where(slot[None, :] == m, pick(acc0, acc1, while_closed, first, K0, K1)[:, None], 0.0)

    if STEER:
        mean = tl.load(mean_ptr + gate, mask=gated, other=0.0)
        inv_std = tl.load(inv_std_ptr + gate, mask=gated, other=0.0)
        threshold = tl.load(threshold_ptr + row, mask=gated, other=0.0)
        closed = gated & (((p_gate - mean) * inv_std > threshold) == 0)  # so that a NaN leaves the gate closed
        row = tl.where(closed, otherwise, row)
        pending = active & (row >= 0) & (deferred | (last == 0))
        if RULES > 0:
            projection = tl.where(closed[:, None], p_closed, p_open)
            coefficients = solve_rules(projection, row, pending, concept_ptr, bounds_ptr, solve_ptr, CONCEPTS, RULES, slot)
        until = tl.where(tl.max(pending.to(tl.int32), 0) > 0, WIDTH, 0)
        for start in range(0, until, BD):
            at = start + column
            write = pending[:, None]
            if WIDTH % BD != 0:
                write &= (at < WIDTH)[None, :]
            x_at = local[:, None] * x_stride + at[None, :]
            x = tl.load(x_tile + x_at, mask=write, other=0.0)
            value = x.to(tl.float32) + tl.load(delta_ptr + row[:, None] * WIDTH + at[None, :], mask=write, other=0.0)
            if RULES > 0:
                for m in range(RULES):
                    c = tl.sum(tl.where(slot[None, :] == m, coefficients, 0.0), 1)
                    concept = tl.load(concept_ptr + row * RULES + m, mask=pending, other=-1)
                    moved = write & (c != 0.0)[:, None]
                    v = tl.load(directions_ptr + concept[:, None] * WIDTH + at[None, :], mask=moved, other=0.0)
                    value += c[:, None] * v.to(tl.float32)
            tl.store(x_tile + x_at, value.to(x.dtype), mask=write)
