"""Other builds of the native code, made in a temporary folder, and the tests of the op run against them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(folder: Path, *settings: str) -> None:
    """Put a copy of the package into ``folder``, its native code built with these CMake settings and without the CUDA kernels."""
    package = folder / "emovec"
    shutil.copytree(ROOT / "emovec", package, ignore=shutil.ignore_patterns("*.so", "data", "__pycache__"))
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DEMOVEC_CUDA=OFF"]
    made = [*settings, f"-DEMOVEC_OUTPUT={package}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([*configure, *made], ["cmake", "--build", str(folder / "build")]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the package in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True)


def passed(folder: Path, select: str, **environment: str) -> int:
    """How many of the op's tests that ``select`` names pass on the package in ``folder``; none may fail."""
    # --capture=sys: what ends the process writes to the descriptor itself, and is not to be lost with it
    options = ["-q", "-k", select, "-p", "no:cacheprovider", "--capture=sys"]
    run = python(folder, "-m", "pytest", *options, str(ROOT / "tests" / "test_ops.py"), **environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[:6000]
    count = re.search(r"(\d+) passed", run.stdout)
    assert count
    return int(count[1])
