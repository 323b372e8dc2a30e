"""Finds conv -> BN sites in a graph, and says of every other conv why it is not one.

Analysis only: nothing here edits a graph. The pattern is an edge conv -> BN of the dataflow graph,
or a chain of identities and views between the two; the predicates on it are the conditions under
which a parallel branch can be added after the BN, and later folded back (Eq. 9, 10).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spre_fx.batch_norm import has_statistics, is_batch_norm
from spre_fx.modules import SPARSIFIABLE, NMLayer, SpReConv
from spre_fx.passes.base import Reason, Skip
from spre_fx.passes.chains import Chain, follow, is_identity, repeats
from spre_fx.passes.functional_calls import BATCH_NORM, read_call
from spre_fx.passes.graph_view import Candidate, GraphView, input_of
from spre_fx.subclasses import has_hooks, own_method


@dataclass(frozen=True)
class SpReBranch:
    """The second term of Eq. 9 in a graph.

    Attributes:
        conv: The node of `conv_spre`.
        bn: The node of `bn_spre`.
        add: The node that sums the two branches.
        layer: The module `conv` calls.
        norm: The module `bn` calls.
    """

    conv: Node
    bn: Node
    add: Node
    layer: SpReConv
    norm: nn.Module


@dataclass(frozen=True)
class Site:
    """A conv with the BN that follows it.

    Attributes:
        name: The conv's qualified name.
        conv: The conv's only call.
        chain: The identities and views between the two, in order.
        bn: The BN's only call.
        layer: The module `conv` calls.
        norm: The module `bn` calls.
        spre: The SpRe branch, where there is one.
    """

    name: str
    conv: Node
    chain: tuple[Node, ...]
    bn: Node
    layer: _ConvNd
    norm: nn.Module
    spre: SpReBranch | None

    @property
    def end(self) -> Node:
        """The node that carries the output of the site."""
        return self.bn if self.spre is None else self.spre.add


def match_site(view: GraphView, candidate: Candidate) -> Site | Skip:
    """The conv -> BN site that starts at `candidate`, or the reason why there is none."""
    for reason, refuse in _PREDICATES:
        detail = refuse(view, candidate)
        if detail is not None:
            return Skip(reason, f"{candidate.name}: {detail}")
    (conv,) = candidate.calls
    bn, norm = _bn(view, candidate)
    layer = candidate.module
    assert isinstance(layer, _ConvNd)
    chain = _chain(view, candidate).nodes
    return Site(candidate.name, conv, chain, bn, layer, norm, _spre_branch(view, conv, chain, bn))


def _spre_branch(
    view: GraphView, conv: Node, chain: tuple[Node, ...], bn: Node
) -> SpReBranch | None:
    for add in view.users(bn):
        if add.target is not operator.add or len(view.users(bn)) != 1:
            continue
        for bn_spre in view.producers(add):
            norm = view.module_of(bn_spre)
            if norm is None or not has_statistics(norm) or len(view.users(bn_spre)) != 1:
                continue
            conv_spre = _behind(view, chain, input_of(bn_spre))
            layer = None if conv_spre is None else view.module_of(conv_spre)
            if conv_spre is None or not isinstance(layer, SpReConv):
                continue
            if input_of(conv_spre) is input_of(conv):
                return SpReBranch(conv_spre, bn_spre, add, layer, norm)
    return None


def steps(view: GraphView, chain: tuple[Node, ...]) -> list[Node]:
    """The part of a chain that the SpRe branch repeats."""
    return [node for node in chain if not is_identity(view, node)]


def _behind(view: GraphView, chain: tuple[Node, ...], value: Node) -> Node | None:
    """What makes the value that comes out of a repetition of `chain` as `value`."""
    for step in reversed(steps(view, chain)):
        if len(view.users(value)) != 1 or not repeats(value, step):
            return None
        value = value.all_input_nodes[0]
    return value if len(view.users(value)) == 1 else None


# Each predicate returns the guilty value in words, or None when it has nothing against the site.
# They run in this order, so a later one may rely on what an earlier one has established.


def _not_called(_: GraphView, candidate: Candidate) -> str | None:
    if candidate.inside is not None:
        return f"is run by {candidate.inside}, which is kept whole"
    return None if candidate.calls else "is never called in the traced forward"


def _functional(_: GraphView, candidate: Candidate) -> str | None:
    return "is a functional call, not a module" if candidate.module is None else None


def _linear(_: GraphView, candidate: Candidate) -> str | None:
    return (
        "a linear layer has no taps, no SpRe branch"
        if isinstance(candidate.module, nn.Linear)
        else None
    )


def transposed(_: GraphView, candidate: Candidate) -> str | None:
    """What is wrong with a transposed conv."""
    if not isinstance(candidate.module, _ConvTransposeNd):
        return None
    return f"{type(candidate.module).__name__} sums over output channels, not in groups of inputs"


def custom_forward(_: GraphView, candidate: Candidate) -> str | None:
    """What is wrong with a conv or linear of a class whose forward is its own."""
    module = candidate.module
    if module is None or isinstance(module, NMLayer):
        return None
    kind = type(module).__name__
    base = next((known for known in SPARSIFIABLE if isinstance(module, known)), None)
    if base is None:
        return f"{kind} is a subclass of a conv, whose forward may differ"
    method = own_method(module, base, state=True)
    if method is None:
        return None
    return (
        f"{kind} is a subclass of nn.{base.__name__}, whose {method} may differ. One that comes "
        f"down to a single functional call on its own weight and bias is looked through"
    )


def parametrised(_: GraphView, candidate: Candidate) -> str | None:
    """What is wrong with a layer whose weight or bias is made anew at every use."""
    parameters = {} if candidate.module is None else candidate.module._parameters
    for name in ("weight", "bias"):
        if candidate.module is not None and name not in parameters:
            return (
                f"its {name} is computed from other parameters (weight norm or another "
                "parametrisation). Remove that first to make the layer sparse"
            )
    return None


def _called_twice(_: GraphView, candidate: Candidate) -> str | None:
    count = len(candidate.calls)
    return f"is called {count} times" if count > 1 else None


def _hooks(_: GraphView, candidate: Candidate) -> str | None:
    module = candidate.module
    if module is None or not has_hooks(module) or _has_branch(module):
        return None
    return "carries hooks, which see what it computes alone: no SpRe branch, and nothing is folded"


def _has_branch(module: nn.Module | None) -> bool:
    """Whether a conv has its SpRe branch already, so that a hook came later and is of training."""
    return isinstance(module, NMLayer) and module.live_taps is not None


def _read_elsewhere(view: GraphView, candidate: Candidate) -> str | None:
    return None if candidate.module is None else view.read_elsewhere(candidate.module)


def _chain(view: GraphView, candidate: Candidate) -> Chain:
    layer, call = candidate.module, candidate.calls[0]
    assert isinstance(layer, _ConvNd)
    if call not in view.chains:
        view.chains[call] = follow(view, call, layer)
    found: Chain = view.chains[call]
    return found


def _other_users(view: GraphView, candidate: Candidate) -> str | None:
    users = _chain(view, candidate).users
    if len(users) == 1:
        return None
    if not users:
        return "has an output that nothing uses"
    return f"has an output that {len(users)} nodes use ({', '.join(user.name for user in users)})"


def _no_bn(view: GraphView, candidate: Candidate) -> str | None:
    (user,) = _chain(view, candidate).users
    module = view.module_of(user)
    if module is not None and (is_batch_norm(module) or _is_unknown_batch_norm(module)):
        return None
    if user.target is BATCH_NORM:
        call = read_call(view.graph_module, user)
        why = call if isinstance(call, str) else "which is no module yet"
        return f"feeds {user.name}, a functional batch norm: {why}. Use an nn.BatchNorm2d"
    what = "the output" if user.op == "output" else type(module).__name__ if module else user.name
    return f"feeds {what}, not a batch norm"


def _bn(view: GraphView, candidate: Candidate) -> tuple[Node, nn.Module]:
    (bn,) = _chain(view, candidate).users
    module = view.module_of(bn)
    assert module is not None
    return bn, module


def _is_unknown_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and not is_batch_norm(module)


def _bn_unknown(view: GraphView, candidate: Candidate) -> str | None:
    bn, module = _bn(view, candidate)
    if is_batch_norm(module):
        return None
    return f"is followed by {bn.target}, a {type(module).__name__}, which is no known batch norm"


def _bn_called_twice(view: GraphView, candidate: Candidate) -> str | None:
    bn, module = _bn(view, candidate)
    count = len(view.calls[id(module)])
    return f"is followed by {bn.target}, which is called {count} times" if count > 1 else None


def _bn_shares_parameters(view: GraphView, candidate: Candidate) -> str | None:
    bn, module = _bn(view, candidate)
    shared = view.shared(module)
    return None if shared is None else f"is followed by {bn.target}: {shared}"


def _bn_read_elsewhere(view: GraphView, candidate: Candidate) -> str | None:
    bn, module = _bn(view, candidate)
    read = view.read_elsewhere(module)
    return None if read is None else f"is followed by {bn.target}: {read}"


def _bn_hooks(view: GraphView, candidate: Candidate) -> str | None:
    bn, module = _bn(view, candidate)
    if not has_hooks(module) or _has_branch(candidate.module):
        return None
    return f"is followed by {bn.target}, which carries hooks: no SpRe branch, nothing is folded"


def _bn_no_statistics(view: GraphView, candidate: Candidate) -> str | None:
    bn, module = _bn(view, candidate)
    if has_statistics(module):
        return None
    return f"is followed by {bn.target}, which has no running statistics"


_PREDICATES: tuple[tuple[Reason, Callable[[GraphView, Candidate], str | None]], ...] = (
    (Reason.NOT_CALLED, _not_called),
    (Reason.FUNCTIONAL, _functional),
    (Reason.LINEAR, _linear),
    (Reason.TRANSPOSED, transposed),
    (Reason.PARAMETRISED, parametrised),
    (Reason.CUSTOM_FORWARD, custom_forward),
    (Reason.CALLED_TWICE, _called_twice),
    (Reason.HAS_HOOKS, _hooks),
    (Reason.SHARED_PARAMETER, _read_elsewhere),
    (Reason.OTHER_USERS, _other_users),
    (Reason.NO_BN, _no_bn),
    (Reason.BN_UNKNOWN, _bn_unknown),
    (Reason.BN_CALLED_TWICE, _bn_called_twice),
    (Reason.SHARED_PARAMETER, _bn_shares_parameters),
    (Reason.SHARED_PARAMETER, _bn_read_elsewhere),
    (Reason.BN_NO_STATISTICS, _bn_no_statistics),
    (Reason.HAS_HOOKS, _bn_hooks),
)
