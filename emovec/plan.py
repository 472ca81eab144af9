"""What one call of the op is made of, and how it is done on a device: a pure function of shapes, dtype and mode, which runs nothing.

Beside :mod:`emovec.ops` and below banks. The kernels' own code decides, for a GPU that is here or one that is described.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from emovec.ops import DTYPES, LANES, MAX_CONCEPTS, MAX_RULES, check_precision, require

MODES = ("read", "add", "rules")
# `ev_cuda_device` of kernels/api.h. How many clusters of 2, 4 and 8 blocks run at once differs a little between cards of a kind,
# with the multiprocessors that were left out; "cuda" asks the card. H100 and H200 are the SXM cards, and have no more than an H200 had.
DEVICES = {
    "h100": (132, 232448, 90, 16, 132, 66, 31, 15),
    "h200": (132, 232448, 90, 16, 132, 66, 31, 15),
    "a100": (108, 166912, 80, 0, 0, 0, 0, 0),
    "b200": (148, 232448, 100, 16, 0, 0, 0, 0),
}


@dataclass(frozen=True)
class Work:
    """What a call on N = ``tokens`` of d = ``width`` and K = ``concepts`` must do at least, by whatever kernel and device.

    mode: "read" leaves x alone, "add" adds a row to every token, "rules" holds rules on every token besides.
    residual: the stream is ``x + residual``. scores: scores, in fp32, and squared norms are asked for. rows: of the steering
    table. precision: "high" where readers are not rounded to ``dtype``.
    """

    tokens: int
    width: int
    concepts: int = 171
    dtype: torch.dtype = torch.bfloat16
    mode: str = "read"
    residual: bool = False
    scores: bool = True
    rows: int = 1
    precision: str = "fast"

    def __post_init__(self) -> None:
        require(self.tokens >= 1, f"tokens must be at least 1, got {self.tokens}")
        require(self.width >= 1, f"width must be at least 1, got {self.width}")
        require(1 <= self.concepts <= MAX_CONCEPTS, f"concepts must be 1 to {MAX_CONCEPTS}, got {self.concepts}")
        require(self.dtype in DTYPES, f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        require(self.mode in MODES, f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        check_precision(self.precision)
        require(self.rows >= 1, f"rows must be at least 1, got {self.rows}")
        require(self.scores or self.steers, "to read without scores is no work")

    @property
    def steers(self) -> bool:
        return self.mode != "read"

    @property
    def projects(self) -> bool:
        """Adding alone needs no projections."""
        return self.scores or self.mode == "rules"

    @property
    def stream(self) -> int:
        """Bytes of x, and of the residual."""
        return self.tokens * self.width * self.dtype.itemsize

    @property
    def readers(self) -> int:
        """Bytes of the readers."""
        return self.concepts * self.width * (4 if self.precision == "high" else self.dtype.itemsize)

    @property
    def bytes(self) -> int:
        """What must move: x read once, and written once if steered; the readers and the rows' deltas once; the results out."""
        moved = self.stream * (2 if self.steers else 1)
        if self.projects:
            moved += self.readers + (self.stream if self.residual else 0)
        if self.scores:
            moved += 4 * self.tokens * (self.concepts + 1)
        return moved + (4 * self.rows * self.width if self.steers else 0)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the projections."""
        return 2 * self.tokens * self.width * self.concepts if self.projects else 0

    def floor(self, bytes_per_s: float, operations_per_s: float) -> float:
        """Seconds below which no kernel can be where so much moves and is computed in a second."""
        return max(self.bytes / bytes_per_s, self.operations / operations_per_s)


@dataclass(frozen=True, kw_only=True)
class Plan(Work):
    """How ``device`` does that work.

    kernel: its name, as ``emovec._host.kernels()`` has it. split: what is dealt out. tile: tokens taken at a time.
    blocks: of a GPU's first launch; the threads of a CPU, at most. launches: of kernels, 0 on a CPU.
    parts: of the readers; 2 where a GPU is given what rounding took from them beside them.
    moved: ``bytes``, and what this kernel moves beyond them: x and residual as often as it reads them again (mostly from a cache),
    readers that it need not have read, its workspace out and in. That every tile reads the readers, from a cache, counts once.
    """

    device: str
    kernel: str
    split: str
    tile: int
    blocks: int
    launches: int
    parts: int
    moved: int

    @property
    def operations(self) -> int:
        """Those of the projections, on every part of the readers."""
        return super().operations * self.parts


def plan(
    tokens: int,
    width: int,
    concepts: int = 171,
    *,
    dtype: torch.dtype = torch.bfloat16,
    mode: str = "read",
    residual: bool = False,
    scores: bool = True,
    rows: int = 1,
    precision: str = "fast",
    device: str = "cpu",
) -> Plan:
    """The plan of :class:`Work` on "cpu" (this processor, with torch's threads), "cuda" (the current GPU) or one of ``DEVICES``.

    Tensors are taken to be aligned and without gaps, a table for "rules" to have room for as many as can be.

    Raises:
        ValueError: an argument is wrong, or this device or this build cannot do the call.
    """
    shape: dict[str, Any] = {"tokens": tokens, "width": width, "concepts": concepts, "dtype": dtype}
    work = Work(**shape, mode=mode, residual=residual, scores=scores, rows=rows, precision=precision)
    known = ("cpu", "cuda", *DEVICES)
    require(device in known, f"device must be one of {', '.join(known)}, got {device!r}")
    return _on_cpu(work) if device == "cpu" else _on_gpu(work, device)


def has_cuda() -> bool:
    """Whether this build has the CUDA kernels, and so can plan for GPUs."""
    return hasattr(torch.ops.emovec, "plan_cuda")


def _on_cpu(work: Work) -> Plan:
    from emovec import _host

    threads = torch.get_num_threads()
    split, tile = _host.plan(work.tokens, work.width, work.concepts if work.projects else 0, threads)
    blocks = {"serial": 1, "over concepts": min(threads, -(-work.concepts // LANES))}.get(split, min(threads, work.tokens))
    how: dict[str, Any] = {"kernel": _host.fastest(), "split": split, "tile": tile, "blocks": blocks}
    return Plan(**vars(work), **how, device="cpu", launches=0, parts=1, moved=work.bytes)


def _on_gpu(work: Work, device: str) -> Plan:
    from emovec import _host

    require(has_cuda(), f"device {device!r}: this build has no CUDA kernels, it plans for CPUs only")
    require(device != "cuda" or torch.cuda.is_available(), "device 'cuda': torch finds no GPU here")
    require(work.width % 8 == 0, f"on a GPU width must be a multiple of 8, got {work.width}")
    described = DEVICES[device] if device in DEVICES else torch.ops.emovec.describe_cuda()
    rules = {"read": -1, "add": 0, "rules": MAX_RULES}[work.mode]
    parts = 2 if work.precision == "high" and work.dtype != torch.float32 else 1
    number, tile, blocks, launches, workspace, passes, again = torch.ops.emovec.plan_cuda(
        work.tokens, work.width, work.concepts, DTYPES.index(work.dtype), parts, work.residual, rules, work.scores, described
    )
    names: dict[int, str] = {number: name for name, number in _host.kernels().items()}
    require(number in names, f"device {device!r} has no kernel for {work}")
    split = "over tokens" if blocks == -(-work.tokens // tile) else "over tokens and columns"
    how: dict[str, Any] = {"kernel": names[number], "split": split, "tile": tile, "blocks": blocks}
    reads = passes + again - 1 + (passes - work.projects if work.residual else 0)  # of x and residual, beyond those that must be
    moved = work.bytes + reads * work.stream + (min(passes, 1) - work.projects) * work.readers + 8 * workspace
    return Plan(**vars(work), **how, device=device, launches=launches, parts=parts, moved=moved)
