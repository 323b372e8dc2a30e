"""What a run says on the way: lines of JSON, TensorBoard where it is installed, the terminal."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from recipes import distributed
from spre_fx.atomic_write import write_atomically

T = TypeVar("T")


class Log:
    """`log.jsonl` and the TensorBoard events of a run; nothing on ranks other than 0.

    Args:
        folder: Where they go.
        settings: Its first record.
        epoch: The epochs behind; records of later ones, of a life that was killed, are dropped.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], epoch: int) -> None:
        self._path = folder / "log.jsonl"
        self._writer: Any = None
        if not distributed.is_main():
            return
        self._start({"settings": settings}, epoch)
        if importlib.util.find_spec("tensorboard") is None:
            say("TensorBoard is not installed: the log is log.jsonl alone")
        else:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)

    def _start(self, header: Mapping[str, Any], epoch: int) -> None:
        """Begin with the header and the records up to an epoch, if any are there."""
        text = self._path.read_text() if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
        records = map(json.loads, whole.splitlines())
        kept = [header, *(each for each in records if each.get("epoch", math.inf) <= epoch)]
        write_atomically(self._path, "".join(f"{json.dumps(each)}\n" for each in kept).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        if distributed.is_main():
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Add what was found in an epoch, here, in TensorBoard, and on the terminal."""
        self.write({"epoch": number, **values})
        say(f"epoch {number}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, number)
            self._writer.flush()

    def close(self) -> None:
        """Let go of the files."""
        if self._writer is not None:
            self._writer.close()


def say(text: object) -> None:
    """Print, on rank 0."""
    if distributed.is_main():
        tqdm.write(str(text))


def show(title: str, text: object, path: Path | None = None) -> None:
    """Print a section, on rank 0, and keep it as a file."""
    if distributed.is_main():
        tqdm.write(f"\n{title}\n{'=' * len(title)}\n{text}\n")
        if path is not None:
            write_atomically(path, f"{text}\n".encode())


def progress(items: Iterable[T], title: str) -> tqdm[T]:
    """A progress bar, on rank 0; a line a minute where it goes into a file."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    main = distributed.is_main()
    return tqdm(items, desc=title, leave=False, mininterval=seconds, disable=not main)
