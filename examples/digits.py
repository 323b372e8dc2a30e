"""Train a small ResNet on real scans of handwritten digits: dense, then N:M sparse with SpRe.

Shows the whole way of a model through spre_fx: `prepare` a fresh copy of the dense model, train it
like any other, `finalize` it, and see that the deployed graph computes what was trained. Then draws
the spatial sparsity behind the SpRe branches (Fig. 2 of Zhang et al., 2306.05612v3):

    python examples/digits.py --pattern 1:8
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

import spre_fx


def digits() -> list[Tensor]:
    """Standardised images `(count, 1, 8, 8)` to train and to test on, and the labels of both."""
    data = load_digits()
    x, y = data.images, data.target
    split = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    x, x_test, y, y_test = map(torch.from_numpy, split)
    mean, std = x.mean(), x.std()
    x, x_test = (((images - mean) / std).float().unsqueeze(1) for images in (x, x_test))
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


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, name: str) -> None:
    """Train with SGD and a cosine schedule, as one trains any model."""
    steps = len(x) // 64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    progress = tqdm(range(epochs), desc=f"{name:>5}", unit="epoch")
    model.train()
    for _ in progress:
        total_loss, correct = 0.0, 0
        for batch in torch.randperm(len(x))[: steps * 64].split(64):
            logits = model(x[batch])
            loss = nn.functional.cross_entropy(logits, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == y[batch]).sum().item()
        progress.set_postfix(loss=f"{total_loss / steps:.4f}", acc=f"{correct / (64 * steps):.2%}")


def site_table(model: nn.Module) -> str:
    """What every conv and linear of a model is."""
    rows = []
    for site in spre_fx.sites(model):
        weight = "x".join(map(str, site.weight_shape))
        taps = "{} of {}".format(*site.live_taps) if site.live_taps else ""
        note = site.note.removeprefix(f"{site.name}: ")
        rows.append((site.name, site.state, site.pattern, weight, site.density, taps, note))
    return tabulate(rows, ("name", "state", "pattern", "weight", "density", "live taps", "note"))


@torch.no_grad()
def result_table(models: dict[str, nn.Module], x: Tensor, y: Tensor) -> str:
    """How good each model is on the test set, and how large; and what deployment has changed."""
    rows, logits = [], {}
    for name, model in models.items():
        logits[name] = model.eval()(x)
        accuracy = 100 * (logits[name].argmax(1) == y).double().mean().item()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append((name, accuracy, parameters, sum(s.nonzeros for s in spre_fx.sites(model))))
    headers = ("model", "test accuracy (%)", "parameters", "kernel non-zeros")
    table = tabulate(rows, headers, floatfmt=".2f", intfmt=",")
    difference = (logits["prepared"] - logits["deployed"]).abs().max().item()
    return f"{table}\n\nlargest output difference, prepared to deployed: {difference:.1e}"


def show(title: str, text: object) -> None:
    """Print a section."""
    print(f"\n{title}\n{'=' * len(title)}\n{text}\n", flush=True)


def main() -> None:
    """Train, finalize, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pattern", default="1:8", help="N:M, such as 2:4 or 1:16")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(1)  # batches this small gain nothing from more
    x, x_test, y, y_test = digits()

    torch.manual_seed(options.seed)
    dense = resnet()
    train(dense, x, y, options.epochs, "dense")

    torch.manual_seed(options.seed)
    prepared = spre_fx.prepare(resnet(), options.pattern)
    show(f"What prepare({options.pattern}) did", site_table(prepared))
    show("From the dense model to the training graph", spre_fx.diff(dense, prepared))
    train(prepared, x, y, options.epochs, options.pattern)

    deployed = spre_fx.finalize(prepared)
    show("From the training graph to the deployed graph", spre_fx.diff(prepared, deployed))
    models = {"dense": dense, "prepared": prepared, "deployed": deployed}
    show("Results", result_table(models, x_test, y_test))
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "spatial_sparsity.png"
    spre_fx.plot_spatial_sparsity(prepared, picture)
    print(f"Spatial sparsity of every site: {picture}")


if __name__ == "__main__":
    main()
