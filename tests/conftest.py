"""What holds for every test: the library is whole, seeds are fixed, `cuda` tests need a device."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ["SPRE_FX_CACHE"] = "off"  # what tests measure is nobody's business

# Small tensors gain nothing from more threads, and cores are busy with other tests.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

if importlib.util.find_spec("spre_fx.passes") is None:
    raise pytest.UsageError(
        "spre_fx.passes is not there: passes/ takes that name only in an editable install. "
        "Run: python -m pip install -e '.[test]'"
    )

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# A time limit for each example measures how busy the machine is.
settings.register_profile("no deadline", settings.default, deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` on a machine without a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_setup() -> None:
    """Let no test depend on the numbers an earlier one drew."""
    torch.manual_seed(0)


@pytest.fixture(name="import_benchmarks")
def _import_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets a test import the modules of a folder of benchmarks/.

    They are forgotten afterwards: other folders have modules of the same names.
    """
    yield lambda folder: monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(BENCHMARKS):
            del sys.modules[name]
