"""What the commands of the command line do: options in, an answer out."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spre_fx.api import finalize, prepare
from spre_fx.audit import audit
from spre_fx.comparison import diff
from spre_fx.costs import cost as count_cost
from spre_fx.demo import run as run_demo
from spre_fx.errors import ModelError, OptionError
from spre_fx.inspection import site_table, sites
from spre_fx.loading import load_file, load_model
from spre_fx.plots import plot_spatial_sparsity
from spre_fx.schedules import EveryK, Freeze, Schedule

_ABOUT_WEIGHTS = "\n\nThe weights are as the model makes them; live taps are those of its weights."


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        text: For people.
        data: The same for machines: what JSON can hold.
        failed: Whether a verification failed.
    """

    text: str
    data: object
    failed: bool = False


def inspect(options: Namespace) -> Answer:
    """Sites and diff of a model, without training it."""
    model = load_model(options.model, pretrained=options.pretrained)
    prepared = _prepare(model, options)
    change = diff(model, prepared)
    text = (
        f"Sites\n\n{site_table(prepared)}\n\n"
        f"From the dense model to the training graph\n\n{change.text(nodes=options.nodes)}"
    )
    text += _ABOUT_WEIGHTS * (not options.pretrained)
    return Answer(text, {"sites": [asdict(s) for s in sites(prepared)], "diff": asdict(change)})


def cost(options: Namespace) -> Answer:
    """Parameters and FLOPs of the prepared model."""
    model = load_model(options.model, pretrained=options.pretrained)
    counted = count_cost(_prepare(model, options), torch.empty(options.input))
    text = f"{counted}{_ABOUT_WEIGHTS * (not options.pretrained)}"
    return Answer(text, counted.to_dict())


def plot(options: Namespace) -> Answer:
    """The picture of spatial sparsity."""
    models = {}
    for argument in options.models:
        label, _, name = argument.rpartition("=")
        models[label or Path(name).stem] = _model_or_file(name, options)
    drawn = models if len(models) > 1 else next(iter(models.values()))
    figure = plot_spatial_sparsity(drawn)
    try:
        figure.savefig(options.output)
    except ValueError as error:
        raise OptionError(f"--output {options.output}: {error}.") from error
    return Answer(f"wrote {options.output}", {"picture": str(options.output)})


def verify(options: Namespace) -> Answer:
    """Check a saved model layer by layer."""
    content = load_file(options.checkpoint, trust=options.trust)
    if not isinstance(content, nn.Module):
        if options.model is None:
            raise OptionError(
                f"{options.checkpoint}: holds a state_dict; expected --model, and the options it "
                "was prepared with, to know its layers and patterns."
            )
        content = _fill(load_model(options.model), content, options)
    found = audit(content)
    return Answer(str(found), found.to_dict(), failed=not found.ok)


def demo(options: Namespace) -> Answer:
    """The digits example."""
    results = run_demo(
        options.pattern, options.epochs, options.seed, options.output, quiet=options.json
    )
    return Answer(f"Results\n=======\n{results}", results.to_dict())


def _prepare(model: nn.Module, options: Namespace, schedule: Schedule | None = None) -> nn.Module:
    return prepare(
        model,
        options.pattern,
        method=options.method,
        branch=None if options.branch == "none" else options.branch,
        exclude=options.exclude,
        overrides=dict(options.override),
        schedule=schedule,
    )


def _model_or_file(name: str, options: Namespace) -> nn.Module:
    if not Path(name).is_file():
        return _prepare(load_model(name, pretrained=options.pretrained), options)
    content = load_file(Path(name), trust=options.trust)
    if not isinstance(content, nn.Module):
        raise OptionError(f"{name}: expected a prepared model, found a state_dict.")
    return content


def _fill(dense: nn.Module, state: dict[str, Tensor], options: Namespace) -> nn.Module:
    """The prepared or the deployed kind of a model, whichever the state is of, holding it."""
    prepared = _prepare(dense, options, _schedule(state))
    model = prepared if set(state) == set(prepared.state_dict()) else finalize(prepared, "dense")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        kinds = {"prepared": prepared, "deployed": model}
        differ = {
            kind: sorted(set(state) ^ set(graph.state_dict())) for kind, graph in kinds.items()
        }
        kind, names = min(differ.items(), key=lambda item: len(item[1]))
        guilty = ", ".join(names[:3]) if names else str(error)
        raise ModelError(
            f"{options.checkpoint}: expected the state_dict of {options.model} at "
            f"{options.pattern}, found one that differs from the {kind} model in {guilty}. "
            "Give the options the model was prepared with."
        ) from error
    return model


def _schedule(state: dict[str, Any]) -> Schedule | None:
    """A schedule with the same entries in the state_dict as the one it was trained with."""
    if "mask_schedule.step" in state:
        return EveryK(1)
    return Freeze(at=0) if any(name.endswith("nm_mask.mask") for name in state) else None
