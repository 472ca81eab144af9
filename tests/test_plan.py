"""The plan of a call: what it must move and compute, and which kernel does it, on GPUs that are not here too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from cases import make, same_bits
from typer.testing import CliRunner

from emovec import _host
from emovec.cli import app as application
from emovec.plan import DEVICES, Plan, Work, has_cuda, plan

cuda = pytest.mark.skipif(not has_cuda(), reason="this build has no CUDA kernels (no nvcc when it was built)")


def info(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(application.app, ["info", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


# --- the work -------------------------------------------------------------------------------------------------------


def test_the_least_that_moves() -> None:
    x, readers, scores = 64 * 4096 * 2, 171 * 4096 * 2, 64 * 172 * 4
    assert Work(64, 4096).bytes == x + readers + scores
    assert Work(64, 4096, mode="add", rows=16).bytes == 2 * x + readers + scores + 16 * 4096 * 4
    assert Work(64, 4096, mode="rules", residual=True).bytes == 3 * x + readers + scores + 4096 * 4
    assert Work(64, 4096, dtype=torch.float32).bytes == 2 * x + 2 * readers + scores
    assert Work(64, 4096, mode="add", residual=True, scores=False).bytes == 2 * x + 4096 * 4  # adding asks for no projection
    assert Work(64, 4096, mode="rules", scores=False).bytes == 2 * x + readers + 4096 * 4


def test_the_least_that_moves_in_high_precision() -> None:
    x, scores = 64 * 4096 * 2, 64 * 172 * 4
    for dtype in (torch.bfloat16, torch.float16):
        assert Work(64, 4096, dtype=dtype, precision="high").bytes == x + 171 * 4096 * 4 + scores
    assert Work(64, 4096, dtype=torch.float32, precision="high").bytes == Work(64, 4096, dtype=torch.float32).bytes
    assert Work(64, 4096, precision="high").operations == Work(64, 4096).operations


def test_the_floor_is_the_longer_of_both() -> None:
    work = Work(64, 4096, 300)
    assert work.operations == 2 * 64 * 4096 * 300
    assert work.floor(1e12, 1e30) == work.bytes / 1e12
    assert work.floor(1e30, 1e12) == work.operations / 1e12
    assert Work(64, 4096, mode="add", scores=False).operations == 0


# --- how it is done ---------------------------------------------------------------------------------------------------


def test_on_a_cpu() -> None:
    made = plan(64, 4096, mode="add")
    assert (made.device, made.kernel, made.launches) == ("cpu", _host.fastest(), 0)
    assert (made.split, made.tile) == _host.plan(64, 4096, 171, torch.get_num_threads())
    assert made.blocks <= torch.get_num_threads()
    assert made.moved == made.bytes
    assert plan(1, 64).split == "serial"


Make = Callable[[], Plan]
CHOICES: list[tuple[str, str, Make]] = [
    ("h100", "cuda_decode_sm90", lambda: plan(1, 4096, device="h100")),
    ("h100", "cuda_decode_sm90", lambda: plan(8, 16384, mode="rules", residual=True, device="h100")),
    ("h100", "cuda_decode_sm90", lambda: plan(64, 576, dtype=torch.float16, mode="add", device="h100")),
    ("h100", "cuda_stream_sm90_by_8", lambda: plan(512, 4096, device="h100")),
    ("h100", "cuda_stream_sm90_by_4", lambda: plan(2048, 4096, mode="rules", device="h100")),
    ("a100", "cuda_sliced", lambda: plan(1024, 4096, device="a100")),
    ("a100", "cuda_portable", lambda: plan(16384, 4096, device="a100")),
    ("h100", "cuda_portable", lambda: plan(16384, 4096, dtype=torch.float32, device="h100")),
    ("h100", "cuda_stream_sm90_by_2", lambda: plan(8192, 4096, device="h100")),
    ("h100", "cuda_stream_sm90", lambda: plan(16384, 4096, mode="rules", device="h100")),
    ("h100", "cuda_stream_sm90", lambda: plan(16384, 16384, residual=True, device="h100")),
    ("h100", "cuda_portable", lambda: plan(16384, 4096, 300, mode="rules", device="h100")),
    ("h100", "cuda_sliced", lambda: plan(64, 4096, 300, device="h100")),
    ("h100", "cuda_sliced", lambda: plan(1, 4096, 1024, mode="rules", device="h100")),
    ("h100", "cuda_sliced", lambda: plan(1, 4096, dtype=torch.float32, device="h100")),
    ("h100", "cuda_portable", lambda: plan(4224, 4096, dtype=torch.float32, device="h100")),
    ("h100", "cuda_portable", lambda: plan(1, 4096, 300, mode="add", scores=False, device="h100")),
    ("h200", "cuda_stream_sm90", lambda: plan(16384, 4096, device="h200")),
    ("a100", "cuda_sliced", lambda: plan(1, 4096, device="a100")),
    ("a100", "cuda_sliced", lambda: plan(512, 4096, mode="add", device="a100")),
    ("a100", "cuda_portable", lambda: plan(13824, 4096, mode="rules", device="a100")),
    ("a100", "cuda_portable", lambda: plan(1, 576, device="a100")),
    ("b200", "cuda_decode_sm90", lambda: plan(1, 4096, mode="rules", device="b200")),
    ("b200", "cuda_sliced", lambda: plan(512, 4096, device="b200")),
    ("b200", "cuda_portable", lambda: plan(16384, 4096, device="b200")),
]


@cuda
@pytest.mark.parametrize(("device", "kernel", "make"), CHOICES)
def test_the_kernel_of_a_gpu(device: str, kernel: str, make: Make) -> None:
    made = make()
    assert made == make()
    assert (made.device, made.kernel) == (device, kernel)
    assert made.launches == (2 if kernel == "cuda_sliced" else 1)
    tiles = -(-made.tokens // made.tile)
    assert made.blocks % tiles == 0
    assert made.split == ("over tokens" if made.blocks == tiles else "over tokens and columns")
    if "_by_" in kernel:
        assert made.blocks == tiles * int(kernel[-1])


@cuda
def test_high_precision_on_a_gpu() -> None:
    """Two products for one, and every tile of x comes twice; no form that cannot run it."""
    for tokens, kernel in ((1, "cuda_sliced"), (512, "cuda_sliced"), (16384, "cuda_portable")):
        made, fast = (plan(tokens, 4096, precision=precision, device="h100") for precision in ("high", "fast"))
        assert (made.kernel, made.parts, fast.parts) == (kernel, 2, 1)
        assert made.operations == 2 * fast.operations
        slices = made.blocks // -(-tokens // made.tile)
        workspace = 2 * 4 * slices * tokens * (176 + 4) if slices > 1 else 0
        assert made.moved == made.bytes + made.stream + workspace
    wide = plan(64, 4096, dtype=torch.float32, precision="high", device="h100")
    assert vars(wide) == vars(plan(64, 4096, dtype=torch.float32, device="h100")) | {"precision": "high"}
    add = plan(64, 4096, mode="add", scores=False, precision="high", device="a100")
    assert add.moved == add.bytes
    assert plan(64, 4096, precision="high").parts == 1


@cuda
def test_what_a_kernel_moves_besides() -> None:
    """x again, to steer or for another pass over the concepts; the slices' projections out and in."""
    for mode, times in (("read", 0), ("add", 0), ("rules", 1)):
        made = plan(16384, 4096, mode=mode, device="h100")
        assert made.moved == made.bytes + times * made.stream
    two_passes = plan(16384, 4096, 300, mode="rules", residual=True, device="h100")
    assert two_passes.moved == two_passes.bytes + 3 * two_passes.stream  # x twice more, the residual once
    add = plan(64, 4096, 300, mode="add", scores=False, device="h100")
    assert add.moved == add.bytes
    add = plan(16384, 4096, mode="add", scores=False, device="h100")
    assert add.moved == add.bytes
    decode = plan(1, 4096, mode="add", residual=True, scores=False, device="h100")  # which always projects
    assert decode.moved == decode.bytes + decode.readers + 2 * decode.stream
    sliced = plan(1, 4096, device="a100")
    assert sliced.moved == sliced.bytes + 2 * 4 * sliced.blocks * (176 + 4)


@cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("tokens", [1, 300, 5000])
def test_the_plan_is_followed(tokens: int) -> None:
    planned = plan(tokens, 1024, mode="rules", device="cuda")
    auto, forced = (make(tokens, 1024, 171, torch.bfloat16, seed=1, device="cuda") for _ in range(2))
    auto.run()
    forced.run(form=_host.kernels()[planned.kernel])
    for name in ("x", "scores", "sqnorm"):
        assert same_bits(getattr(auto, name), getattr(forced, name))


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"device": "tpu"}, "got 'tpu'"),
        ({"mode": "steer"}, "got 'steer'"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"concepts": 1025}, "got 1025"),
        ({"rows": 0}, "got 0"),
        ({"precision": "exact"}, "precision must be one of fast, high, got 'exact'"),
        ({"scores": False}, "no work"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**{"tokens": 1, "width": 64, **wrong})


@cuda
def test_gpus_take_widths_of_eight() -> None:
    assert plan(1, 100).kernel == _host.fastest()
    with pytest.raises(ValueError, match="multiple of 8, got 100"):
        plan(1, 100, device="h100")


@cuda
def test_a_shape_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICES, "small", (128, 101376, 89, 0, 0, 0, 0, 0))  # 99 KB of shared memory
    assert plan(16384, 4096, device="small").kernel == "cuda_portable"
    assert plan(16384, 4096, 1024, mode="rules", device="small").kernel == "cuda_sliced"
    with pytest.raises(ValueError, match="'small' has no kernel"):
        plan(16384, 512, 1024, mode="rules", device="small")  # no more than a slice


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said() -> None:
    with pytest.raises(ValueError, match="device 'cuda'"):
        plan(1, 64, device="cuda")


def test_a_build_without_cuda_plans_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("emovec.plan", "emovec.cli.info"):
        monkeypatch.setattr(f"{module}.has_cuda", lambda: False)
    with pytest.raises(ValueError, match="'h100': this build has no CUDA kernels"):
        plan(1, 64, device="h100")
    said = info("--plan", "1", "64")
    assert "cpu" in said
    assert "h100" not in said
    assert "no CUDA kernels" in said


# --- the command --------------------------------------------------------------------------------------------------------


@cuda
def test_info_prints_the_plans() -> None:
    said = info("--plan", "512", "4096", "--mode", "rules")
    assert "512 x 4096, bf16, 171 concepts, rules" in said
    for device in ("cpu", *DEVICES):
        made = plan(512, 4096, mode="rules", device=device)
        row = next(line.split() for line in said.splitlines() if line.startswith(device))
        amounts = [f"{made.bytes / 1e6:.2f}", f"{made.moved / 1e6:.2f}", f"{made.operations / 1e6:,.0f}"]
        assert row == [device, made.kernel, *map(str, (made.tile, made.blocks, made.launches)), *amounts]


@cuda
def test_info_prints_them_as_json() -> None:
    answer = json.loads(info("--plan", "1", "4096", "--device", "h100", "--device", "a100", "--dtype", "fp32", "--concepts", "9", "--json"))
    assert [(p["device"], p["kernel"], p["dtype"], p["concepts"]) for p in answer["plans"]] == [
        (device, "cuda_sliced", "float32", 9) for device in ("h100", "a100")
    ]
    assert set(answer["plans"][0]) == {field.name for field in fields(Plan)} | {"bytes", "operations"}


@cuda
def test_info_prints_the_precision() -> None:
    said = info("--plan", "64", "4096", "--precision", "high", "--device", "h100")
    assert "64 x 4096, bf16, 171 concepts, add, high precision" in said
    assert plan(64, 4096, mode="add", precision="high", device="h100").kernel in said
    assert "precision" not in info("--plan", "64", "4096", "--device", "h100")


@pytest.mark.parametrize(("option", "value"), [("--precision", "exact"), ("--device", "tpu"), ("--mode", "steer"), ("--dtype", "int8")])
def test_info_names_what_is_wrong(option: str, value: str) -> None:
    assert value in info("--plan", "1", "4096", option, value, code=2)
