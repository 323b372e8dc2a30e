"""Calls of single layers to be timed, as a planned graph runs them on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spre_fx.engine import load, program
from spre_fx.layer_steps import layer_step
from spre_fx.packed_ops import aligned


def planned_call(layer: nn.Module, x: Tensor) -> Callable[[], object] | None:
    """A call of the engine that runs a layer into memory that is there.

    A call of the layer itself makes its output anew, and waits for the system to find memory for
    it: that takes as long as a quarter of a conv, and a planned graph never does.

    Args:
        layer: A packed layer, or a dense one.
        x: Its input, of images channels-last; on the CPU.

    Returns:
        The call, or None where the engine has no step for the layer.
    """
    engine, made = load(), layer_step(layer, x)
    if engine is None or made is None or not engine.takes(made.step):
        return None
    step, threads = made.step, torch.get_num_threads()
    shape = step.batch, step.out_height, step.out_width, step.out_channels
    y = torch.empty(shape, dtype=x.dtype)
    operands = (x, y, aligned(made.weight), made.bias)
    steps = program([step])
    scratch = torch.empty(engine.scratch(steps, threads), dtype=torch.uint8)

    def call() -> None:
        buffers = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
        engine.run(steps, buffers, scratch.data_ptr(), threads)

    return call
