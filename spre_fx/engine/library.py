"""Finding, loading and calling the C++ library of the engine."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from spre_fx.engine.program import Program, Step
from spre_fx.engine.training import MaskedConv, Weight
from spre_fx.errors import OptionError

VERSION = 10  # of engine.h, training.h and the kernels
VARIABLE = "SPRE_FX_ENGINE"
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # the best first

_NOT_INSTALLED = (
    "spre_fx was installed without its C++ kernels (no C++ compiler was found, or it failed), so "
    "N:M layers run as dense ones: install a C++ compiler and reinstall spre_fx."
)


class _OpenMP(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("parallel", "thread", "threads")]


_INTEGER, _ADDRESS, _STEPS = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Step)
_ON_THREADS = (_INTEGER, ctypes.POINTER(_OpenMP))
_WEIGHT, _CONV = ctypes.POINTER(Weight), ctypes.POINTER(MaskedConv)
_FUNCTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "spre_supports": ((ctypes.c_char_p,), _INTEGER),
    "spre_takes": ((_STEPS,), _INTEGER),
    "spre_scratch": ((_STEPS, _INTEGER, _INTEGER), _INTEGER),
    "spre_run": ((_STEPS, _INTEGER, ctypes.POINTER(_ADDRESS), _ADDRESS, *_ON_THREADS), None),
    "spre_largest_m": ((), _INTEGER),
    "spre_nm_mask": ((_WEIGHT, _INTEGER, _INTEGER, _ADDRESS, *_ON_THREADS), None),
    "spre_count_scratch": ((_WEIGHT, _INTEGER), _INTEGER),
    "spre_count_largest": ((_WEIGHT, _INTEGER, _ADDRESS, _ADDRESS, *_ON_THREADS), None),
    "spre_mask_weight": ((*(_ADDRESS,) * 3, _INTEGER, _INTEGER, *_ON_THREADS), None),
    "spre_decay_gradient": (
        (*(_ADDRESS,) * 4, _INTEGER, _INTEGER, ctypes.c_double, *_ON_THREADS),
        None,
    ),
    "spre_product_gradients": ((*(_ADDRESS,) * 5, _INTEGER, _INTEGER, *_ON_THREADS), None),
    "spre_count_kept": ((_ADDRESS, _INTEGER), _INTEGER),
    "spre_images_together": ((_INTEGER,), _INTEGER),
    "spre_masked_conv_scratch": ((_CONV, _INTEGER, _INTEGER, _INTEGER), _INTEGER),
    "spre_masked_conv": (
        (_CONV, _INTEGER, *(_ADDRESS,) * 6, _INTEGER, _ADDRESS, *_ON_THREADS),
        None,
    ),
}


@dataclass(frozen=True, eq=False)
class Engine:
    """A loaded library. It keeps no state, so any number of threads may call it at once.

    Attributes:
        isa: The instruction set that it was compiled for, one of `ISAS`.
        one_thread: Why everything runs on one thread; "" where it does not.
    """

    isa: str
    one_thread: str
    _library: ctypes.CDLL = field(repr=False)
    _openmp: _OpenMP | None = field(repr=False)

    def takes(self, step: Step) -> bool:
        """Whether there is a kernel for a step, here and on this CPU."""
        return bool(self._library.spre_takes(ctypes.byref(step)))

    def scratch(self, steps: Program, threads: int) -> int:
        """Bytes of scratch, aligned to 64, that `run` needs on so many threads."""
        return int(self._library.spre_scratch(steps, len(steps), self._threads(threads)))

    def run(self, steps: Program, buffers: list[int], scratch: int, threads: int) -> None:
        """Run the steps in order; each sees what the ones before it wrote.

        Nothing is checked: a step that `takes` refuses, or an address with less behind it than the
        steps say, is undefined behaviour.

        Args:
            steps: What to run.
            buffers: The addresses of the buffers that the steps number.
            scratch: The address of as much scratch as `scratch` says, of this call alone.
            threads: How many to run on, of torch's OpenMP runtime.
        """
        addresses = (ctypes.c_void_p * len(buffers))(*buffers)
        threads = self._threads(threads)
        self._library.spre_run(steps, len(steps), addresses, scratch, threads, self._openmp)

    def largest_m(self) -> int:
        """The largest M that `nm_mask` takes."""
        return int(self._library.spre_largest_m())

    def nm_mask(self, weight: Weight, n: int, m: int, mask: int, threads: int) -> None:
        """Write the N:M mask of a weight to an address: a byte a number, in the same place.

        Nothing is checked, here and below.
        """
        threads = self._threads(threads)
        self._library.spre_nm_mask(weight, n, m, mask, threads, self._openmp)

    def count_scratch(self, weight: Weight, threads: int) -> int:
        """Bytes of scratch, aligned to 64, that `count_largest` needs on so many threads."""
        return int(self._library.spre_count_scratch(weight, self._threads(threads)))

    def count_largest(
        self, weight: Weight, kept: int, per_tap: int, scratch: int, threads: int
    ) -> None:
        """Count the `kept` largest magnitudes at each tap, lower index first among equals.

        Args:
            weight: Of fewer than 2^31 numbers.
            kept: One or more of them.
            per_tap: The address of an int64 for each tap.
            scratch: The address of as much scratch as `count_scratch` says.
            threads: How many to run on, of torch's OpenMP runtime.
        """
        threads = self._threads(threads)
        self._library.spre_count_largest(weight, kept, per_tap, scratch, threads, self._openmp)

    def mask_weight(
        self, *, weight: int, mask: int, y: int, itemsize: int, count: int, threads: int
    ) -> None:
        """Write weight * mask to `y`: `count` numbers of 4 or 8 bytes at these addresses."""
        threads = self._threads(threads)
        self._library.spre_mask_weight(weight, mask, y, itemsize, count, threads, self._openmp)

    def decay_gradient(
        self,
        *,
        gradient: int,
        weight: int,
        mask: int,
        y: int,
        itemsize: int,
        count: int,
        decay: float,
        threads: int,
    ) -> None:
        """Write gradient + decay * (1 - mask) * weight, likewise."""
        threads = self._threads(threads)
        self._library.spre_decay_gradient(
            gradient, weight, mask, y, itemsize, count, decay, threads, self._openmp
        )

    def product_gradients(
        self,
        *,
        gradient: int,
        weight: int,
        mask: int,
        of_weight: int,
        of_mask: int,
        itemsize: int,
        count: int,
        threads: int,
    ) -> None:
        """Write the gradients of weight * mask, both of numbers; a mask has none where it is 0."""
        operands = (gradient, weight, mask, of_weight, of_mask)
        self._library.spre_product_gradients(
            *operands, itemsize, count, self._threads(threads), self._openmp
        )

    def count_kept(self, mask: int, count: int) -> int:
        """The number of set bytes among `count` of a mask at an address."""
        return int(self._library.spre_count_kept(mask, count))

    def images_together(self, itemsize: int) -> int:
        """How many images `masked_conv` takes at a time."""
        return int(self._library.spre_images_together(itemsize))

    def masked_conv_scratch(self, conv: MaskedConv, which: int, kept: int, threads: int) -> int:
        """Bytes of scratch, aligned to 64, that `masked_conv` needs on so many threads."""
        threads = self._threads(threads)
        return int(self._library.spre_masked_conv_scratch(conv, which, kept, threads))

    def masked_conv(
        self,
        conv: MaskedConv,
        which: int,
        kept: int,
        *,
        mask: int,
        result: int,
        scratch: int,
        threads: int,
        x: int | None = None,
        y_gradient: int | None = None,
        weight: int | None = None,
        bias: int | None = None,
    ) -> None:
        """Run a pass, `which` as training.h numbers them, over the weights that a mask keeps.

        Args:
            conv: Shapes and layouts.
            which: 0 takes x, weight and perhaps a bias, 1 y_gradient and weight, 2 x and
                y_gradient.
            kept: The set bytes of the mask.
            mask: Its address; likewise below.
            result: Of the output, of the gradient of x or of that of the weight.
            scratch: Of as much scratch as `masked_conv_scratch` says.
            threads: How many to run on, of torch's OpenMP runtime.
            x: Of the input.
            y_gradient: Of the gradient of the output.
            weight: Of the weight.
            bias: Of the bias.
        """
        operands = (x, y_gradient, weight, mask, bias, result)
        self._library.spre_masked_conv(
            conv, which, *operands, kept, scratch, self._threads(threads), self._openmp
        )

    def _threads(self, threads: int) -> int:
        return 1 if self._openmp is None else threads


def load() -> Engine | None:
    """The engine for this CPU, loaded once; None where there is none.

    The environment variable SPRE_FX_ENGINE, read when this is first called, takes another one:
    "avx512_bf16", "avx512", "avx2", "portable", or "none".

    Raises:
        OptionError: If the variable has another value, or this installation or CPU lacks what it
            asks for.
    """
    return _loaded()[0]


def why_not() -> str:
    """Why `load` returns None, in a sentence; "" where it returns an engine.

    Raises:
        OptionError: As `load` does.
    """
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Engine | None, str]:
    wanted = os.environ.get(VARIABLE) or None
    if wanted == "none":
        return None, f"{VARIABLE}=none turns the C++ kernels off, so N:M layers run as dense ones."
    if wanted not in (None, *ISAS):
        raise OptionError(f"expected {VARIABLE} to be {', '.join(ISAS)} or none, found {wanted!r}.")
    found = find(Path(__file__).parent, ISAS if wanted is None else (wanted,))
    if wanted is not None and isinstance(found, str):
        raise OptionError(f"{VARIABLE} asks for {wanted}, but it cannot be loaded: {found}")
    return (None, found) if isinstance(found, str) else (found, "")


def find(directory: Path, isas: tuple[str, ...]) -> Engine | str:
    """Load the first of some libraries that is there and that this CPU can run.

    Args:
        directory: Where they are: `_<isa>` with any suffix of a Python extension module.
        isas: Which, the best first.

    Returns:
        An engine, or a sentence that says why there is none.
    """
    files = {isa: path for isa in ISAS if (path := _file(directory, isa)) is not None}
    if "portable" not in files:
        return _NOT_INSTALLED
    portable = _open(files["portable"])
    if isinstance(portable, str):
        return portable
    there = [isa for isa in isas if isa in files]
    supported = [isa for isa in there if portable.spre_supports(isa.encode())]
    if not supported:
        lacking = "was not compiled" if not there else "does not run on this CPU"
        return f"the engine for {' or '.join(isas)} {lacking}; found {', '.join(files)}."
    library = portable if supported[0] == "portable" else _open(files[supported[0]])
    if isinstance(library, str):
        return library
    openmp = _torch_openmp()
    if isinstance(openmp, str):
        return Engine(supported[0], openmp, library, None)
    return Engine(supported[0], "", library, openmp)


def _file(directory: Path, isa: str) -> Path | None:
    paths = (directory / f"_{isa}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _open(path: Path) -> ctypes.CDLL | str:
    """Load a library and type its functions; a sentence where it cannot be, or is an old one."""
    try:
        library = ctypes.CDLL(str(path))
        library.spre_version.argtypes, library.spre_version.restype = (), ctypes.c_int64
        version = library.spre_version()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error}): reinstall spre_fx."
    if version != VERSION:
        return (
            f"{path} was compiled for version {version} of the engine and this is version "
            f"{VERSION}, so N:M layers run as dense ones: reinstall spre_fx."
        )
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _torch_openmp() -> _OpenMP | str:
    """The OpenMP runtime that torch runs on, or why it cannot be called, in a sentence.

    A second runtime in one process would fight the first one for the cores. Looking a function up
    in torch's extension module looks through all that it depends on.
    """
    torch_library = ctypes.CDLL(torch._C.__file__)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        found = [ctypes.cast(getattr(torch_library, name), ctypes.c_void_p) for name in names]
    except AttributeError as error:
        return f"torch's OpenMP runtime cannot be called, so the engine runs on one thread: {error}"
    return _OpenMP(*found)
