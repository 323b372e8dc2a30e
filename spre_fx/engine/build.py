"""How setuptools compiles the engine: once for each instruction set. pyproject.toml names it.

The results are plain shared libraries that ctypes loads: no OpenMP of their own, since torch's is
used. Where there is no compiler, or it does not know the flags, spre_fx installs without them and
says so when it is asked for them.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}


class BuildEngines(build_ext):
    """Compiles each library with the flags of its instruction set, and again for a new header."""

    def finalize_options(self) -> None:
        """Give the extensions what pyproject.toml does not say of them."""
        super().finalize_options()
        self.parallel = True
        for extension in self.extensions or ():
            source = Path(extension.sources[0])
            extension.extra_compile_args = [*FLAGS, *ISAS[source.stem]]
            extension.depends = [str(header) for header in source.parent.glob("*.h")]
