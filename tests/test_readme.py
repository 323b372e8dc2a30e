"""Every code block of README.md runs, in order, and the table it shows is the one printed."""

import contextlib
import io
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet, resnet50
from torchvision.models.resnet import BasicBlock

import spre_fx
from spre_fx import engine, masks
from spre_fx.cli import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def marked(marker: str) -> str:
    (block,) = re.findall(rf"^<!-- {marker} -->\n```\w+\n(.*?)^```$", README, re.M | re.S)
    return block


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()


def sparse_elsewhere() -> nn.Module:
    """A dense model with 2:4 weights."""
    model = small_resnet()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4 and parameter.shape[1] >= 4:
                parameter.mul_(masks.nm_mask(parameter, spre_fx.Pattern(2, 4)))
    return model


def without_machine(table: str) -> list[str]:
    """The lines of a table without what differs: random live taps, a CPU's expected speed."""
    varying = (r"\d(?=/9)", r"(?<=expected to be )[\d.]+")
    return [re.sub("|".join(varying), "-", line).rstrip() for line in table.strip().splitlines()]


@pytest.mark.skipif(engine.load() is None, reason="README shows what the engine runs")
def test_python_blocks_run_and_print_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPRE_FX_CACHE", "off")
    namespace = {"spre_fx": spre_fx, "torch": torch, "model": small_resnet(), "train": train}
    namespace["dense"] = sparse_elsewhere()
    namespace["images"] = torch.ones(2, 3, 64, 64)  # draws no random number
    printed = []
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(block, namespace)
        printed.append(output.getvalue())
    assert without_machine(printed[0]) == without_machine(marked("output: diff"))
    assert "rpn.head.cls_logits: is called by rpn.head (RPNHead), which torch.fx" in "".join(
        printed
    )
    assert printed[1] == "conv1: C_in/groups=3 is less than M=8\n"
    for picture in ("spatial_sparsity.png", "methods.png", "mask_dynamics.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_the_ledger_is_the_one_printed(tmp_path):
    """But for the bytes of the description, which differ between versions of torch."""
    deployed = spre_fx.finalize(spre_fx.prepare(resnet50(), "1:16"))
    printed = spre_fx.save(deployed, tmp_path / "model").totals().splitlines()
    shown = marked("output: ledger").splitlines()
    assert [line.rstrip() for line in printed[:5]] == [line.rstrip() for line in shown[:5]]
    for ours, theirs in zip(printed[5:], shown[5:], strict=True):
        share = [float(line.split()[-1].removesuffix("%")) for line in (ours, theirs)]
        assert abs(share[0] - share[1]) < 0.03


def test_every_block_is_run_by_some_test():
    languages = set(re.findall(r"^```(\w+)$", README, flags=re.MULTILINE))
    assert languages == {"bash", "python", "text"}
    assert sorted(blocks("bash")) == sorted([marked("command: demo"), marked("command: test")])


@pytest.mark.parametrize("marker", ["command: demo", "command: test"])
def test_commands_do_their_own_set_up(marker):
    (command,) = marked(marker).splitlines()
    set_up, install, run = command.split(" && ")
    assert set_up == "python3 -m venv .venv"
    assert re.fullmatch(r"\.venv/bin/pip install -q -e '\.\[(demo|test,zoo)\]'", install)
    assert run.startswith(".venv/bin/python ")
    script = run.split()[1]
    assert script == "-m" or (ROOT / script).is_file()


def test_commands_shown_are_commands_there_are():
    (block,) = [b for b in blocks("text") if b.startswith("python -m spre_fx")]
    for line in block.splitlines():
        words = line.partition("#")[0].split()
        assert words[:3] == ["python", "-m", "spre_fx"]
        _parser().parse_args(words[3:])


def test_the_table_of_speeds_is_of_the_rows_that_were_measured():
    lines = (ROOT / "benchmarks" / "inference.jsonl").read_text().splitlines()
    measured = {}
    for row in map(json.loads, lines):
        setting, times, fastest = row["setting"], row["milliseconds"], row["fastest"]
        if (setting["model"], setting["pixels"]) != ("resnet50", 224):
            continue
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[fastest], ours, strict=True))
            for name, ours in times.items()
        }
        cpu = "AVX-512" if "avx512f" in row["machine"]["flags"] else "AVX2"
        key = f"{cpu}, {setting['dtype']}, {setting['batch']}, {setting['threads']}"
        measured[key] = (statistics.median(times[fastest]), fastest, ratios)
    (table,) = re.findall(r"^<!-- table: inference -->\n((?:\|.*\n)+)", README, re.M)
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
    )
    assert len(rows) >= 6
    for key, fastest, *shown in rows:
        milliseconds, engine_name, ratios = measured[key]
        assert fastest.lower().replace(" ", "").startswith(engine_name)
        assert f"{milliseconds:.3g} ms" in fastest
        assert shown == [f"{ratios[pattern]:.2f}x" for pattern in header[2:]]


def test_the_table_of_training_steps_is_of_the_rows_that_were_measured():
    lines = (ROOT / "benchmarks" / "training.jsonl").read_text().splitlines()
    measured = {}
    for row in map(json.loads, lines):
        setting, times = row["setting"], row["milliseconds"]
        measured[setting["model"], setting["mode"], setting["threads"], setting["pattern"]] = {
            name: statistics.median(a / b for a, b in zip(ours, times["dense"], strict=True))
            for name, ours in times.items()
        }
    (table,) = re.findall(r"^<!-- table: training -->\n((?:\|.*\n)+)", README, re.M)
    header, _, *rows = map(cells, table.splitlines())
    assert len(rows) >= 4
    for key, *shown in rows:
        network, mode, pattern = key.split(", ")
        ratios = measured[network.lower().replace("-", ""), mode, 1, pattern]
        names = [name.split(",")[0] for name in header[1:]]
        assert shown == [f"{ratios[name]:.2f}x" if name in ratios else "-" for name in names], key


def cells(line: str) -> list[str]:
    """Those of a row of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_table_of_accuracies_is_of_the_tables_that_were_measured():
    document = (ROOT / "benchmarks" / "accuracy.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### 1:16\n\n((?:\|.*\n)+)", document, re.M)
    measured = [
        dict(zip(cells(header), cells(line), strict=True))
        for header, _, *lines in map(str.splitlines, sections)
        for line in lines
    ]
    (table,) = re.findall(r"^<!-- table: accuracy -->\n((?:\|.*\n)+)", README, re.M)
    header, _, *rows = map(cells, table.splitlines())
    assert len(rows) >= 6
    for row in rows:
        shown = dict(zip(header, row, strict=True))
        assert any(shown.items() <= found.items() for found in measured), shown
