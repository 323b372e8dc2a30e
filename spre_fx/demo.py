"""A small ResNet on real scans of handwritten digits: dense, then N:M sparse with SpRe.

The whole way of a model through the library: `prepare` a fresh copy of the dense model, train it
like any other, `finalize` it, and see that the deployed graph computes what was trained. `run` is
what to read; `python -m spre_fx demo` and examples/digits.py call it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from spre_fx.api import finalize, prepare
from spre_fx.comparison import diff
from spre_fx.costs import cost
from spre_fx.dense_form import dense_view
from spre_fx.dynamics import MaskDynamics
from spre_fx.inspection import site_table, sites
from spre_fx.plots import plot_spatial_sparsity


@dataclass(frozen=True)
class Results:
    """What the demo found.

    Attributes:
        accuracy: Of each model on the test set, by name.
        parameters: Of each model.
        nonzeros: Non-zeros of the conv and linear weights of each model, masks applied.
        difference: The largest difference between outputs of the trained and the deployed graph.
        pictures: The files written.
    """

    accuracy: dict[str, float]
    parameters: dict[str, int]
    nonzeros: dict[str, int]
    difference: float
    pictures: tuple[str, ...]

    def __str__(self) -> str:
        headers = ("model", "test accuracy (%)", "parameters", "kernel non-zeros")
        rows = [
            (name, 100 * accuracy, self.parameters[name], self.nonzeros[name])
            for name, accuracy in self.accuracy.items()
        ]
        table = tabulate(rows, headers, floatfmt=".2f", intfmt=",")
        pictures = "\n".join(f"picture: {picture}" for picture in self.pictures)
        difference = f"largest output difference, prepared to deployed: {self.difference:.1e}"
        return f"{table}\n\n{difference}\n{pictures}"

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self)


def run(pattern: str, epochs: int, seed: int, output: Path, *, quiet: bool = False) -> Results:
    """Train dense and N:M sparse, finalize, compare, draw.

    Args:
        pattern: The N:M pattern.
        epochs: Epochs of both trainings.
        seed: Seed of both.
        output: Folder for the pictures.
        quiet: Whether to print nothing on the way.
    """
    torch.set_num_threads(1)  # batches this small gain nothing from more
    x, x_test, y, y_test = digits()

    torch.manual_seed(seed)
    dense = resnet()
    train(dense, x, y, epochs, name="dense", quiet=quiet)

    torch.manual_seed(seed)
    prepared = prepare(resnet(), pattern)
    tracker = MaskDynamics(prepared)
    train(prepared, x, y, epochs, name=pattern, tracker=tracker, quiet=quiet)

    deployed = finalize(prepared)
    if not quiet:
        show(f"What prepare({pattern}) did", site_table(prepared))
        show("From the dense model to the training graph", diff(dense, prepared))
        show("From the training graph to the deployed graph", diff(prepared, deployed))
        show("What the training graph costs", cost(prepared, x[:1]))
    models = {"dense": dense, "prepared": prepared, "deployed": deployed}
    return test(models, x_test, y_test, draw(prepared, tracker, output))


def digits() -> list[Tensor]:
    """Standardised images `(count, 1, 8, 8)` to train and to test on, and the labels of both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    split = train_test_split(
        data.images, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    x, x_test, y, y_test = map(torch.from_numpy, split)
    x, x_test = (((images - x.mean()) / x.std()).float()[:, None] for images in (x, x_test))
    return [x, x_test, y, y_test]


def resnet(widths: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """A stem and one residual block per width, on 8x8, 4x4 and 2x2 pixels."""
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(widths[0])
    model.relu = nn.ReLU()
    for number, (before, width) in enumerate(zip(widths[:1] + widths, widths, strict=False), 1):
        stride = width // before
        conv = nn.Conv2d(before, width, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(width)) if stride > 1 else None
        model.add_module(f"layer{number}", BasicBlock(before, width, stride, shortcut))
    model.pool = nn.AdaptiveAvgPool2d(1)
    model.flatten = nn.Flatten()
    model.fc = nn.Linear(widths[-1], 10)
    return model


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    *,
    name: str,
    tracker: MaskDynamics | None = None,
    quiet: bool = False,
) -> None:
    """Train with SGD and a cosine schedule, as one trains any model."""
    from tqdm import tqdm

    steps = len(x) // 64
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    progress = tqdm(range(epochs), desc=f"{name:>5}", unit="epoch", disable=quiet)
    model.train()
    for epoch in progress:
        total_loss, correct = 0.0, 0
        for step, batch in enumerate(torch.randperm(len(x))[: steps * 64].split(64)):
            if tracker is not None and step % 7 == 0:
                tracker.record(epoch * steps + step)
            logits = model(x[batch])
            loss = nn.functional.cross_entropy(logits, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
            correct += int((logits.argmax(1) == y[batch]).sum())
        progress.set_postfix(loss=f"{total_loss / steps:.4f}", acc=f"{correct / (64 * steps):.2%}")


@torch.no_grad()
def test(models: dict[str, nn.Module], x: Tensor, y: Tensor, pictures: tuple[str, ...]) -> Results:
    """How good and how large each model is, and how far the outputs of the last two differ."""
    logits = {name: model.eval()(x) for name, model in models.items()}
    *_, prepared, deployed = logits.values()
    return Results(
        accuracy={n: (z.argmax(1) == y).double().mean().item() for n, z in logits.items()},
        parameters={
            n: sum(p.numel() for p in dense_view(m).parameters()) for n, m in models.items()
        },
        nonzeros={n: sum(site.nonzeros for site in sites(m)) for n, m in models.items()},
        difference=(prepared - deployed).abs().max().item(),
        pictures=pictures,
    )


def draw(prepared: nn.Module, tracker: MaskDynamics, output: Path) -> tuple[str, ...]:
    """The pictures: spatial sparsity behind the SpRe branches, and how the masks moved."""
    output.mkdir(parents=True, exist_ok=True)
    sparsity, dynamics = output / "spatial_sparsity.png", output / "mask_dynamics.png"
    plot_spatial_sparsity(prepared, sparsity)
    tracker.plot(dynamics)
    return str(sparsity), str(dynamics)


def show(title: str, text: object) -> None:
    """Print a section."""
    print(f"\n{title}\n{'=' * len(title)}\n{text}\n", flush=True)
