"""Prepare, train and finalize every model of torchvision, and write down what became of it.

    python benchmarks/torchvision_sweep.py                      # all; an hour on one core
    python benchmarks/torchvision_sweep.py --models 'resnet*'   # globs
    python benchmarks/torchvision_sweep.py --only-failed        # once more what has an error

Each model runs in a process of its own: 1:4 with SR-STE, two training steps, finalize, and the
outputs of the trained and the deployed model on one input in evaluation mode. A finished model is
one line of JSON in a file, and is not run again; the table is written from that file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.models import list_models
from torchvision_recipes import Batch, batch, build, family, features, loss, recipe
from tqdm import tqdm

import spre_fx

HERE = Path(__file__).parent
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
# One thread, and an allocator (glibc's) that keeps pages: handing them back and forth takes longer
# than many a model's arithmetic.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
HEADERS = (
    "model",
    "family",
    "convs and linears",
    "SpRe",
    "N:M only",
    "dense",
    "largest difference",
    "seconds",
    "remark",
)


def run_one(name: str) -> dict[str, Any]:
    """The row of one model. What `prepare` refuses is a row as well."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    row: dict[str, Any] = {
        "model": name,
        "family": family(name),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "remark": recipe(name).remark,
    }
    model = build(name).train()
    dtype = next(model.parameters()).dtype
    layers = [n for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    row |= {"layers": len(layers), "dtype": str(dtype).removeprefix("torch.")}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepared = spre_fx.prepare(model, "1:4")
    except spre_fx.SpreError as error:
        return row | {"refused": f"{type(error).__name__}: {error}", "seconds": _since(start)}
    left_out = " ".join(str(w.message) for w in caught if "never calls" in str(w.message))
    _check_checkpoint(model, prepared, left_out)
    row |= _account(prepared, layers, left_out)
    del model
    gc.collect()
    data = batch(name, dtype)
    _train(name, prepared, data)
    deployed = spre_fx.finalize(prepared)
    row["difference"] = _difference(prepared.eval(), deployed, data)
    return row | {"seconds": _since(start)}


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def _check_checkpoint(model: nn.Module, prepared: nn.Module, left_out: str) -> None:
    """A checkpoint of the dense model belongs in the prepared one, SpRe keys aside."""
    loaded = prepared.load_state_dict(model.state_dict(), strict=False)
    missing = [key for key in loaded.missing_keys if "_spre" not in key]
    unknown = [key for key in loaded.unexpected_keys if key.rpartition(".")[0] not in left_out]
    if missing or unknown:
        raise RuntimeError(
            f"a dense checkpoint does not load: missing {missing}, unknown {unknown}"
        )


def _account(prepared: nn.Module, layers: list[str], left_out: str) -> dict[str, Any]:
    """Counts of what `sites` says, in which every layer of the model must be."""
    sites = spre_fx.sites(prepared)
    counts = Counter(site.name for site in sites)
    wrong = [n for n in layers if counts[n] != 1 and n not in left_out]
    if wrong:
        raise RuntimeError(f"expected each layer once in sites, found otherwise: {wrong}")
    dense = [s for s in sites if s.state in (spre_fx.State.SKIPPED, spre_fx.State.DENSE)]
    silent = [s.name for s in dense if not (s.reason and s.note)]
    if silent:
        raise RuntimeError(f"dense without a reason: {silent}")
    reasons = Counter(site.reason for site in dense)
    missing = sum(counts[name] == 0 for name in layers)
    return {
        "spre": sum(site.state is spre_fx.State.SPRE for site in sites),
        "plain": sum(site.state is spre_fx.State.NM for site in sites),
        "skipped": dict(reasons.most_common()) | ({"never called": missing} if missing else {}),
    }


def _train(name: str, model: nn.Module, data: Batch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss(name, model(*data.training)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _difference(prepared: nn.Module, deployed: nn.Module, data: Batch) -> float:
    """The largest difference of any output, relative to the largest value of that output."""
    trained, final = (features(m, lambda m=m: m(*data.evaluation)) for m in (prepared, deployed))
    shapes = [[tuple(y.shape) for y in outputs] for outputs in (trained, final)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"outputs differ in shape: {shapes[0]} trained, {shapes[1]} deployed")
    return max(_relative(a, b) for a, b in zip(trained, final, strict=True))


def _relative(trained: Tensor, final: Tensor) -> float:
    largest = trained.double().abs().max().item() if trained.numel() else 0.0
    if not 0 < largest < float("inf"):
        raise RuntimeError(f"nothing to compare: the largest output is {largest}")
    return (trained.double() - final.double()).abs().max().item() / largest


def run_apart(name: str, timeout: float) -> dict[str, Any]:
    """The row of one model, made by a process of its own; if that fails, a row with the error."""
    command = [sys.executable, __file__, "--one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **ENVIRONMENT},
        )
        lines, error = done.stdout.splitlines(), done.stderr.strip().splitlines()
        if done.returncode == 0 and lines:
            found: dict[str, Any] = json.loads(lines[-1])
            return found
        what = error[-1] if error else f"ended by signal {-done.returncode}"
    except subprocess.TimeoutExpired:
        what = f"stopped after {timeout:.0f} s"
    return {
        "model": name,
        "family": family(name),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "error": what,
        "seconds": _since(start),
    }


def is_explained(row: dict[str, Any]) -> bool:
    """Whether a model went through, within tolerance, or is one that is refused by design."""
    if "difference" in row:
        return bool(row["difference"] <= TOLERANCE[row["dtype"]])
    return row["family"] == "quantised" and row.get("refused", "").startswith("ModelError")


def failed(names: Iterable[str], rows: dict[str, dict[str, Any]]) -> list[str]:
    """Those of the models that have a row, and an unexplained one."""
    return [name for name in names if name in rows and not is_explained(rows[name])]


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows written so far, by model; the last of a model counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill cuts the last short
    return {row["model"]: row for row in rows}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own even after one that was cut short."""
    before = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write(("\n" if before and not before.endswith("\n") else "") + json.dumps(row) + "\n")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    rows = sorted(rows, key=lambda row: row["model"])
    good = sum(is_explained(row) and "difference" in row for row in rows)
    refused = sum(is_explained(row) and "refused" in row for row in rows)
    versions = sorted({f"torch {row['torch']}, torchvision {row['torchvision']}" for row in rows})
    cells = tabulate([_cells(row) for row in rows], HEADERS, "github", disable_numparse=True)
    return f"""# Every model of torchvision

{"; ".join(versions)}. Written by `python benchmarks/torchvision_sweep.py`.

Each model, randomly initialised, is prepared at 1:4 with SR-STE, trained for two steps, and
finalized. The difference is between the trained and the deployed model in evaluation mode, in
float64 where the remark says nothing else, relative to the largest value of each output. Layers are
counted as `spre_fx.sites` lists them, the dense ones with its reasons.

{good} of {len(rows)} went through, {refused} are quantised and refused,
{len(rows) - good - refused} failed.

{cells}
"""


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    dense = ", ".join(f"{count} {reason}" for reason, count in row.get("skipped", {}).items())
    float32 = "float32" if row.get("dtype") == "float32" else ""
    said = row.get("refused") or row.get("error") or ""
    remark = "; ".join(part for part in (float32, row.get("remark", ""), said) if part)
    difference = f"{row['difference']:.1e}" if "difference" in row else ""
    columns = (row.get("layers"), row.get("spre"), row.get("plain"), dense)
    return (
        *(row["model"], row["family"], *columns),
        *(difference, row["seconds"], remark.replace("|", "\\|")),
    )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["*"], help="names or globs; default: all")
    parser.add_argument("--only-failed", action="store_true", help="run again what went wrong")
    parser.add_argument("--rows", type=Path, default=HERE / "torchvision.jsonl")
    parser.add_argument("--table", type=Path, help="default: beside --rows, ending in .md")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a model may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run what has no row yet, and write the table."""
    chosen = options()
    if chosen.one:
        print(json.dumps(run_one(chosen.one)))
        return
    rows = read_rows(chosen.rows)
    names = [n for n in list_models() if any(fnmatchcase(n, glob) for glob in chosen.models)]
    todo = failed(names, rows) if chosen.only_failed else [n for n in names if n not in rows]
    for name in (progress := tqdm(todo, disable=None)):
        progress.set_description(name)
        rows[name] = run_apart(name, chosen.timeout)
        append(chosen.rows, rows[name])
    path = chosen.table or chosen.rows.with_suffix(".md")
    path.write_text(table(rows.values()))
    wrong = failed(names, rows)
    print(f"{path}: {len(rows)} models, {len(wrong)} unexplained {wrong or ''}")


if __name__ == "__main__":
    main()
