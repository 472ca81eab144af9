# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)
"""The op as one Triton kernel, and the first half of a call on few tokens, which sliced.py completes.

A program owns BM tokens, so nothing it writes is read by another and nothing is atomic.
Loop 1 streams the tokens once: projections and norms accumulate, and tokens whose row only adds are written back on the
way. Loop 2 runs where the tile has tokens with a gate or rules: these need complete projections first, so their stream
is read again (from L2, where the tile may still be). Without outputs there is nothing to read for the tokens that only
add, and loop 2 writes them all.

Offsets inside of a tile, and inside of the bank, are 32 bits wide, which saves registers; the launcher refuses what does
not fit. Offsets of a tile or a row of the table are 64 bits wide. How far loop 2 goes must not depend on the projections:
Triton 3.6 fails to compile for sm_100 where a reduction to a scalar follows from a product.

Concepts are taken K0 + K1 at a time: ``tl.dot`` wants powers of two, and 171 fits 128 + 64 with less waste than 256.

With SLICE a program reads so many columns only, and writes what they make of its tokens' projections and squares, raw, to a workspace.

A token's result depends on nothing else in its tile: sums run over d in an order that is fixed by BD, a concept is
picked by adding exact zeros, and what another token needs (a later slot, loop 2) is masked, not added as zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_scores(scores_row, acc, mean_ptr, inv_std_ptr, valid, first, CONCEPTS: tl.constexpr, KT: tl.constexpr):
    """Scores of the KT concepts from ``first`` on, projections without a mean; ``scores_row`` [BM, 1] points at each token's first."""
    concept = first + tl.arange(0, KT)
    known = concept < CONCEPTS
    score = acc
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + concept, mask=known, other=0.0)
        inv_std = tl.load(inv_std_ptr + concept, mask=known, other=0.0)
        score = (acc - mean[None, :]) * inv_std[None, :]
    tl.store(scores_row + concept[None, :], score.to(scores_row.dtype.element_ty), mask=valid[:, None] & known[None, :])


@triton.jit
def pick(acc0, acc1, concept, first, K0: tl.constexpr, K1: tl.constexpr):
    """Projections [BM] on one concept per token, 0 where it is not among the K0 + K1 from ``first`` on."""
    in0 = (first + tl.arange(0, K0))[None, :] == concept[:, None]
    in1 = (first + K0 + tl.arange(0, K1))[None, :] == concept[:, None]
    return tl.sum(tl.where(in0, acc0, 0.0), 1) + tl.sum(tl.where(in1, acc1, 0.0), 1)


@triton.jit
def look_up(row_ptr, gate_ptr, token, tokens, rows, CONCEPTS: tl.constexpr):
    """A token's row, its gate's concept, and its row while the gate is closed; [BM] each, -1 where there is none."""
    valid = token < tokens
    row = tl.zeros_like(token)
    if row_ptr is not None:
        row = tl.load(row_ptr + token, mask=valid, other=-1).to(tl.int64)
    row = tl.where(valid & (row >= 0) & (row < rows), row, -1)
    gate = tl.load(gate_ptr + 2 * row, mask=row >= 0, other=-1)
    gate = tl.where(gate < CONCEPTS, gate, -1)
    otherwise = tl.load(gate_ptr + 2 * row + 1, mask=gate >= 0, other=-1).to(tl.int64)
    return row, gate, tl.where((otherwise >= 0) & (otherwise < rows), otherwise, -1)


@triton.jit
def slots_used(concept_ptr, row, slot, RULES: tl.constexpr):
    """[BM]: one more than the last slot with a rule, 0 for a row without rules and for no row."""
    concept = tl.load(concept_ptr + row[:, None] * RULES + slot[None, :], mask=(row >= 0)[:, None] & (slot < RULES)[None, :], other=-1)
    return tl.max(tl.where(concept >= 0, slot[None, :] + 1, 0), 1)


@triton.jit
def solve_rules(projection, row, pending, concept_ptr, bounds_ptr, solve_ptr, slot, most, CONCEPTS: tl.constexpr, RULES: tl.constexpr):
    """Coefficients [BM, SLOTS] of the rules' directions, 0 where there is no rule; no row has one from slot ``most`` on."""
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
    for m in range(0, most):
        solve = tl.load(solve_ptr + (row[:, None] * RULES + m) * RULES + slot[None, :], mask=used, other=0.0)
        coefficients = tl.where((slot[None, :] == m) & used, tl.sum(solve * wanted, 1)[:, None], coefficients)
    return coefficients


@triton.jit
def is_closed(projection, gate, row, mean_ptr, inv_std_ptr, threshold_ptr):
    """[BM]: whether a token has a gate and ``projection`` on its concept leaves it closed, as a NaN does."""
    mean = tl.load(mean_ptr + gate, mask=gate >= 0, other=0.0)
    inv_std = tl.load(inv_std_ptr + gate, mask=gate >= 0, other=0.0)
    threshold = tl.load(threshold_ptr + row, mask=gate >= 0, other=0.0)
    return (gate >= 0) & (((projection - mean) * inv_std > threshold) == 0)


@triton.jit
def steer(
    x, row, pending, coefficients, at, write, slot, most, delta_ptr, directions_ptr, concept_ptr, WIDTH: tl.constexpr, RULES: tl.constexpr
):  # fmt: skip
    """Columns ``at`` of the ``pending`` tokens' x [BM, BD], steered by their rows and rules, rounded once; ``write`` [BM, BD] is there."""
    value = x.to(tl.float32) + tl.load(delta_ptr + row[:, None] * WIDTH + at[None, :], mask=write, other=0.0)
    if RULES > 0:
        for m in range(0, most):
            c = tl.sum(tl.where(slot[None, :] == m, coefficients, 0.0), 1)
            concept = tl.load(concept_ptr + row * RULES + m, mask=pending, other=-1)
            moved = write & (c != 0.0)[:, None]
            v = tl.load(directions_ptr + (concept[:, None] * WIDTH + at[None, :]), mask=moved, other=0.0)
            value = tl.where(moved, value + c[:, None] * v.to(tl.float32), value)
    return value.to(x.dtype)


@triton.jit(do_not_specialize=["tokens", "rows", "x_stride", "residual_stride", "scores_stride"])
def apply_kernel(
    x_ptr, residual_ptr, readers_ptr, directions_ptr, mean_ptr, inv_std_ptr, row_ptr,
    delta_ptr, gate_ptr, threshold_ptr, concept_ptr, bounds_ptr, solve_ptr, scores_ptr, sqnorm_ptr,
    tokens, rows, x_stride, residual_stride, scores_stride,
    WIDTH: tl.constexpr, CONCEPTS: tl.constexpr, RULES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    ASYNC: tl.constexpr, HIGH: tl.constexpr, SLICE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """The op's arguments; a pointer that is None was not given. SLOTS is RULES rounded up to a power of two.

    The strides of x and residual are in units of UNIT elements, so that the compiler knows how rows are aligned.
    ASYNC: products run beside the program and read shared memory, as on sm_90 and sm_100.
    HIGH: readers are [2, KP, d], what rounding took from them after them.
    SLICE: columns of a program, 0 for all. Not 0: scores [slices, tokens, CONCEPTS] and sqnorm [slices, tokens] are the workspace, x is not
    written, and with a table only what a token of the tile waits for is computed.
    """
    STEER: tl.constexpr = delta_ptr is not None
    READ: tl.constexpr = (scores_ptr is not None or sqnorm_ptr is not None) and not (STEER and SLICE > 0)
    SPAN: tl.constexpr = SLICE if SLICE > 0 else WIDTH
    RAGGED: tl.constexpr = WIDTH % (SLICE if SLICE > 0 else BD) != 0
    WIDE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    # On sm_90, Triton 3.6 lets the next tile of x overwrite one that a product still reads from shared memory, if anything
    # but the product reads it as well (seen on an H200). Then the product is given registers, through a select that stays.
    SHARED: tl.constexpr = ASYNC and (sqnorm_ptr is not None or delta_ptr is not None)

    base = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    token = base + local
    valid = token < tokens
    x_tile = x_ptr + base * (x_stride * UNIT)
    there, near = valid, local
    if ASYNC:  # tokens past the end read the last one again, and write nothing: loads without a mask are faster
        there = tl.full((BM,), 1, tl.int1)
        near = tl.minimum(local, (tl.minimum(tokens - base, BM) - 1).to(tl.int32))
    x_off = near[:, None] * (x_stride * UNIT)
    rest_ptr = readers_ptr + (CONCEPTS + 15) // 16 * 16 * WIDTH
    column = tl.arange(0, BD)
    if SLICE > 0:
        column += tl.program_id(1) * SLICE
        if scores_ptr is not None:
            scores_ptr += tl.program_id(1).to(tl.int64) * tokens * scores_stride
        if sqnorm_ptr is not None:
            sqnorm_ptr += tl.program_id(1).to(tl.int64) * tokens
    slot = tl.arange(0, SLOTS)

    last = CONCEPTS
    if STEER:
        row, gate, otherwise = look_up(row_ptr, gate_ptr, token, tokens, rows, CONCEPTS)
        waits = gate >= 0  # for projections
        most = 0
        if RULES > 0:
            used = slots_used(concept_ptr, row, slot, RULES)
            waits |= used > 0
            most = tl.max(tl.maximum(used, slots_used(concept_ptr, otherwise, slot, RULES)), 0)
        streamed = (row >= 0) & (waits == 0)
        if not READ:  # no projections are wanted for their own sake: loop 1 is left out unless a token waits for some
            last = tl.max(tl.where(waits, CONCEPTS, 0), 0)
            streamed = row < -1  # none: loop 2 writes all
        until = tl.max(tl.where((row >= 0) & (streamed == 0), WIDTH, 0), 0)
        p_gate = tl.zeros((BM,), tl.float32)
        p_open = tl.zeros((BM, SLOTS), tl.float32)
        p_closed = tl.zeros((BM, SLOTS), tl.float32)

    for first in range(0, last, K0 + K1):
        acc0 = tl.zeros((BM, K0), tl.float32)
        acc1 = tl.zeros((BM, K1), tl.float32)
        square = tl.zeros((BM,), tl.float32)
        concept0 = first + tl.arange(0, K0)
        concept1 = first + K0 + tl.arange(0, K1)
        for start in range(0, SPAN, BD):
            at = start + column
            inside = there[:, None]
            known0 = (concept0 < CONCEPTS)[:, None]
            known1 = (concept1 < CONCEPTS)[:, None]
            if RAGGED:
                inside &= (at < WIDTH)[None, :]
                known0 &= (at < WIDTH)[None, :]
                known1 &= (at < WIDTH)[None, :]
            x = tl.load(x_tile + (x_off + at[None, :]), mask=inside, other=0.0)
            v0 = tl.load(readers_ptr + concept0[:, None] * WIDTH + at[None, :], mask=known0, other=0.0)
            v1 = tl.load(readers_ptr + concept1[:, None] * WIDTH + at[None, :], mask=known1, other=0.0)
            if HIGH:
                rest0 = tl.load(rest_ptr + concept0[:, None] * WIDTH + at[None, :], mask=known0, other=0.0)
                rest1 = tl.load(rest_ptr + concept1[:, None] * WIDTH + at[None, :], mask=known1, other=0.0)
            if STEER and READ:
                write = inside & streamed[:, None] & (first + K0 + K1 >= CONCEPTS)
                delta = tl.load(delta_ptr + row[:, None] * WIDTH + at[None, :], mask=write, other=0.0)
                tl.store(x_tile + (x_off + at[None, :]), (x.to(tl.float32) + delta).to(x.dtype), mask=write)
            h = x.to(tl.float32)
            if residual_ptr is not None:
                residual_row = residual_ptr + base * (residual_stride * UNIT) + near[:, None] * (residual_stride * UNIT)
                residual = tl.load(residual_row + at[None, :], mask=inside, other=0.0)
                h += residual.to(tl.float32)
                if SHARED:
                    residual = tl.where(valid[:, None], residual, 0.0).to(residual.dtype)
                if HIGH:
                    acc0 = tl.dot(residual, rest0.T, acc0)
                    acc1 = tl.dot(residual, rest1.T, acc1)
                if not WIDE:  # <x + residual, v> as two products of 16-bit numbers: the sum may need more than 16 bits
                    acc0 = tl.dot(residual, v0.T, acc0)
                    acc1 = tl.dot(residual, v1.T, acc1)
            factor = h if WIDE else x
            if SHARED and not WIDE:
                factor = tl.where(valid[:, None], x, 0.0).to(x.dtype)
            if sqnorm_ptr is not None:
                square += tl.sum(h * h, 1)
            if HIGH:
                acc0 = tl.dot(factor, rest0.T, acc0)
                acc1 = tl.dot(factor, rest1.T, acc1)
            acc0 = tl.dot(factor, v0.T, acc0, input_precision=PRECISION)
            acc1 = tl.dot(factor, v1.T, acc1, input_precision=PRECISION)
        if scores_ptr is not None:
            scores_row = scores_ptr + base * scores_stride + local[:, None] * scores_stride
            write_scores(scores_row, acc0, mean_ptr, inv_std_ptr, valid, first, CONCEPTS, K0)
            write_scores(scores_row, acc1, mean_ptr, inv_std_ptr, valid, first + K0, CONCEPTS, K1)
        if sqnorm_ptr is not None:
            tl.store(sqnorm_ptr + token, square, mask=valid & (first == 0))
        if STEER and SLICE == 0:
            row, gate, otherwise = look_up(row_ptr, gate_ptr, token, tokens, rows, CONCEPTS)  # again: cheaper than to keep them
            p_gate += pick(acc0, acc1, gate, first, K0, K1)
            if RULES > 0:
                for m in range(0, most):
                    while_open = tl.load(concept_ptr + row * RULES + m, mask=row >= 0, other=-1)
                    while_closed = tl.load(concept_ptr + otherwise * RULES + m, mask=otherwise >= 0, other=-1)
                    p_open += tl.where(slot[None, :] == m, pick(acc0, acc1, while_open, first, K0, K1)[:, None], 0.0)
                    p_closed += tl.where(slot[None, :] == m, pick(acc0, acc1, while_closed, first, K0, K1)[:, None], 0.0)

    if STEER and SLICE == 0:
        closed = is_closed(p_gate, gate, row, mean_ptr, inv_std_ptr, threshold_ptr)
        row = tl.where(closed, otherwise, row)
        pending = (row >= 0) & (streamed == 0)
        coefficients = p_open
        if RULES > 0:
            projection = tl.where(closed[:, None], p_closed, p_open)
            coefficients = solve_rules(projection, row, pending, concept_ptr, bounds_ptr, solve_ptr, slot, most, CONCEPTS, RULES)
        for start in range(0, until, BD):
            at = start + column
            write = pending[:, None]
            if WIDTH % BD != 0:
                write &= (at < WIDTH)[None, :]
            x = tl.load(x_tile + (x_off + at[None, :]), mask=write, other=0.0)
            x = steer(x, row, pending, coefficients, at, write, slot, most, delta_ptr, directions_ptr, concept_ptr, WIDTH, RULES)
            tl.store(x_tile + (x_off + at[None, :]), x, mask=write)
