"""What each operation does to the channels of a value: one rule per kind of operation.

A value is `Channels`, `Fixed` (a tensor whose channels keep their order), a list of values (the
result of a chunk or split), a tensor of the model itself, or None (a size, a flag, a number).
An operation without a rule may mix channels, so it fixes those of all its inputs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Node

from spre_fx.batch_norm import is_batch_norm
from spre_fx.modules import SPARSIFIABLE, Layer, TrainingFlag, TrainingSwitch
from spre_fx.passes.base import Reason
from spre_fx.passes.channel_flow import ChannelFlow, Channels, Fixed
from spre_fx.passes.channel_layers import fits_layer, through_layer, through_norm
from spre_fx.passes.channel_shapes import SHAPES, index, joined
from spre_fx.passes.channel_tables import (
    BINARY,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    NORMS,
    SPATIAL,
    SPATIAL_MODULES,
    TRANSPOSED,
)
from spre_fx.passes.graph_view import GraphView
from spre_fx.subclasses import plain_base

Value: TypeAlias = Any
Kinds: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...]
_INPUT = Fixed(Reason.MODEL_INPUT, "are those of the model's input")
_OUTPUT = Fixed(Reason.MODEL_OUTPUT, "are part of the model's output")


def follow_channels(view: GraphView) -> ChannelFlow:
    """Follow every channel from the layer that makes it to all that takes it. Never edits."""
    rules = _Rules(view)
    for node in view.digraph:
        rules.values[node] = rules.value(node)
    return rules.flow


class _Rules:
    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.flow = ChannelFlow()
        self.values: dict[Node, Value] = {}

    def value(self, node: Node) -> Value:
        if node.op == "placeholder":
            return _INPUT
        if node.op == "output":
            self._fix_inputs(node, _OUTPUT)
            return None
        if node.op == "get_attr":
            return self._attribute(node)
        return self._module(node) if node.op == "call_module" else self._call(node)

    def _call(self, node: Node) -> Value:
        """A function or method."""
        target: Any = node.target
        if _is_size(node) or self._is_arithmetic_on_sizes(node):
            return None
        if target in SHAPES:
            return self._reshaped(node, SHAPES[target])
        drops_paths = getattr(target, "__name__", None) == "stochastic_depth"
        kinds: tuple[tuple[bool, Callable[[Node], Value]], ...] = (
            (target in BINARY, self._binary),
            (target in ELEMENTWISE or drops_paths, self._elementwise),
            (target in SPATIAL, self._spatial),
            (target in (torch.cat, torch.concat), self._concatenated),
        )
        return next((rule for is_it, rule in kinds if is_it), self._mixed)(node)

    def _is_arithmetic_on_sizes(self, node: Node) -> bool:
        simple = getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
        return simple and all(self.values[maker] is None for maker in node.all_input_nodes)

    def _of(self, argument: Any) -> Value:
        return self.values[argument] if isinstance(argument, Node) else None

    def _first(self, node: Node) -> Value:
        """The value of the input, if no other input has channels."""
        inputs = [self.values[maker] for maker in node.all_input_nodes]
        first = self._of(node.args[0] if node.args else node.kwargs.get("input"))
        others = [value for value in inputs if value is not None and value is not first]
        return None if others else first

    def _attribute(self, node: Node) -> Value:
        """A tensor of the model; used elsewhere too, it would have to follow several arrays."""
        owner, _, name = str(node.target).rpartition(".")
        module = self.view.modules.get(owner)
        tensor = getattr(module, name, None)
        alone = len(self.view.owners.get(id(tensor), ())) <= 1 and module is not None
        if alone and isinstance(tensor, Tensor) and id(module) not in self.view.calls:
            return tensor
        detail = f"meet {node.target}, which other modules use as well"
        return Fixed(Reason.SHARED_PARAMETER, detail)

    def _module(self, node: Node) -> Value:
        module = self.view.module_of(node)
        assert module is not None
        if isinstance(module, TrainingFlag):
            return None
        fixed = self._not_understood(module, node)
        if fixed is not None:
            return self._fix_inputs(node, fixed)
        if isinstance(module, Layer):
            return self._layer(node, module)
        if is_batch_norm(module) or isinstance(module, NORMS):
            return self._norm(node, module)
        kinds: tuple[tuple[Kinds, Callable[[Node], Value]], ...] = (
            (TrainingSwitch, self._binary),
            (ELEMENTWISE_MODULES, self._elementwise),
            (SPATIAL_MODULES, self._spatial),
            (nn.Flatten, self._flattened),
        )
        return next((rule for kind, rule in kinds if isinstance(module, kind)), self._mixed)(node)

    def _flattened(self, node: Node) -> Value:
        module: Any = self.view.module_of(node)
        axes = module.start_dim, module.end_dim
        return self._reshaped(node, lambda value, _: SHAPES["flatten"](value, axes))

    def _not_understood(self, module: nn.Module, node: Node) -> Fixed | None:
        """Why nothing can be said of a module that has a rule, or None."""
        known = (*SPARSIFIABLE, *TRANSPOSED) if isinstance(module, Layer) else None
        if isinstance(module, Layer) and "weight" not in module._parameters:
            return Fixed(Reason.PARAMETRISED, f"meet {node.target}, whose weight is computed")
        if known is not None and plain_base(module, known) is None:
            detail = f"meet {node.target}, a {type(module).__name__} with a forward of its own"
            return Fixed(Reason.CUSTOM_FORWARD, detail)
        ours_or_torchs = type(module).__module__.startswith(("torch.nn.", "spre_fx."))
        if known is None and not ours_or_torchs and not is_batch_norm(module):
            detail = f"meet {node.target} ({type(module).__name__}), which is kept whole"
            return Fixed(Reason.OPAQUE, detail)
        for name, parameter in module.named_parameters(recurse=False):
            owners = self.view.owners[id(parameter)]
            if len(owners) > 1:
                detail = f"meet {node.target}, whose {name} is shared by {', '.join(owners)}"
                return Fixed(Reason.SHARED_PARAMETER, detail)
        return None

    def _layer(self, node: Node, layer: Layer) -> Value:
        value = self._first(node)
        if not isinstance(value, Fixed) and not fits_layer(layer, value):
            value = self._mixed(node)
        return through_layer(self.flow, layer, value)

    def _norm(self, node: Node, norm: nn.Module) -> Value:
        value = self._elementwise(node)
        if isinstance(value, Channels) and not through_norm(self.flow, norm, value):
            return self._mixed(node)
        return value

    def _elementwise(self, node: Node) -> Value:
        value = self._first(node)
        return value if isinstance(value, Channels | Fixed) else self._mixed(node)

    def _spatial(self, node: Node) -> Value:
        value = self._elementwise(node)
        if isinstance(value, Fixed):
            return value
        module = self.view.module_of(node)
        if module is None:
            rank = SPATIAL[node.target]
        else:
            named = re.search(r"(\d)d$", type(module).__name__)  # Upsample takes any rank
            rank = None if named is None else int(named[1])
        if not value.is_feature_map or value.spread or rank not in (None, value.ndim - 2):
            return self._mixed(node)
        return value

    def _binary(self, node: Node) -> Value:
        """Two values that meet element by element: channels at the same place are one."""
        inputs = [self._of(argument) for argument in node.args[:2]]
        known = [value for value in inputs if value is not None]
        plain = all(isinstance(argument, Node | int | float) for argument in node.args)
        if len(node.args) != 2 or not plain or not all(_is_tensor(value) for value in known):
            return self._mixed(node)
        if any(self._of(argument) is not None for argument in node.kwargs.values()):
            return self._mixed(node)
        channels = [value for value in known if isinstance(value, Channels)]
        if not known:
            return None
        if len(channels) < len(known) and channels:
            other = next(value for value in known if not isinstance(value, Channels))
            return self._with_other(node, channels[0], other)
        if len(channels) < len(known):
            return next((value for value in known if isinstance(value, Fixed)), self._mixed(node))
        return channels[0] if len(channels) == 1 else self._aligned(node, *channels)

    def _aligned(self, node: Node, left: Channels, right: Channels) -> Value:
        if left.axis != right.axis or left.spread != right.spread:
            return self._mixed(node)
        if len(left.atoms) == len(right.atoms):
            self.flow.unify(left.atoms, right.atoms)
        elif 1 not in (len(left.atoms), len(right.atoms)):
            return self._mixed(node)
        longer = max(left, right, key=lambda value: len(value.atoms))
        known = {value.ndim for value in (left, right)}
        ndim = max(d for d in known if d) if None not in known else None
        return Channels(longer.atoms, longer.axis, ndim, longer.spread)

    def _with_other(self, node: Node, value: Channels, other: Value) -> Value:
        """Channels meet a tensor of the model, or one whose channels keep their order."""
        if isinstance(other, Fixed) or value.spread:
            return self._fix_inputs(node, other) if isinstance(other, Fixed) else self._mixed(node)
        if other.ndim < -value.axis or other.shape[value.axis] == 1:
            return value
        if other.shape[value.axis] != len(value.atoms):
            return self._mixed(node)
        self.flow.follow(other, other.ndim + value.axis, value.atoms)
        return value

    def _concatenated(self, node: Node) -> Value:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        values = [self._of(part) for part in tensors] if isinstance(tensors, list | tuple) else []
        if not values or not all(isinstance(value, Channels) for value in values):
            return self._mixed(node)
        result = joined(values, dim)
        if result is None:
            return self._mixed(node)
        if result.atoms is values[0].atoms:
            for value in values[1:]:
                self.flow.unify(result.atoms, value.atoms)
            return result
        self.flow.array(result.atoms)
        return result

    def _reshaped(self, node: Node, rule: Callable[[Any, Any], Value]) -> Value:
        value = self._first(node)
        if isinstance(value, Fixed):
            return value
        if node.target is operator.getitem and isinstance(value, list):
            return index(value, node.args[1]) or self._mixed(node)
        if not isinstance(value, Channels):
            return self._mixed(node)
        result = rule(value, (*node.args[1:], *node.kwargs.values()))
        if result is None:
            return self._mixed(node)
        for part in result if isinstance(result, list) else [result]:
            if part.atoms is not value.atoms:
                self.flow.array(part.atoms)
        return result

    def _mixed(self, node: Node) -> Fixed:
        """No rule holds: whatever goes in keeps its order, and so does what comes out."""
        kind = type(self.view.module_of(node)).__name__ if node.op == "call_module" else node.op
        name = str(node.target) if node.op == "call_module" else node.name
        return self._fix_inputs(
            node, Fixed(Reason.CHANNELS_MIXED, f"meet {name} ({kind}), which may mix channels")
        )

    def _fix_inputs(self, node: Node, why: Fixed) -> Fixed:
        for maker in node.all_input_nodes:
            values = self.values[maker]
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, Channels):
                    self.flow.fix(value.atoms, why)
        return why


def _is_size(node: Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def _is_tensor(value: Value) -> bool:
    return isinstance(value, Channels | Fixed | Tensor)
