"""`prepare` before training, `finalize` after."""

from __future__ import annotations

import functools
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from spre_fx import records
from spre_fx.checks import check_model, check_tensors, is_prepared
from spre_fx.criteria import SNIP, Criterion, GraSP, Taylor
from spre_fx.errors import ModelError, OptionError
from spre_fx.granet import GraNet
from spre_fx.inspection import uncalled_layers
from spre_fx.lbc import LBC
from spre_fx.lowering import BackendName, check_backend, lower_in_place
from spre_fx.methods import ASP, SRSTE, MaskMethod
from spre_fx.modules import MaskSchedule, NMLayer
from spre_fx.passes.base import Account, Reason
from spre_fx.passes.edit import add_module, copy_model
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.pipeline import deployment_pipeline, training_pipeline
from spre_fx.passes.policy import Policy
from spre_fx.passes.regions import Region, assemble, divide, find_regions
from spre_fx.patterns import Pattern
from spre_fx.ranks import keep_masks_from_ddp
from spre_fx.schedules import Schedule
from spre_fx.spatial_mask import SpRe
from spre_fx.unstructured import GMP, RigL, UnstructuredMethod
from spre_fx.weight_criteria import Change, RunningMean, WeightCriterion

CriterionName: TypeAlias = Literal["magnitude", "running-mean", "change", "taylor", "snip", "grasp"]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_collector(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Hold Python's garbage collector while a function runs, which makes nodes by the thousand.

    It would look at all of them again and again: a third of the time at 10,000 sites.
    """

    @functools.wraps(function)
    def held(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return held


@_without_collector
def prepare(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    *,
    method: Literal["sr-ste", "asp", "lbc", "gmp", "rigl", "granet"] | MaskMethod = "sr-ste",
    branch: Literal["auto", "spre", "same", "inverse", "random"] | SpRe | None = "auto",
    exclude: str | type[nn.Module] | Sequence[str | type[nn.Module]] = (),
    overrides: Mapping[str, str | Pattern | None] | None = None,
    schedule: Schedule | None = None,
    spre_gamma: float | None = None,
    criterion: CriterionName | Criterion | WeightCriterion = "magnitude",
    depthwise: Literal["flat"] | None = None,
    compute: Literal["auto", "dense"] = "auto",
) -> nn.Module:
    """Make a model ready for N:M sparse training with Spatial Re-parameterization.

    Convs and linears become N:M sparse; each conv with a kernel of more than one tap and a batch
    norm behind it gets a parallel SpRe branch (Algorithm 1 of Zhang et al., 2306.05612v3). What
    stays dense, and why, is in `spre_fx.sites(result)`. Build the optimizer from the result.

    A model that `torch.fx` can follow becomes one GraphModule. Of any other, the largest parts that
    it can follow become GraphModules, in a copy of the model whose own code runs the rest: a conv
    and a batch norm that this code calls one by one get no SpRe branch.

    Parameters and buffers keep their names: a dense checkpoint loads into the result with only the
    keys of the SpRe branches, and of masks that are kept between steps, missing. Random numbers for
    the new branches come from torch's global generator. `torch.func` and `vmap` over the result are
    out of scope.

    Args:
        model: The model. Never modified.
        pattern: "N:M": at most N non-zeros in every M consecutive input channels.
        method: "sr-ste" or "lbc" to train from scratch, "asp" to fine-tune pre-trained weights, or
            a `MaskMethod`. "gmp", "rigl" and "granet" are unstructured baselines: single weights
            are zeroed, at the sparsity 1 - N/M, in the layers the pattern could go on.
        branch: "spre", None for the plain N:M method, or an ablation: "same" for B^S = B, "inverse"
            for B at the taps that are not live (both Fig. 5), "random" for B at as many taps as are
            live. (The paper's sentence on Inverse repeats the rule of SpRe itself; it is taken to
            mean the complement.) A `SpRe` has more options. "auto" is "spre" for N:M methods, and
            None for unstructured ones, which can have no branch.
        exclude: Layers to leave dense: names, globs, or module types. The name of a module with
            layers inside excludes them all.
        overrides: Name or glob -> another pattern, or None for dense. The last match wins.
        schedule: At which training forwards the masks are recomputed. Default: the method's, which
            is every one for SR-STE and the first for ASP. LBC, GMP and GraNet need a `CubicRamp`,
            RigL a `Freeze` around an `EveryK`.
        spre_gamma: Starting value of gamma of the SpRe branch's batch norm. Default: the method's,
            1 from scratch and 0 on pre-trained weights, where the network then computes at the
            first step what N:M alone computes. The 0 is our deviation; the paper starts at random.
        criterion: How B^U is chosen, and with it the live taps: by the magnitude of the weights, by
            its "running-mean", or by their "change" since the first step. "taylor", "snip" and
            "grasp" need gradients: call `spre_fx.update_taps` in the training loop. Until its first
            call taps are those of magnitude.
        depthwise: What becomes of depthwise convs, whose filters have a single input channel to
            group. None: they stay dense. "flat": they are sparsified as in Tables 4 and 5 of the
            paper, in groups of M consecutive weights in the order (C_out, *kernel), which straddle
            taps and filters, as the published code of SR-STE (Zhou et al., 2021) groups any weight.
            For reproducing those tables: no sparse op computes such a layer, so `finalize` leaves
            it an ordinary one.
        compute: How masked 2d convs compute in training. "auto": on a CPU, in float32 or float64,
            with the weights their masks keep alone, in each pass where that is expected to be
            faster; elsewhere, and with "dense", as ordinary convs whose weights hold zeros. Both
            compute the same, but for rounding.

    Returns:
        A GraphModule, or a copy of `model` with GraphModules inside, in its training mode and on
        its device.

    Raises:
        PatternError: If a pattern is not one.
        OptionError: If an option makes no sense, such as a glob that matches nothing.
        ModelError: If there is nothing to sparsify, or the model is prepared already, quantised,
            uninitialised, on the meta device, or holds values that are not finite.
    """
    if compute not in ("auto", "dense"):
        raise OptionError(f'expected compute="auto" or "dense", found {compute!r}.')
    mask_method = _method(method)
    spre = _branch(branch, mask_method)
    mask_schedule = mask_method.schedule if schedule is None else schedule
    scores = _criterion(criterion, spre)
    policy = Policy(
        pattern=Pattern.parse(pattern),
        exclude=_by_name(model, (exclude,) if isinstance(exclude, str | type) else exclude),
        overrides={
            rule: None if other is None else Pattern.parse(other)
            for rule, other in (overrides or {}).items()
        },
        depthwise=depthwise,
    )
    patterns = {policy.pattern, *policy.overrides.values()} - {None}
    mask_method.check([p for p in patterns if p is not None], mask_schedule)
    check_model(model)
    if is_prepared(model):
        raise ModelError(
            "expected a dense model, found one that `prepare` has prepared. Train it and finalize "
            "it, or prepare the dense model again with the other options."
        )
    root = copy_model(model)
    regions = divide(root)
    policy.check(*(GraphView(region.graph_module) for region in regions))
    counted = mask_schedule.counts_steps or (spre is not None and spre.needs_memory(scores))
    clock = _clock(root, regions, mask_method, mask_schedule, counted=counted)
    accounts = []
    for region in regions:
        passes = training_pipeline(
            policy,
            mask_method,
            mask_schedule,
            branch=spre,
            gamma=mask_method.spre_gamma if spre_gamma is None else spre_gamma,
            criterion=scores,
            clock=clock,
            sparse=compute == "auto",
        )
        accounts.append(passes.run_in_place(region.graph_module)[1][passes.index_of_masks])
        clock = clock or _schedule_in(region.graph_module, shared=len(regions) > 1)
    _check_any_sparse(accounts)
    _note_callers(regions)
    prepared = assemble(root, regions)
    _warn_of_uncalled(model, prepared)
    keep_masks_from_ddp(prepared)
    return prepared


@_without_collector
def finalize(
    prepared: nn.Module,
    backend: BackendName = "auto",
    *,
    example_inputs: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Turn a trained model into one N:M conv per site (Eq. 10), proved, and lowered to run fast.

    Batch norms are folded with their running statistics, whatever mode the model is in. Each merged
    kernel is checked against its pattern, and against the outputs of the branches it replaces.

    Each N:M layer then becomes what runs it fastest: a sparse kernel of the backend, or the dense
    layer where that is faster. With `example_inputs` this is measured on every layer's real input,
    with as many images of a batch as run together, and kept for the next time (`spre_fx.choice`);
    without, a rule predicts it. `sites` and `diff` say what was chosen and why. A model with sparse
    kernels is for inference: its parameters no longer require gradients.

    Args:
        prepared: What `prepare` returned, trained, or a module that holds it, such as a
            LightningModule. DistributedDataParallel, AveragedModel and what torch.compile returns
            stand for the model inside. Never modified.
        backend: What N:M layers are lowered to. "cpu": the packed kernels of the CPU engine.
            "cuda": sparse kernels of an NVIDIA GPU. "dense": ordinary torch layers that hold N:M
            weights. "auto": that of the model's device, dense where there is none. Where the CPU
            engine was not built, "cpu" warns and everything runs dense.
        example_inputs: What the model is called with, or a tuple of its positional arguments, of
            the shapes that matter.
        dtype: The type the deployed model computes in, such as torch.bfloat16, after a fold in
            float64. Default: that of `prepared`.

    Returns:
        A GraphModule in evaluation mode; a copy of `prepared` with GraphModules inside where
        `prepared` is no GraphModule.

    Raises:
        OptionError: If there is no such backend, or it cannot run on the model's device.
        ModelError: If the model was never prepared, holds values that are not finite, or does not
            run on the example inputs.
        VerificationError: If a merged layer breaks its pattern or differs from its branches.
    """
    check_backend(backend)
    prepared = _unwrapped(prepared)
    if not isinstance(prepared, nn.Module) or not is_prepared(prepared):
        raise ModelError(
            f"expected the trained result of `prepare`, found a {type(prepared).__name__} without "
            "N:M layers in training. Call prepare before training; a deployed model is final."
        )
    check_tensors(prepared)
    root = copy_model(prepared)
    regions = find_regions(root)
    passes = deployment_pipeline()
    for region in reversed(regions):  # inner ones first: an outer one must hold no branches
        passes.run_in_place(region.graph_module)
    deployed = assemble(root, regions)
    _remove_clock(deployed)
    return lower_in_place(deployed, backend, example_inputs, dtype, stacklevel=4)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that a wrapper of torch around it trains or averages."""
    if isinstance(model, DistributedDataParallel | AveragedModel):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)  # its type would import the compiler
    return model if compiled is None else _unwrapped(compiled)


def _clock(
    root: nn.Module,
    regions: list[Region],
    method: MaskMethod,
    schedule: Schedule,
    *,
    counted: bool,
) -> MaskSchedule | None:
    """What counts the forwards of a model that is no graph, which could do it, but has graphs."""
    if not regions or (len(regions) == 1 and regions[0].names == ("",)):
        return None
    if isinstance(method, UnstructuredMethod):
        raise ModelError(
            f"method={type(method).__name__}: expected a model that torch.fx can follow whole, "
            "since such a method looks at all its layers at once, found "
            f"{type(root).__name__}, which it can follow in parts only. Choose an N:M method."
        )
    if not counted or any(region.names == ("",) for region in regions):
        return None
    device = next(root.parameters()).device
    clock = MaskSchedule(schedule, method).to(device).train(root.training).remember()
    add_module(root, "mask_schedule", clock)
    root.register_forward_pre_hook(clock.tick)
    return clock


def _schedule_in(graph_module: GraphModule, *, shared: bool) -> MaskSchedule | None:
    """The schedule of the graph around all others, which are to follow it."""
    found = next((m for m in graph_module.modules() if isinstance(m, MaskSchedule)), None)
    return found.remember() if found is not None and shared else found


def _remove_clock(model: nn.Module) -> None:
    """What `_clock` added to a model, now a part of `model` or all of it."""
    for name, clock in list(model.named_modules()):
        if isinstance(clock, MaskSchedule):
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            delattr(owner, leaf)
            for number, hook in list(owner._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is clock:
                    del owner._forward_pre_hooks[number]


def _note_callers(regions: list[Region]) -> None:
    """Say of sparse layers that are called from outside of any graph why they got no branch."""
    for region in regions:
        for name, layer in region.graph_module.named_modules():
            if region.caller is not None and isinstance(layer, NMLayer):
                records.note(layer, Reason.OUTSIDE, f"{name}: is called by {region.caller}")


def _method(method: str | MaskMethod) -> MaskMethod:
    if isinstance(method, MaskMethod):
        return method
    known: dict[str, type[MaskMethod]] = {
        "sr-ste": SRSTE,
        "asp": ASP,
        "lbc": LBC,
        "gmp": GMP,
        "rigl": RigL,
        "granet": GraNet,
    }
    if method not in known:
        raise OptionError(f"method={method!r}: expected one of {list(known)} or a MaskMethod.")
    return known[method]()


def _by_name(
    model: nn.Module, rules: Sequence[str | type[nn.Module]]
) -> tuple[str | type[nn.Module], ...]:
    """The rules with each module type replaced by the names of its modules: a trace has no types.

    A type without modules stays, to be refused as one that nothing answers to.
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    found: list[str | type[nn.Module]] = []
    for rule in rules:
        names = [
            n for n, m in modules.items() if n and isinstance(rule, type) and isinstance(m, rule)
        ]
        found += names or [rule]
    return tuple(found)


def _branch(branch: str | SpRe | None, method: MaskMethod) -> SpRe | None:
    unstructured = isinstance(method, UnstructuredMethod)
    if branch is None or (branch == "auto" and unstructured):
        return None
    if unstructured:
        raise OptionError(
            f"branch={branch!r}: expected None with {type(method).__name__}, whose masks are "
            "unstructured: a SpRe branch repairs the spatial sparsity of N:M masks."
        )
    known = {
        "auto": SpRe(),
        "spre": SpRe(),
        "same": SpRe("same"),
        "inverse": SpRe("inverse"),
        "random": SpRe("random"),
    }
    if isinstance(branch, SpRe):
        return branch
    if branch not in known:
        raise OptionError(f"branch={branch!r}: expected one of {list(known)}, a SpRe or None.")
    return known[branch]


def _criterion(
    criterion: str | Criterion | WeightCriterion, spre: SpRe | None
) -> Criterion | WeightCriterion | None:
    known: dict[str, Callable[[], Criterion | WeightCriterion] | None] = {
        "magnitude": None,
        "running-mean": RunningMean,
        "change": Change,
        "taylor": Taylor,
        "snip": SNIP,
        "grasp": GraSP,
    }
    if isinstance(criterion, Criterion | WeightCriterion):
        chosen: Criterion | WeightCriterion | None = criterion
    elif criterion in known:
        kind = known[criterion]
        chosen = None if kind is None else kind()
    else:
        raise OptionError(
            f"criterion={criterion!r}: expected one of {list(known)}, a Criterion or a "
            "WeightCriterion."
        )
    if chosen is not None and (spre is None or spre.taps == "same"):
        raise OptionError(
            f"criterion={criterion!r}: expected branch='spre' or 'inverse', found "
            f"{spre and spre.taps!r}, which has no taps to choose."
        )
    if isinstance(chosen, Criterion) and spre is not None and spre.needs_memory(None):
        raise OptionError(
            f"criterion={criterion!r}: expected neither hysteresis, nor narrow, nor random taps, "
            f"found {spre}: `update_taps` sets the taps of this criterion by its scores alone."
        )
    return chosen


def _warn_of_uncalled(model: nn.Module, prepared: nn.Module) -> None:
    uncalled = uncalled_layers(model, prepared)
    if uncalled:
        warnings.warn(
            f"{type(model).__name__} has layers that its forward never calls, and the result "
            f"leaves out: {', '.join(uncalled)}.",
            stacklevel=4,  # of the caller of prepare
        )


def _check_any_sparse(accounts: list[Account]) -> None:
    if any(account.applied for account in accounts):
        return
    skipped = {name: skip for account in accounts for name, skip in account.skipped.items()}
    counts = Counter(str(skip.reason) for skip in skipped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    raise ModelError(
        f"nothing to sparsify: expected a conv or linear that can carry the pattern, found "
        f"{reasons or 'no conv or linear at all'}."
    )
