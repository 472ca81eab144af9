"""The native library: what it needs from outside, and that it stays free of Python and of unstable torch symbols."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tomllib
from pathlib import Path

import torch  # noqa: F401  loads libtorch_cpu, which the library needs

import emovec

LIBRARY = Path(emovec.__file__).parent / "libemovec.so"
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
STABLE_ABI = re.compile(r"^(aoti_torch_|torch_)[a-z0-9_]+$")
LOADER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}


def undefined() -> list[tuple[str, str]]:
    """(kind, symbol) of every undefined dynamic symbol; kind U or w (weak)."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    return [(kind, symbol) for kind, symbol in (line.split()[-2:] for line in listing.splitlines())]


def test_needs_only_the_stable_abi_and_the_system() -> None:
    foreign = [s for _, s in undefined() if not SYSTEM.search(s) and not STABLE_ABI.match(s) and s not in LOADER]
    assert foreign == []
    assert any(STABLE_ABI.match(symbol) for _, symbol in undefined())


def test_every_symbol_is_there_in_a_torch_without_cuda() -> None:
    """RTLD_NOW binds all of them at once; what only libtorch_cuda has is asked for by name, when a tensor is on a GPU."""
    ctypes.CDLL(str(LIBRARY), mode=os.RTLD_NOW)


def test_links_to_nothing_but_libtorch_cpu_and_the_system() -> None:
    dynamic = subprocess.run(["readelf", "-d", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert [
        n for n in needed if not re.match(r"(libtorch_cpu|libstdc\+\+|libgcc_s|libc|libm|ld-linux-x86-64|libpthread|libdl|librt)\.so", n)
    ] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_runs_on_an_older_glibc() -> None:
    """2.34 or older: what manylinux_2_34 asks for."""
    versions = {tuple(map(int, v.split("."))) for _, s in undefined() for v in re.findall(r"@GLIBC_([\d.]+)$", s)}
    assert max(versions) <= (2, 34)


def test_every_package_is_installed() -> None:
    """An editable installation would not notice one that is left out."""
    root = Path(__file__).parents[1]
    listed = set(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    assert {".".join(file.relative_to(root).parts[:-1]) for file in (root / "emovec").rglob("__init__.py")} | {"emovec.triton"} == listed
