"""The AVX-512 and AMX forms on a machine without them: the same sources, compiled to AVX2, against the same tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emovec import _host

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_host.runs("cpu_amx"), reason="this processor runs the AVX-512 and AMX forms itself"),
    pytest.mark.skipif(not _host.runs("cpu_avx2"), reason="the emulation needs AVX2"),
]


def test_avx512_forms_emulated(tmp_path: Path) -> None:
    package = tmp_path / "emovec"
    shutil.copytree(ROOT / "emovec", package, ignore=shutil.ignore_patterns("*.so", "data", "__pycache__"))
    build = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    settings = ["-DEMOVEC_EMULATE_AVX512=ON", "-DEMOVEC_CUDA=OFF", f"-DEMOVEC_OUTPUT={package}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*build, *settings], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True, capture_output=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "cpu_avx512 or cpu_amx",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "test_ops.py"),
    ]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) > 300
