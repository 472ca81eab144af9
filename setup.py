"""Builds emovec's native code by driving CMake with ninja; all metadata is in pyproject.toml.

Settings are read from the environment of the build: ``EMOVEC_CUDA=off`` leaves the CUDA kernels out even if nvcc is there.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake build makes both ``libemovec.so`` (the op) and ``_host`` (the host-side module) beside the package's files."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = ROOT / "emovec" if self.in_source else Path(self.build_lib).resolve() / "emovec"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cuda = os.environ.get("EMOVEC_CUDA", "on")
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DEMOVEC_OUTPUT={target}",
            f"-DEMOVEC_CUDA={cuda}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build wrote straight into the source tree."""

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("emovec._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
