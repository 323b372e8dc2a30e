"""Train a small ResNet on real scans of handwritten digits: dense, then N:M sparse with SpRe.

    python examples/digits.py --pattern 1:8

What it does is in `run`, in spre_fx/demo.py; `python -m spre_fx demo` does the same without this
repository.
"""

import argparse
from pathlib import Path

from spre_fx import demo


def main() -> None:
    """Train, finalize, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pattern", default="1:8", help="N:M, such as 2:4 or 1:16")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), metavar="DIR")
    options = parser.parse_args()
    results = demo.run(options.pattern, options.epochs, options.seed, options.output)
    demo.show("Results", results)


if __name__ == "__main__":
    main()
