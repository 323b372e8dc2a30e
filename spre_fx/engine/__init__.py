"""The CPU engine: C++ kernels that run a whole program of layers in one call, and train.

`engine.h` says what a program is, `training.h` what there is for training. The kernels are compiled
once for each instruction set when spre_fx is installed; `load` takes the best of them that this CPU
can run, and `why_not` says why there is none.
"""

from __future__ import annotations

from spre_fx.engine.library import Engine, load, why_not
from spre_fx.engine.program import PLANE_SLACK, Activation, Kind, Program, Step, Type, program
from spre_fx.engine.training import MaskedConv, Weight

__all__ = [
    "PLANE_SLACK",
    "Activation",
    "Engine",
    "Kind",
    "MaskedConv",
    "Program",
    "Step",
    "Type",
    "Weight",
    "load",
    "program",
    "why_not",
]
