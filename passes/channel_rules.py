"""What each operation does to the channels of a value: one rule per kind of operation.

A value is `Channels`, `Fixed` (a tensor whose channels keep their order), a list of values (the
result of a chunk or split), a tensor of the model itself, or None (a size, a flag, a number).
An operation without a rule may mix channels, so it fixes those of all its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spre_fx.batch_norm import is_batch_norm
from spre_fx.modules import SPARSIFIABLE, Layer, TrainingFlag, TrainingSwitch
from spre_fx.passes.base import Reason
from spre_fx.passes.channel_flow import Atoms, ChannelFlow, Channels, Fixed
from spre_fx.passes.channel_shapes import SHAPES, index, joined
from spre_fx.passes.graph_view import GraphView

Value: TypeAlias = Any
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
        if node.op == "call_module":
            return self._module(node)
        target = str(node.target) if node.op == "call_method" else node.target
        if _is_size(node) or self._is_arithmetic_on_sizes(node):
            return None
        if target in _BINARY:
            return self._binary(node)
        if target in _ELEMENTWISE or getattr(target, "__name__", None) == "stochastic_depth":
            return self._elementwise(node)
        if target in _SPATIAL:
            return self._spatial(node)
        if target in (torch.cat, torch.concat):
            return self._concatenated(node)
        rule = SHAPES.get(target)
        return self._mixed(node) if rule is None else self._reshaped(node, rule)

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
        if isinstance(module, TrainingSwitch):
            return self._binary(node)
        fixed = self._not_understood(module, node)
        if fixed is not None:
            return self._fix_inputs(node, fixed)
        if isinstance(module, Layer):
            return self._layer(node, module)
        if is_batch_norm(module) or isinstance(module, _NORMS):
            return self._norm(node, module)
        if isinstance(module, _ELEMENTWISE_MODULES):
            return self._elementwise(node)
        if isinstance(module, nn.PReLU):
            return self._prelu(node, module)
        if isinstance(module, _SPATIAL_MODULES):
            return self._spatial(node)
        if isinstance(module, nn.Flatten):
            axes = module.start_dim, module.end_dim
            return self._reshaped(node, lambda value, _: SHAPES["flatten"](value, axes))
        return self._mixed(node)

    def _not_understood(self, module: nn.Module, node: Node) -> Fixed | None:
        """Why nothing can be said of a module that has a rule, or None."""
        known = (*SPARSIFIABLE, *_TRANSPOSED) if isinstance(module, Layer) else None
        if known is not None and type(module) not in known:
            detail = f"meet {node.target}, a {type(module).__name__} with a forward of its own"
            return Fixed(Reason.CUSTOM_FORWARD, detail)
        if known is None and not _is_of_torch(module) and not is_batch_norm(module):
            detail = f"meet {node.target} ({type(module).__name__}), which is kept whole"
            return Fixed(Reason.OPAQUE, detail)
        if isinstance(module, Layer) and "weight" not in module._parameters:
            return Fixed(Reason.PARAMETRISED, f"meet {node.target}, whose weight is computed")
        for name, parameter in module.named_parameters(recurse=False):
            owners = self.view.owners[id(parameter)]
            if len(owners) > 1:
                detail = f"meet {node.target}, whose {name} is shared by {', '.join(owners)}"
                return Fixed(Reason.SHARED_PARAMETER, detail)
        return None

    def _layer(self, node: Node, layer: Layer) -> Value:
        value = self._first(node)
        rank = 0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2
        axis = -1 - rank
        count = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        incoming = self._incoming(node, value, axis, count)
        known = self.flow.inputs.setdefault(id(layer), incoming)
        self.flow.unify(known.atoms, incoming.atoms)
        outgoing = self.flow.outputs.get(id(layer))
        if outgoing is None:
            outgoing = self._weights(layer, incoming.atoms)
            self.flow.outputs[id(layer)] = outgoing
        if not isinstance(layer, nn.Linear):
            return Channels(outgoing, axis, ndim=1 - axis)
        return Channels(outgoing, axis, value.ndim if isinstance(value, Channels) else None)

    def _incoming(self, node: Node, value: Value, axis: int, count: int) -> Channels:
        """The layer's input array: what reaches it, or atoms that keep their places."""
        if isinstance(value, Channels) and value.axis == axis:
            each, rest = divmod(count, len(value.atoms))
            if not rest and (each == 1 or value.spread):
                atoms = tuple(atom for atom in value.atoms for _ in range(each))
                return Channels(self.flow.array(atoms), axis, value.ndim, spread=each > 1)
        atoms = self.flow.new(count)
        why = value if isinstance(value, Fixed) else self._mixed(node)
        self.flow.fix(atoms, why)
        return Channels(atoms, axis, None)

    def _weights(self, layer: Layer, incoming: Atoms) -> Atoms:
        """Let a layer's weight follow its input; its output array, which its rows follow."""
        flow, groups = self.flow, getattr(layer, "groups", 1)
        transposed = isinstance(layer, _ConvTransposeNd)
        if isinstance(layer, _ConvNd) and 1 < groups == layer.in_channels and not transposed:
            each = layer.out_channels // groups
            outgoing = flow.array([atom for atom in incoming for _ in range(each)])
            flow.follow(layer.weight, 0, outgoing)
            flow.follow(layer.bias, 0, outgoing)
            return outgoing
        made = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        outgoing = flow.new(made)
        self._blocks(incoming, groups)
        self._blocks(outgoing, groups)
        if transposed and groups > 1:
            why = Fixed(Reason.TRANSPOSED, "meet a transposed conv with groups")
            flow.fix(incoming + outgoing, why)
            return outgoing
        flow.follow(layer.weight, 0 if transposed else 1, incoming, groups)
        flow.follow(layer.weight, 1 if transposed else 0, outgoing)
        flow.follow(layer.bias, 0, outgoing)
        return outgoing

    def _blocks(self, atoms: Atoms, groups: int) -> None:
        """Keep the channels of each group of a grouped operation together."""
        if groups > 1:
            size = len(atoms) // groups
            for start in range(0, len(atoms), size):
                self.flow.array(atoms[start : start + size])

    def _norm(self, node: Node, norm: nn.Module) -> Value:
        value = self._first(node)
        if not isinstance(value, Channels):
            return value if isinstance(value, Fixed) else self._mixed(node)
        features = norm._buffers.get("running_mean")
        last = isinstance(norm, nn.LayerNorm)
        count = getattr(norm, "num_features", getattr(norm, "num_channels", None))
        if last:
            count = norm.normalized_shape[0] if len(norm.normalized_shape) == 1 else None
        elif features is not None:
            count = len(features)
        fits = value.axis == -1 if last else value.is_feature_map
        each, rest = divmod(count or 0, len(value.atoms))
        if rest or not each or not fits or (each > 1 and not value.spread):
            return self._mixed(node)
        atoms = tuple(atom for atom in value.atoms for _ in range(each))
        self._blocks(atoms, getattr(norm, "num_groups", 1))
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.flow.follow(getattr(norm, name, None), 0, atoms)
        return value

    def _prelu(self, node: Node, module: nn.PReLU) -> Value:
        value = self._first(node)
        if module.num_parameters > 1:
            if not isinstance(value, Channels) or not value.is_feature_map or value.spread:
                return self._mixed(node)
            if len(value.atoms) != module.num_parameters:
                return self._mixed(node)
            self.flow.follow(module.weight, 0, value.atoms)
        return value

    def _elementwise(self, node: Node) -> Value:
        value = self._first(node)
        return value if isinstance(value, Channels | Fixed) else self._mixed(node)

    def _spatial(self, node: Node) -> Value:
        value = self._elementwise(node)
        feature_map = isinstance(value, Channels) and value.is_feature_map and not value.spread
        return value if feature_map or isinstance(value, Fixed) else self._mixed(node)

    def _binary(self, node: Node) -> Value:
        """Two values that meet element by element: channels at the same place are one."""
        inputs = [self._of(argument) for argument in node.args[:2]]
        known = [value for value in inputs if value is not None]
        if len(node.args) < 2 or any(not _is_tensor(value) for value in known):
            return self._mixed(node)
        channels = [value for value in known if isinstance(value, Channels)]
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


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_tensor(value: Value) -> bool:
    return isinstance(value, Channels | Fixed | Tensor)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_BINARY = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub),
    *(operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div),
    *(torch.maximum, torch.minimum),
    *("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"),
}
_ACTIVATIONS = (
    *("relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "elu", "selu", "celu", "leaky_relu"),
    *("hardswish", "hardsigmoid", "hardtanh", "mish", "softplus", "logsigmoid", "rrelu"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
)
_SIMPLE = ("abs", "neg", "exp", "sqrt", "square", "clamp", "pow", "relu", "relu_", "sigmoid", "tanh")
_ELEMENTWISE: set[Any] = {
    *(getattr(F, name) for name in _ACTIVATIONS),
    *(getattr(torch, name) for name in _SIMPLE),
    *(f"{name}{ending}" for name in _SIMPLE for ending in ("", "_")),
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to"),
    *(operator.pow, operator.neg),
}
_POOLS = [
    f"{kind}_pool{rank}d"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
    for rank in (1, 2, 3)
]
_SPATIAL: set[Any] = {
    *(getattr(F, name) for name in _POOLS),
    *(getattr(torch, name) for name in _POOLS if hasattr(torch, name)),
    *(torch._C._nn.avg_pool2d, torch._C._nn.avg_pool3d, F.interpolate),
}
_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.Softplus, nn.Identity),
    *(nn.LogSigmoid, nn.RReLU, nn.Softsign, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_SPATIAL_MODULES = (
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
    *(nn.modules.pooling._LPPoolNd, nn.Upsample, nn.modules.padding._ConstantPadNd),
    *(nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd),
)
