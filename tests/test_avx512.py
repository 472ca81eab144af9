"""The AVX-512 and AMX forms on a machine without them: the same sources, compiled to AVX2, against the same tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from variants import build, passed

from emovec import _host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_host.runs("cpu_amx"), reason="this processor runs the AVX-512 and AMX forms itself"),
    pytest.mark.skipif(not _host.runs("cpu_avx2"), reason="the emulation needs AVX2"),
]


def test_avx512_forms_emulated(tmp_path: Path) -> None:
    build(tmp_path, "-DEMOVEC_EMULATE_AVX512=ON")
    assert passed(tmp_path, "cpu_avx512 or cpu_amx") > 300
