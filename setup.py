"""The CPU engine, compiled once for each instruction set; pyproject.toml holds all the rest.

They are plain shared libraries that ctypes loads: no OpenMP of their own, since torch's is used.
Where there is no compiler, or it does not know the flags, spre_fx installs without them and says so
when it is asked for them.
"""

from glob import glob

from setuptools import Extension, setup

FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}

setup(
    ext_modules=[
        Extension(
            f"spre_fx.engine._{isa}",
            [f"spre_fx/engine/{isa}.cpp"],
            depends=glob("spre_fx/engine/*.h"),
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,
        )
        for isa, flags in ISAS.items()
    ],
    options={"build_ext": {"parallel": True}},
)
