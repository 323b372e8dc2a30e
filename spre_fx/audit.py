"""Whether a saved model is what it claims to be: its layers N:M, and finalizable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from spre_fx import masks, records
from spre_fx.api import finalize
from spre_fx.dense_form import dense_view
from spre_fx.errors import ModelError, VerificationError
from spre_fx.modules import Layer, NMLayer
from spre_fx.patterns import Pattern


@dataclass(frozen=True)
class LayerAudit:
    """One N:M layer.

    Attributes:
        name: Its qualified name.
        stage: "prepared" for its weights under the mask, "deployed" for those after folding.
        pattern: The N:M pattern it claims.
        most: The most non-zeros found in a group of M.
        density: Non-zeros over all weights.
    """

    name: str
    stage: str
    pattern: str
    most: int
    density: float

    @property
    def ok(self) -> bool:
        """Whether no group has more than N."""
        return self.most <= Pattern.parse(self.pattern).n


@dataclass(frozen=True)
class Audit:
    """What was found. Print it, or take `to_dict()`.

    Attributes:
        layers: Every N:M layer; those of a prepared model once more as finalized.
        error: Why a prepared model could not be finalized, or None.
    """

    layers: tuple[LayerAudit, ...]
    error: str | None

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return self.error is None and all(layer.ok for layer in self.layers)

    def __str__(self) -> str:
        headers = ("layer", "stage", "pattern", "most non-zeros of M", "density", "obeys")
        rows = [
            (
                layer.name,
                layer.stage,
                layer.pattern,
                layer.most,
                f"{layer.density:.4g}",
                "yes" if layer.ok else "NO",
            )
            for layer in self.layers
        ]
        table = tabulate(rows, headers, disable_numparse=True)
        return f"{table}\n\n{self._verdict()}"

    def _verdict(self) -> str:
        broken = sum(not layer.ok for layer in self.layers)
        lines = [f"{broken} of {len(self.layers)} layers break their pattern."]
        if self.error is not None:
            lines.append(f"finalize failed: {self.error}")
        elif any(layer.stage == "prepared" for layer in self.layers):
            lines.append("finalize succeeded: every folded layer computes what its branches did.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        layers = [asdict(layer) | {"ok": layer.ok} for layer in self.layers]
        return {"ok": self.ok, "layers": layers, "error": self.error}


def audit(model: nn.Module) -> Audit:
    """Check the pattern of every N:M layer from its zeros, and finalize a prepared model.

    Args:
        model: A prepared or deployed model. Never modified.

    Raises:
        ModelError: If the model has no N:M layer, or holds values that are not finite.
    """
    layers = _layers(model)
    if not layers:
        raise ModelError(
            f"verify: expected a prepared or deployed model, found a {type(model).__name__} "
            "without N:M layers."
        )
    if not any(layer.stage == "prepared" for layer in layers):
        return Audit(tuple(layers), None)
    try:
        return Audit((*layers, *_layers(finalize(model, backend="dense"))), None)
    except VerificationError as error:
        return Audit(tuple(layers), str(error))


@torch.no_grad()
def _layers(model: nn.Module) -> list[LayerAudit]:
    found = []
    for name, module in dense_view(model).named_modules():
        if isinstance(module, NMLayer):
            weight, pattern, stage = module.masked_weight()[0], module.pattern, "prepared"
        elif isinstance(module, Layer) and "pattern" in records.read(module):
            pattern = Pattern.parse(records.read(module)["pattern"])
            weight, stage = module.weight, "deployed"
        else:
            continue
        density = int(weight.count_nonzero()) / weight.numel()
        found.append(
            LayerAudit(name, stage, str(pattern), masks.most_in_a_group(weight, pattern), density)
        )
    return found
