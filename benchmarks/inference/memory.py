"""Peak memory of a deployed network at inference, and the size of its weights.

    python benchmarks/inference/memory.py --model resnet50

Each line is a process of its own that loads a finished network from a file and runs it. Memory is
what is resident above the process with its libraries imported: once the network is loaded, and at
the peak of the calls that follow. What torch.compile needs includes its compiler, which has to run
in that process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "common"))

import engines
import machine
import networks
import process_memory
import torch
from tabulate import tabulate
from torch import nn

import spre_fx

HERE = Path(__file__)
_ONNX = {"onnxruntime": engines.run_in_onnxruntime, "openvino": engines.run_in_openvino}


def write(directory: Path, options: argparse.Namespace) -> tuple[int, dict[str, int]]:
    """Write every network as its engine loads it.

    Returns:
        Bytes of the dense network's weights, and of those that each engine is given.
    """
    x = networks.images(options.batch, options.pixels)
    prepared = networks.prepared(options.model, options.patterns[0])
    dense = spre_fx.finalize(prepared, backend="dense")
    torch.save(dense, directory / "dense.pt")
    if set(options.peers) & set(_ONNX):
        (directory / "dense.onnx").write_bytes(engines.onnx(dense, x))
    sizes = dict.fromkeys(options.peers, _bytes(dense))
    for pattern in options.patterns:
        prepared = networks.prepared(options.model, pattern)
        network = engines.deployed(prepared, x, options.backend)
        torch.save(network, _file(directory, pattern))
        sizes[pattern] = _bytes(network)
    return _bytes(dense), sizes


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _file(directory: Path, name: str) -> Path:
    """What an engine loads."""
    if name in networks.PATTERNS:
        return directory / f"{name.replace(':', '-')}.pt"
    return directory / ("dense.onnx" if name in _ONNX else "dense.pt")


def load(name: str, directory: Path, options: argparse.Namespace) -> engines.Runner:
    """An engine on the network in its file."""
    x, file = networks.images(options.batch, options.pixels), _file(directory, name)
    if name in _ONNX:
        return _ONNX[name](file.read_bytes(), x, options.threads)
    network = torch.load(file, weights_only=False)
    if name in networks.PATTERNS:
        return lambda: network(x)
    return engines.PEERS[name](network, x, options.threads, "float32")


def measure(name: str, directory: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Bytes above the process before: with the network loaded, and at the peak of three calls."""
    torch.set_num_threads(options.threads)
    if name in _ONNX:
        importlib.import_module(name)
    process_memory.warm_up()
    before = process_memory.resident()
    runner = load(name, directory, options)
    process_memory.release()
    loaded = process_memory.resident()
    process_memory.forget_peak()
    with torch.inference_mode():
        for _ in range(3):
            runner()
    return loaded - before, process_memory.peak() - before


def measure_apart(name: str, directory: Path, options: argparse.Namespace) -> tuple[int, int] | str:
    """What `measure` finds in a process of its own, or what went wrong there."""
    command = [
        *(sys.executable, str(HERE), "--worker", name, str(directory)),
        *("--batch", str(options.batch), "--pixels", str(options.pixels)),
        *("--threads", str(options.threads)),
    ]
    environment = machine.one_thread_count(options.threads)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    loaded, peak = json.loads(done.stdout.splitlines()[-1])
    return loaded, peak


def table(options: argparse.Namespace, run: Callable[..., tuple[int, int] | str]) -> str:
    """A line for each engine."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense, sizes = write(Path(folder), options)
        for name, size in sizes.items():
            found = run(name, Path(folder), options)
            cells = (found, "") if isinstance(found, str) else (_mebi(value) for value in found)
            rows.append((name, _mebi(size), f"{size / dense:.3f}", *cells))
    headers = ("engine", "weights, MiB", "of dense", "loaded, MiB", "peak of inference, MiB")
    return tabulate(rows, headers, "github", disable_numparse=True)


def _mebi(size: int) -> str:
    return f"{size / 2**20:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", nargs="*", choices=engines.PEERS, default=list(engines.PEERS))
    parser.add_argument("--patterns", nargs="+", default=list(networks.PATTERNS))
    parser.add_argument("--backend", default="auto", help="of spre_fx.finalize")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, directory = options.worker
        print(json.dumps(measure(name, Path(directory), options)))
        return
    print(f"{machine.sentence(machine.describe())}\n{options.model}, batch {options.batch}, "
          f"{options.pixels} pixels, {options.threads} threads\n", flush=True)  # fmt: skip
    print(table(options, measure_apart))


if __name__ == "__main__":
    main()
