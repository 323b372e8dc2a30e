"""What a pass is: options in, a new graph out, and an account of every candidate.

A candidate is a conv or linear of the model. Each pass puts each candidate in exactly one of
applied and skipped, and a skip says why.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch.fx import GraphModule

from spre_fx.errors import InvariantError
from spre_fx.passes.graph_view import GraphView


class Reason(str, Enum):
    """Why a pass left a candidate as it was."""

    ALREADY_DONE = "already done"
    BN_CALLED_TWICE = "batch norm called more than once"
    BN_NO_STATISTICS = "batch norm without running statistics"
    BN_UNKNOWN = "batch norm of an unknown kind"
    BEST_ORDER = "best order already"
    CALLED_TWICE = "called more than once"
    CHANNELS_MIXED = "channels may be mixed"
    CUSTOM_FORWARD = "subclass with its own forward"
    DEPTHWISE = "depthwise"
    EXCLUDED = "excluded"
    FEW_CHANNELS = "fewer input channels than M"
    FUNCTIONAL = "functional call"
    HAS_HOOKS = "has hooks"
    KERNEL_1X1 = "1x1 kernel"
    LINEAR = "linear"
    MODEL_INPUT = "channels of the model's input"
    MODEL_OUTPUT = "channels of the model's output"
    NO_BN = "no batch norm"
    NO_EPILOGUE = "nothing follows that it could take up"
    NOT_CALLED = "never called"
    NOT_LOWERED = "runs dense"
    NOT_SPARSE = "not sparse"
    ONE_GROUP = "nothing to exchange between groups"
    OPAQUE = "inside a module kept whole"
    OUTSIDE = "called from code without a graph"
    OTHER_USERS = "output has other users"
    PARAMETRISED = "parametrised weight"
    REFUSED = "refused by the backend"
    SHARED_PARAMETER = "parameter shared"
    SPANS_FEATURES = "channel spans several features"
    TRANSPOSED = "transposed conv"
    USED_IN_EVALUATION = "used in evaluation"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass left as it was.

    Attributes:
        reason: One of a closed list.
        detail: A sentence with the guilty value.
    """

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Account:
    """What a pass did, candidate by candidate.

    Attributes:
        applied: Candidates that were rewritten.
        skipped: The others, with the reason.
    """

    applied: tuple[str, ...]
    skipped: Mapping[str, Skip]


@dataclass(frozen=True)
class PassResult:
    """A new graph and the account of how it came to be.

    Attributes:
        graph_module: The rewritten copy; the input of the pass is untouched.
        account: What was applied and what was skipped.
    """

    graph_module: GraphModule
    account: Account


class Pass(ABC):
    """A rewrite of a GraphModule. Subclasses are frozen dataclasses: their fields, its options."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Rewrite a copy of `graph_module`.

        Raises:
            InvariantError: If the graph breaks a rule before or after the rewrite.
        """
        result = self.run_in_place(copy.deepcopy(graph_module))
        result.graph_module.recompile()
        return result

    def run_in_place(self, graph_module: GraphModule) -> PassResult:
        """Rewrite `graph_module` itself. For pipelines, which copy and recompile once for all."""
        candidates = GraphView(graph_module).candidates
        self.requires(graph_module)
        account = self.rewrite(graph_module)
        self._check_account(account, set(candidates))
        graph_module.graph.lint()
        self.ensures(graph_module)
        return PassResult(graph_module, account)

    def requires(self, graph_module: GraphModule) -> None:  # noqa: B027
        """Raise InvariantError unless the pass can run on this graph. Default: it always can."""

    @abstractmethod
    def rewrite(self, graph_module: GraphModule) -> Account:
        """Edit the graph and account for every candidate."""

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: B027
        """Raise InvariantError unless the result is what the pass promises."""

    def _check_account(self, account: Account, candidates: set[str]) -> None:
        applied, skipped = set(account.applied), set(account.skipped)
        for wrong, what in (
            (applied & skipped, "both applied and skipped"),
            (candidates - applied - skipped, "neither applied nor skipped"),
            ((applied | skipped) - candidates, "accounted for, but no conv or linear of the graph"),
        ):
            if wrong:
                raise InvariantError(
                    f"{type(self).__name__}: {', '.join(sorted(wrong))}: {what}. Expected every "
                    "conv and linear in exactly one of applied and skipped. This is a bug of the "
                    "pass."
                )
