"""The command line, `python -m spre_fx`. What the commands do is in `spre_fx.commands`.

Nothing here imports torch, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from spre_fx.errors import SpreError, VerificationError
from spre_fx.patterns import Pattern

OK, FAILED, USAGE, BUG = 0, 1, 2, 3

_MODEL_HELP = (
    "a torchvision name (resnet18), timm:NAME, or package.module:NAME of an nn.Module or of a "
    "callable that makes one; found from the working directory as well"
)
_EPILOG = """exit codes: 0 done; 1 verification failed; 2 a wrong option, or a model or file that
cannot be taken; 3 an error of spre_fx itself. Errors are one line on stderr."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after the program's name; None for those of this process.

    Returns:
        The exit code: 0 done, 1 verification failed, 2 a wrong option or model, 3 a bug.

    Raises:
        SystemExit: From `--help`, and with code 2 for options that cannot be parsed.
    """
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        try:
            return _run(options)
        except VerificationError as error:
            return _fail(error, FAILED)
        except (SpreError, ImportError, OSError) as error:
            return _fail(error, USAGE)
        except Exception as error:
            if options.debug:
                raise
            return _fail(f"{type(error).__name__}: {error} (a bug; --debug shows where it is)", BUG)


def _run(options: argparse.Namespace) -> int:
    if "" not in sys.path:
        sys.path.insert(0, "")  # package.module:NAME of the working directory, for the script too
    answer = getattr(importlib.import_module("spre_fx.commands"), options.command)(options)
    try:
        print(json.dumps(answer.data, indent=2) if options.json else answer.text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED if answer.failed else OK


def _fail(error: object, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"spre_fx: error: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spre_fx",
        description="N:M sparse CNN training and inference with Spatial Re-parameterization.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_cost(commands)
    _add_plot(commands)
    _add_verify(commands)
    _add_demo(commands)
    return parser


_Commands = argparse._SubParsersAction


def _add_inspect(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(
        commands, "inspect", "show what `prepare` makes of every conv and linear; trains nothing"
    )
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument("--nodes", action="store_true", help="list the graph nodes that change")
    _add_recipe(command)


def _add_cost(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(
        commands, "cost", "count parameters and FLOPs, in training and at test, against dense"
    )
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument(
        "--input",
        type=_shape,
        default=(1, 3, 224, 224),
        metavar="SHAPE",
        help="shape of the model's input (default: 1,3,224,224)",
    )
    _add_recipe(command)


def _add_plot(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "plot", "draw the spatial sparsity of one model or of several")
    command.add_argument(
        "models",
        nargs="+",
        metavar="[LABEL=]MODEL",
        help=f"{_MODEL_HELP}; or a file of a prepared model (with --trust)",
    )
    command.add_argument(
        "-o", "--output", type=Path, default=Path("spatial_sparsity.png"), metavar="FILE"
    )
    _add_trust(command)
    _add_recipe(command)


def _add_verify(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(
        commands,
        "verify",
        "check the N:M pattern of every layer of a saved model, and that it can be finalized",
    )
    command.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a file of torch.save: a prepared or deployed model (with --trust), or its state_dict "
        "(with --model, and the options it was prepared with)",
    )
    command.add_argument("--model", metavar="MODEL", help=_MODEL_HELP)
    _add_trust(command)
    _add_recipe(command)


def _add_demo(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(
        commands, "demo", "train a small ResNet on handwritten digits, dense and N:M sparse"
    )
    command.add_argument("--pattern", type=_pattern, default="1:8", metavar="N:M")
    command.add_argument("--epochs", type=int, default=20)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", type=Path, default=Path("runs/digits"), metavar="DIR")


def _command(
    commands: _Commands[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, epilog=_EPILOG)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--debug", action="store_true", help="show the traceback of a bug")
    return command


def _add_recipe(command: argparse.ArgumentParser) -> None:
    """The options of `prepare`, and where the weights come from."""
    command.add_argument("--pattern", type=_pattern, default="2:4", metavar="N:M")
    command.add_argument("--method", default="sr-ste", help="the mask method (default: sr-ste)")
    command.add_argument("--branch", default="spre", help="the SpRe branch, or none")
    command.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="layers to leave dense; may be repeated",
    )
    command.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="GLOB=N:M",
        help="another pattern for some layers, or GLOB=dense; may be repeated",
    )
    command.add_argument(
        "--pretrained",
        action="store_true",
        help="download the weights of a torchvision or timm name",
    )


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust",
        action="store_true",
        help="unpickle the file, which runs whatever code its author put there: only for files "
        "whose origin you trust. Without it only tensors and plain data are read",
    )


def _pattern(text: str) -> str:
    try:
        return str(Pattern.parse(text))
    except SpreError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _override(text: str) -> tuple[str, str | None]:
    glob, separator, pattern = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected GLOB=N:M or GLOB=dense.")
    return glob, None if pattern == "dense" else _pattern(pattern)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected sizes such as 1,3,224,224.")
    return tuple(map(int, sizes))
