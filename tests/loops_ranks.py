"""One of two processes that train together: DistributedDataParallel and fully_shard, on gloo.

    python loops_ranks.py RANK DIRECTORY [all]

Writes what became of each check, "" or a traceback, to DIRECTORY/RANK.json.
"""

import contextlib
import copy
import json
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import RECIPES, assert_agrees, batch, loss_of, masks, prepared, sgd
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import spre_fx
from spre_fx.errors import ModelError
from spre_fx.modules import NMLayer

STEPS = 10
SLOW = (
    "ddp, compiled",
    "ddp, sr-ste frozen at 6",
    "ddp, sr-ste ramp",
    "ddp, granet",
    "ddp, taps by change",
    "ddp of a copy by pickle",
    "fsdp, sr-ste every 3, root",
    "fsdp, asp, root",
    "fsdp, lbc, root",
    "fsdp, gmp, root",
    "fsdp, sr-ste, leaves",
)
SHARDED = ("sr-ste", "sr-ste every 3", "asp", "lbc")


@contextlib.contextmanager
def broadcasts() -> Iterator[list[Tensor]]:
    """The tensors DDP broadcasts meanwhile."""
    sent: list[Tensor] = []
    original = distributed._broadcast_coalesced

    def spy(group: Any, tensors: list[Tensor], *others: Any) -> None:
        sent.extend(tensors)
        original(group, tensors, *others)

    distributed._broadcast_coalesced = spy
    try:
        yield sent
    finally:
        distributed._broadcast_coalesced = original


def equal_on_both_ranks(tensors: list[Tensor]) -> bool:
    """Whether both ranks hold the same numbers."""
    flat = torch.cat([tensor.flatten().to(torch.float64) for tensor in tensors])
    both = [torch.empty_like(flat) for _ in range(2)]
    distributed.all_gather(both, flat)
    return torch.equal(*both)


def kept(model: nn.Module) -> list[Tensor]:
    """The buffers that each rank updates by itself."""
    buffers = dict(model.named_buffers())
    names = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    return [buffers[name] for name in names if name in buffers and not name.endswith(".sum")]


def ddp(recipe: str, rank: int, clone: Callable[[Any], Any] = lambda model: model) -> None:
    """Ranks that start from other weights have the same masks at every step."""
    model = clone(prepared(recipe, seed=rank))
    names = dict(model.named_buffers())
    told = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    ignored = {name: buffer for name, buffer in names.items() if name in told}
    assert {n for n, b in names.items() if b.numel() > 16} == {
        n for n, b in ignored.items() if b.numel() > 16
    }
    if recipe in ("asp", "sr-ste every 3", "rigl"):
        assert not equal_on_both_ranks(kept(model))  # as prepare left them
    seen: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, NMLayer):
            layer.nm_mask.register_forward_hook(lambda m, i, mask: seen.append(mask.detach()))
    with broadcasts() as sent:
        wrapped = DistributedDataParallel(model)
        assert sum(t.numel() for t in sent) >= sum(p.numel() for p in model.parameters())
        optimizer = sgd(model)
        for step in range(STEPS):
            x = batch(step, rank)
            if recipe == "taylor":
                spre_fx.update_taps(model, lambda x=x: loss_of(model, x))
            seen.clear()
            sent.clear()
            optimizer.zero_grad()
            loss_of(wrapped, x).backward()
            optimizer.step()
            assert len(seen) >= 3
            assert equal_on_both_ranks(seen), f"masks differ at step {step}"
            assert not kept(model) or equal_on_both_ranks(kept(model)), f"kept, at step {step}"
            assert equal_on_both_ranks(list(model.parameters())), f"weights differ at {step}"
            bytes_sent = sum(t.nbytes for t in sent)
            expected = sum(b.nbytes for n, b in names.items() if n not in ignored)
            assert bytes_sent == expected < 1500, f"{bytes_sent} bytes at step {step}"
            assert max(t.numel() for t in sent) <= 16
    assert_agrees(model)


def compiled(rank: int) -> None:
    """The compiled model, given to DDP, has no masks broadcast either."""
    model = prepared("asp", seed=rank)
    with broadcasts() as sent:
        wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
        for step in range(2):
            sent.clear()
            loss_of(wrapped, batch(step, rank)).backward()
            assert max(t.numel() for t in sent) <= 16
            assert equal_on_both_ranks(kept(model))


def inside(rank: int) -> None:
    """A model of one's own around it: masks are broadcast, unless asked not to be."""
    for asked in (False, True):
        model = nn.Sequential(prepared("asp", seed=rank), nn.ReLU())
        if asked:
            spre_fx.ranks.keep_masks_from_ddp(model)
        with broadcasts() as sent:
            wrapped = DistributedDataParallel(model)
            for step in range(2):
                sent.clear()
                loss_of(wrapped, batch(step, rank)).backward()
                assert (max(t.numel() for t in sent) <= 16) is asked
                buffers = [b for n, b in model.named_buffers() if n.endswith("mask")]
                assert len(buffers) > 3
                assert equal_on_both_ranks(buffers)


def loaded_on_one_rank(recipe: str, rank: int) -> None:
    """A checkpoint that only rank 0 loads leaves rank 1 with other masks, and it says so."""
    trained = prepared(recipe)
    optimizer = sgd(trained)
    for step in range(3):
        loss_of(trained, batch(step)).backward()
        optimizer.step()
    model = prepared(recipe, seed=7)
    if rank == 0:
        model.load_state_dict(trained.state_dict())
    wrapped = DistributedDataParallel(model)
    if rank == 0:
        wrapped(batch(0))
    else:
        with pytest.raises(ModelError) as refusal:
            wrapped(batch(0))
        assert str(refusal.value) == (
            "mask_schedule: expected masks of the same step on every rank, found others than those "
            "of rank 0. Load the checkpoint on every rank before DistributedDataParallel, which "
            "broadcasts no masks, and run no training forward on one rank alone (found step 3 and "
            "masks of step 0)"
        )
    model = prepared(recipe, seed=7)
    model.load_state_dict(trained.state_dict())
    DistributedDataParallel(model)(batch(0))
    assert equal_on_both_ranks(kept(model))


def fsdp(recipe: str, where: str) -> None:
    """Sharded, the masks, the losses and the deployed model are those of one process."""
    mesh = init_device_mesh("cpu", (2,))
    whole, model = prepared(recipe), prepared(recipe)
    parts = {"leaves": NMLayer, "every module": nn.Module}.get(where, ())
    for name, module in reversed(list(model.named_modules())):
        if parts and isinstance(module, parts) and name and list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    seen: dict[nn.Module, list[Tensor]] = {whole: [], model: []}
    for each, found in seen.items():
        for layer in each.modules():
            if isinstance(layer, NMLayer):
                layer.register_forward_hook(
                    lambda m, i, out, found=found: found.append(
                        out[1].detach() if isinstance(out, tuple) else out.detach()
                    )
                )
    optimizers = {each: sgd(each) for each in seen}
    for step in range(6):
        losses = []
        for each, optimizer in optimizers.items():
            optimizer.zero_grad()
            if recipe == "taylor":
                spre_fx.update_taps(each, lambda each=each, step=step: loss_of(each, batch(step)))
            loss = loss_of(each, batch(step))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(*losses), f"step {step}: {losses}"
    assert len(seen[whole]) == len(seen[model]) >= 18
    assert all(map(torch.equal, seen[whole], seen[model]))
    with pytest.raises(ModelError) as refusal:
        spre_fx.finalize(model)
    assert str(refusal.value) == (
        "0.weight: expected whole tensors, found a shard of one (DTensor). Call prepare before "
        "fully_shard. To finalize, gather the weights "
        "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), "
        "load them into a prepared model that is not sharded, and finalize that."
    )
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    gathered = prepared(recipe, seed=5)
    gathered.load_state_dict(state)
    for name, mask in masks(gathered).items():
        assert torch.equal(mask, masks(whole)[name])
    deployed, expected = assert_agrees(gathered), assert_agrees(whole)
    x = batch(3, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), expected(x), rtol=1e-10, atol=1e-10)


def baselines_of_shards() -> None:
    """The unstructured baselines look at all weights at once, which shards are not."""
    at_once = (
        "it looks at all layers at once. Apply fully_shard to the whole model only, or use "
        "DistributedDataParallel."
    )
    writes = (
        "weights that come back are set to 0, which fully_shard would lose. Use "
        "DistributedDataParallel."
    )
    for recipe, call, words in (
        ("gmp", lambda model: model(batch(0)), f"GMP: {{}}{at_once}"),
        ("rigl", lambda model: model(batch(0)), f"RigL: {{}}{at_once}"),
        ("rigl", lambda model: model.train(), f"RigL: {{}}{writes}"),
        ("granet", lambda model: model.eval(), f"GraNet: {{}}{writes}"),
    ):
        model = prepared(recipe)
        for module in model.modules():
            if isinstance(module, NMLayer):
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ModelError) as refusal:
            call(model)
        assert str(refusal.value) == words.format("expected whole weights, found shards: ")


def checks(rank: int) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for recipe in RECIPES:
        found[f"ddp, {recipe}"] = lambda recipe=recipe: ddp(recipe, rank)
    for clone in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        name = getattr(clone, "__name__", "").replace("<lambda>", "pickle")
        found[f"ddp of a copy by {name}"] = lambda clone=clone: ddp("asp", rank, clone)
    found["ddp, inside a module"] = lambda: inside(rank)
    for recipe in ("asp", "sr-ste every 3", "lbc", "rigl"):
        found[f"loaded on one rank, {recipe}"] = lambda r=recipe: loaded_on_one_rank(r, rank)
    found["ddp, compiled"] = lambda: compiled(rank)
    root = [(recipe, "root") for recipe in (*SHARDED, "gmp", "taylor")]
    for recipe, where in [*root, ("sr-ste", "leaves"), ("lbc", "leaves"), ("asp", "every module")]:
        found[f"fsdp, {recipe}, {where}"] = lambda r=recipe, where=where: fsdp(r, where)
    found["baselines of shards"] = baselines_of_shards
    return found


def main(rank: int, directory: Path, wanted: str = "quick") -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2
    )
    results, seconds = {}, {}
    for name, check in checks(rank).items():
        if name in SLOW and wanted != "all":
            continue
        start = time.monotonic()
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        distributed.barrier()
        seconds[name] = time.monotonic() - start
    (directory / f"{rank}.json").write_text(json.dumps(results))
    for name, spent in seconds.items():
        print(f"{spent:6.2f} s  {name}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
