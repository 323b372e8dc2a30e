"""How the parameters of convs, linears and norms follow the channels that go in and come out."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spre_fx.modules import Layer
from spre_fx.passes.base import Reason
from spre_fx.passes.channel_flow import Atoms, ChannelFlow, Channels, Fixed


def fits_layer(layer: Layer, value: Channels | None) -> bool:
    """Whether the channels of `value` are the input channels of `layer`."""
    if value is None or value.axis != _axis(layer):
        return False
    each, rest = divmod(_count(layer), len(value.atoms))
    return not rest and (each == 1 or (each > 1 and value.spread))


def through_layer(flow: ChannelFlow, layer: Layer, value: Channels | Fixed) -> Channels:
    """Let the weight of a layer follow its input and its output, which is returned.

    Args:
        flow: Where the arrays are kept.
        layer: A conv or linear.
        value: Its input; if `Fixed`, the layer takes channels that keep their places.
    """
    axis = _axis(layer)
    incoming = _incoming(flow, layer, value)
    known = flow.inputs.setdefault(id(layer), incoming)
    flow.unify(known.atoms, incoming.atoms)
    if id(layer) not in flow.outputs:
        flow.outputs[id(layer)] = _weights(flow, layer, incoming.atoms)
    ndim = 1 - axis
    if isinstance(layer, nn.Linear):
        return Channels(flow.outputs[id(layer)], axis, incoming.ndim)
    return Channels(flow.outputs[id(layer)], axis, ndim)


def through_norm(flow: ChannelFlow, norm: nn.Module, value: Channels) -> bool:
    """Let the parameters and statistics of a norm follow; False where they do not fit."""
    if isinstance(norm, nn.PReLU) and norm.num_parameters == 1:
        return True
    last = isinstance(norm, nn.LayerNorm)
    features = _features(norm)
    each, rest = divmod(features, len(value.atoms))
    fits = value.axis == -1 and not value.spread if last else value.is_feature_map
    if rest or not each or not fits or (each > 1 and not value.spread):
        return False
    atoms = tuple(atom for atom in value.atoms for _ in range(each))
    if isinstance(norm, nn.GroupNorm):
        _blocks(flow, atoms, norm.num_groups)
    for name in ("weight", "bias", "running_mean", "running_var"):
        flow.follow(getattr(norm, name, None), 0, atoms)
    return True


def _axis(layer: Layer) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim


def _count(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _features(norm: nn.Module) -> int:
    """How many channels a norm is for, 0 if it normalises over more than one axis."""
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0] if len(norm.normalized_shape) == 1 else 0
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.PReLU):
        return norm.num_parameters
    mean = norm._buffers.get("running_mean")
    count: int = getattr(norm, "num_features", 0) if mean is None else len(mean)
    return count


def _incoming(flow: ChannelFlow, layer: Layer, value: Channels | Fixed) -> Channels:
    count = _count(layer)
    if isinstance(value, Fixed):
        atoms = flow.new(count)
        flow.fix(atoms, value)
        return Channels(atoms, _axis(layer), None)
    each = count // len(value.atoms)
    atoms = flow.array([atom for atom in value.atoms for _ in range(each)])
    return Channels(atoms, value.axis, value.ndim, spread=each > 1)


def _weights(flow: ChannelFlow, layer: Layer, incoming: Atoms) -> Atoms:
    """Let the weight follow the input array; the output array, which weight and bias follow."""
    if isinstance(layer, nn.Linear):
        outgoing = flow.new(layer.out_features)
        flow.follow(layer.weight, 1, incoming)
    elif isinstance(layer, _ConvTransposeNd):
        return _transposed(flow, layer, incoming)
    elif 1 < layer.groups == layer.in_channels:
        each = layer.out_channels // layer.groups
        outgoing = flow.array([atom for atom in incoming for _ in range(each)])
    else:
        outgoing = flow.new(layer.out_channels)
        _blocks(flow, incoming, layer.groups)
        _blocks(flow, outgoing, layer.groups)
        flow.follow(layer.weight, 1, incoming, layer.groups)
    flow.follow(layer.weight, 0, outgoing)
    flow.follow(layer.bias, 0, outgoing)
    return outgoing


def _transposed(flow: ChannelFlow, layer: _ConvNd, incoming: Atoms) -> Atoms:
    outgoing = flow.new(layer.out_channels)
    if layer.groups > 1:
        why = Fixed(Reason.TRANSPOSED, "meet a transposed conv with groups")
        flow.fix(incoming + outgoing, why)
        return outgoing
    flow.follow(layer.weight, 0, incoming)
    flow.follow(layer.weight, 1, outgoing)
    flow.follow(layer.bias, 0, outgoing)
    return outgoing


def _blocks(flow: ChannelFlow, atoms: Atoms, groups: int) -> None:
    """Keep the channels of each group of a grouped operation together."""
    if groups > 1:
        size = len(atoms) // groups
        for start in range(0, len(atoms), size):
            flow.array(atoms[start : start + size])
