"""Random calls of the op and the comparison with the oracle, shared by the tests of every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from emovec import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = {
    "read": {"steer": False},
    "add": {"rules": 0, "gates": False},
    "gated_add": {"rules": 0},
    "rules": {"gates": False},
    "gated": {},
    "residual": {"residual": True},
    "readers": {"own_readers": True},
    "strided": {"strided": True, "residual": True},
    "steer_only": {"outputs": False},
    "add_only": {"outputs": False, "rules": 0, "gates": False},
    "high": {"precision": "high", "own_readers": True},
    "high_residual": {"precision": "high", "residual": True, "gates": False},
    "bf16_scores": {"scores_dtype": torch.bfloat16},
}
"""What a call does, as options of :func:`make`."""


@dataclass
class Case:
    """One call: ``x`` and outputs are made fresh, outputs poisoned with NaN."""

    x: Tensor
    operands: ops.Operands
    table: ops.Table | None = None
    row: Tensor | None = None
    residual: Tensor | None = None
    scores: Tensor | None = None
    sqnorm: Tensor | None = None
    readers: Tensor | None = None  # before they were rounded
    precision: str = "fast"
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.x.clone()

    def run(self, form: int = 0) -> None:
        ops.apply_(self.x, self.operands, self.table, self.row, self.residual, self.scores, self.sqnorm, form=form)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (not rounded), scores and sqnorm by the reference, all fp64."""
        x = self.before.double().cpu()
        o = self.operands
        scores = torch.empty(x.shape[0], o.directions.shape[0], dtype=torch.float64)
        sqnorm = torch.empty(x.shape[0], dtype=torch.float64)
        table = (None,) * 6 if self.table is None else tuple(t.cpu() for t in self.table.tensors())
        residual, row = (None if t is None else t.cpu() for t in (self.residual, self.row))
        reference.apply_(
            x, o.readers_unpacked().cpu(), o.directions.cpu(), o.mean.cpu(), o.inv_std.cpu(), residual, row, *table, scores, sqnorm
        )
        return x, scores, sqnorm

    def check(self) -> None:
        """Compare with the reference. The tolerances are fp32's error over a sum of d terms, and one rounding of x."""
        x, scores, sqnorm = self.expected()
        o = self.operands
        width = x.shape[1]
        stream = self.before.double().cpu() + (0 if self.residual is None else self.residual.double().cpu())
        noise = torch.finfo(torch.float32).eps * (math.sqrt(width) + 2)
        magnitude = stream.abs() @ o.readers_unpacked().double().cpu().abs().T
        if self.scores is not None:
            error = (self.scores.double().cpu() - scores).abs()
            assert not error.isnan().any(), "scores were not all written"
            allowed = noise * (magnitude + o.mean.double().cpu().abs()) * o.inv_std.double().cpu().abs()
            if self.scores.dtype == torch.bfloat16:
                allowed = 1.01 * allowed + torch.finfo(torch.bfloat16).eps / 2 * scores.abs()
            assert (error <= allowed).all(), f"scores are off by {(error / allowed).max():.2f} of what is allowed"
        if self.sqnorm is not None:
            error = (self.sqnorm.double().cpu() - sqnorm).abs()
            assert not error.isnan().any(), "sqnorm was not all written"
            assert (error <= noise * sqnorm + 1e-30).all()
        if self.table is None:
            assert same_bits(self.x, self.before)
            return
        row = torch.zeros(len(x), dtype=torch.int32) if self.row is None else self.row.cpu()
        assert same_bits(self.x.cpu()[row < 0], self.before.cpu()[row < 0]), "a token with row -1 was written"
        drift = noise * magnitude.amax(-1, keepdim=True) * self.rule_gain()
        ulp = torch.finfo(self.x.dtype).eps * x.abs().clamp_min(torch.finfo(self.x.dtype).tiny)
        error = (self.x.double().cpu() - x).abs()
        allowed = 0.505 * ulp + torch.finfo(torch.float32).eps * 20 * x.abs().amax(-1, keepdim=True) + drift
        assert (error <= allowed).all(), f"x is off by {(error / allowed).max():.2f} of what is allowed"

    def lost(self) -> float:
        """How far the scores are from those of readers that were never rounded, as a share of them."""
        assert self.scores is not None
        assert self.readers is not None
        o = self.operands
        stream = self.before.double().cpu() + (0 if self.residual is None else self.residual.double().cpu())
        exact = (stream @ self.readers.double().T - o.mean.double().cpu()) * o.inv_std.double().cpu()
        return float((self.scores.double().cpu() - exact).norm() / exact.norm())

    def rule_gain(self) -> float:
        """How much an error in a projection can grow in x: the norm of the rules' solution."""
        assert self.table is not None
        solve = self.table.rule_solve.double().cpu()
        return float(torch.linalg.matrix_norm(solve, ord=2).max()) if solve.numel() else 0.0


CLOSER = 100
"""How many times closer to readers that were never rounded high scores are at least than fast ones, in bf16 and fp16."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    view = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def correlated(concepts: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit directions with a common part, as emotions have."""
    shared = torch.randn(1, width, generator=generator)
    return unit(torch.randn(concepts, width, generator=generator) + 0.7 * shared)


def make(
    tokens: int,
    width: int,
    concepts: int,
    dtype: torch.dtype,
    *,
    seed: int,
    steer: bool = True,
    residual: bool = False,
    own_readers: bool = False,
    strided: bool = False,
    rules: int = 3,
    gates: bool = True,
    outputs: bool = True,
    precision: str = "fast",
    scores_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    g = torch.Generator().manual_seed(seed)
    scale = torch.ones(width)
    scale[torch.randint(width, (2,), generator=g)] = 100.0  # massive activations, as real models have
    pitch = width + 24 if strided else width
    storage = torch.randn(tokens, pitch, generator=g).to(dtype).to(device)
    x = storage[:, :width]
    x.mul_(scale.to(dtype).to(device))
    directions = correlated(concepts, width, g)
    readers = unit(directions + 0.3 * torch.randn(concepts, width, generator=g) / math.sqrt(width)) if own_readers else directions
    mean = torch.randn(concepts, generator=g)
    std = 0.5 + torch.rand(concepts, generator=g)
    operands = ops.Operands.build(readers, directions, mean, std, device=device, dtype=dtype, precision=precision)
    case = Case(x, operands, readers=readers, precision=precision)
    if residual:
        case.residual = torch.randn(tokens, width, generator=g).to(dtype).to(device)
    if outputs:
        case.scores = torch.full((tokens, concepts + 5), math.nan, dtype=scores_dtype, device=device)[:, :concepts]
        case.sqnorm = torch.full((tokens,), math.nan, device=device)
    if steer:
        rows = [make_row(width, concepts, rules, gates, g) for _ in range(4)]
        case.table = ops.Table.build(rows, operands)
        case.row = torch.randint(-1, 4, (tokens,), generator=g, dtype=torch.int32).to(device)
    return case


def gpu_readers(case: Case) -> Tensor:
    """A CPU case's readers as they are packed for a GPU; the case is held against these then."""
    readers = case.operands.readers_unpacked()
    rounded, rest = (pad(part, (0, 0, 0, -len(readers) % ops.LANES)).contiguous() for part in ops.split(readers, case.x.dtype))
    if case.precision == "fast" or case.x.dtype == torch.float32:
        return rounded
    case.operands = replace(case.operands, readers=ops.pack((rounded.float() + rest.float())[: len(readers)]))
    return torch.stack([rounded, rest])


def make_row(width: int, concepts: int, rules: int, gates: bool, g: torch.Generator) -> ops.Row:
    def draw() -> float:
        return float(torch.randn((), generator=g))

    count = min(rules, concepts)
    chosen = torch.randperm(concepts, generator=g)[:count].tolist()
    bounds = [(draw(), math.inf), (-math.inf, draw()), (0.0, 0.0), (-0.1, 0.1)]
    made = tuple(ops.Rule(k, *bounds[i % 4]) for i, k in enumerate(chosen))
    delta = torch.randn(width, generator=g)
    if not gates:
        return ops.Row(delta, made)
    gate = ops.Gate(int(torch.randint(concepts, (), generator=g)), draw())
    otherwise = ops.Row(-delta, made[:1]) if draw() > 0 else None
    return ops.Row(delta, made, gate, otherwise)
