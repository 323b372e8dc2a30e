"""What a measurement ran on: the CPU, what it can do, and the versions of what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino", "spre_fx")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def describe(packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """CPU, its vector instructions, the cores this process may use, and versions of packages."""
    return {
        "cpu": _cpuinfo("model name") or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in _cpuinfo("flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
    }


def sentence(machine: dict[str, Any]) -> str:
    """The same for people, on one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    flags = ", ".join(machine["flags"]) or "no vector instructions that are listed"
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    return f"{machine['cpu']} ({flags}), {machine['cores']} cores{gpu}; {versions}"


def has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16; without that nothing is gained by the type."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))


def one_thread_count(threads: int) -> dict[str, str]:
    """The environment of a process whose every engine runs on so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **{name: str(threads) for name in names}}


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
