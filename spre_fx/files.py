"""`save` and `load`: a deployed model in one file, as small as it is sparse.

The file is a safetensors file, which is made for this: tensors at checked offsets, read without
running or unpickling anything. N:M weights lie in it as values and positions (`packing`), other
tensors as they are. Its metadata has one entry, `spre_fx`: the version of the format, a SHA-256 of
the rest, and a description of the model in JSON (`model_data`): the graph, the layers, the records,
and a SHA-256 of every tensor. The same model gives the same bytes.

Why not torch.export's own file: a `.pt2` stores dense weights and pickled example inputs, is bound
to the operators of the torch that wrote it, and loads as a program of ATen calls in which `sites`,
`diff` and `cost` find no layers. A deployed graph calls layers of `torch.nn` and public functions,
and these are kept by name. What is loaded is the GraphModule it was, and can be given to
`torch.export` then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.fx import GraphModule

from spre_fx.atomic_write import write_atomically
from spre_fx.backends import is_lowered
from spre_fx.checks import is_prepared
from spre_fx.dense_form import to_dense
from spre_fx.errors import FileError, ModelError, PatternError
from spre_fx.file_ledger import LedgerLine, SavedFile
from spre_fx.graph_data import Data
from spre_fx.model_data import StoredTensor, model_data, model_from
from spre_fx.packing import Packed, pack, unpack
from spre_fx.patterns import Pattern

if TYPE_CHECKING:
    from torch import nn

_ENTRY = "spre_fx"  # one alone: safetensors writes several in any order
_VERSION = "1"
_OTHER_KINDS = {
    b"PK": "a zip archive, as torch.save and torch.export.save write: torch.load reads the one, "
    "torch.export.load the other",
    b"\x80": "a pickle",
    b"\x08": "what may be an ONNX model",
}


def save(deployed: nn.Module, path: str | os.PathLike[str]) -> SavedFile:
    """Write a deployed model to one file, which `load` reads without the model's source code.

    A lowered model is stored as the dense form that it stands for, which any machine can load and
    lower again. The weights of N:M layers are stored as their values and packed positions,
    everything bit for bit. The file is written whole or not at all: if something goes wrong, what
    was at `path` stays.

    Args:
        deployed: What `finalize`, `adopt` or `load` returned.
        path: The file; any extension, though `.safetensors` says what it is.

    Returns:
        The ledger: print it.

    Raises:
        ModelError: If the model is not deployed, or holds code that a file cannot hold.
        OSError: If the file cannot be written.
    """
    _check_deployed(deployed)
    dense = to_dense(deployed) if any(map(is_lowered, deployed.modules())) else deployed
    assert isinstance(dense, GraphModule)
    description, stored = model_data(dense)
    parts: dict[str, Tensor] = {}
    lines, other = [], 0
    description["tensors"] = {}
    for name, tensor in stored.items():
        own = {} if "same" in tensor.facts else _parts(name, tensor)
        facts = _facts(tensor, packed=len(own) == 2)
        facts["sha256"] = {part: _digest(content) for part, content in own.items()}
        description["tensors"][name] = facts
        parts |= own
        if tensor.pattern is not None and own:
            lines.append(_line(name, tensor, [part.nbytes for part in own.values()]))
        else:
            other += sum(part.nbytes for part in own.values())
    content = _serialise(description, parts)
    write_atomically(path, content)
    return SavedFile(Path(path), tuple(lines), other, len(content))


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> GraphModule:
    """Read a model that `save` wrote: the same graph, layers, records and bits.

    Nothing is unpickled, and the file can name no function or layer outside a closed list. Every
    part has a checksum. A file that is not what was saved gives an error, never a model.

    Args:
        path: The file.
        device: Where the tensors go.

    Raises:
        FileError: If the file is truncated, damaged, of another kind or of a newer version.
    """
    file = Path(path)
    if not file.is_file():
        raise FileError(f"{file}: expected a file that spre_fx.save wrote, found none.")
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            description = _description(file, content.metadata() or {})
            parts = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise FileError(f"{file}: {_foreign(file, error)}") from error
    _check_parts(file, description, parts)
    try:
        tensors = _tensors(description["tensors"], parts)
        model = model_from(description, tensors)
    except (FileError, PatternError) as error:
        raise FileError(
            f"{file}: expected a deployed model, found {error}. The file was written by other "
            "hands than spre_fx.save, or by a newer torch."
        ) from error
    except _MALFORMED as error:
        raise FileError(
            f"{file}: expected the description of a deployed model, found one that cannot be "
            f"followed ({type(error).__name__}: {error}). The file was written by other hands than "
            "spre_fx.save."
        ) from error
    return model.to(device)


# What a description that makes no sense can lead to, in Python and in torch.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def _check_deployed(deployed: nn.Module) -> None:
    if is_prepared(deployed):
        raise ModelError(
            "expected a deployed model, found one in training, with N:M masks. Save what finalize "
            "makes of it; while it trains, torch.save its state_dict."
        )
    if isinstance(deployed, GraphModule):
        return
    inside = [name for name, m in deployed.named_modules() if isinstance(m, GraphModule)]
    if inside:
        raise ModelError(
            f"expected a model that is one graph, found a {type(deployed).__name__} of which "
            f"only parts are: {', '.join(inside[:3])}. The rest is Python source, which a file "
            "can't hold: keep the state_dict and the source, or save the parts."
        )
    raise ModelError(
        f"expected what finalize, adopt or load returned, found a {type(deployed).__name__}. "
        "spre_fx.adopt takes a dense model whose weights are N:M already."
    )


def _parts(name: str, stored: StoredTensor) -> dict[str, Tensor]:
    """What goes into the file for one tensor: its values and indices, or itself."""
    tensor = stored.tensor.cpu()
    packed = None if stored.pattern is None else pack(tensor, Pattern.parse(stored.pattern))
    if packed is not None:
        return {f"{name}/values": packed.values, f"{name}/indices": packed.indices}
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)  # a storage of its own
    return {name: dense}


def _facts(stored: StoredTensor, *, packed: bool) -> Data:
    tensor = stored.tensor
    facts = stored.facts | {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    # Kernels are chosen by strides, even by those of axes of length 1, and each rounds its own way.
    usual = torch.empty(tensor.shape, device="meta").stride()
    if tensor.stride() != usual and _fills(tensor.shape, tensor.stride()):
        facts["strides"] = list(tensor.stride())
    if packed:
        facts["pattern"] = stored.pattern
    return facts


def _fills(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements of these strides lie without gap or overlap, in whatever order."""
    size = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return True


def _line(name: str, stored: StoredTensor, sizes: list[int]) -> LedgerLine:
    values, indices = (*sizes, 0)[:2]
    assert stored.pattern is not None
    layer = name.removesuffix(".weight")
    shape = tuple(stored.tensor.shape)
    return LedgerLine(layer, stored.pattern, shape, stored.tensor.nbytes, values, indices)


def _serialise(description: Data, parts: dict[str, Tensor]) -> bytes:
    text = json.dumps(description, separators=(",", ":"), allow_nan=False)
    metadata = {_ENTRY: f"{_VERSION} {_digest_of_text(text)} {text}"}
    content: bytes = safetensors.torch.save(parts, metadata)
    return content


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(part: Tensor) -> str:
    return hashlib.sha256(part.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _description(file: Path, metadata: Mapping[str, str]) -> Data:
    if _ENTRY not in metadata:
        raise FileError(
            f"{file}: expected a file that spre_fx.save wrote, found a safetensors file of another "
            f"kind, or a damaged one: its metadata is called {sorted(metadata)}."
        )
    version, _, rest = metadata[_ENTRY].partition(" ")
    digest, _, text = rest.partition(" ")
    if version != _VERSION:
        raise FileError(
            f"{file}: expected version {_VERSION} of the format, found version {version[:20]!r}. "
            "Load it with the spre_fx that wrote it, or a newer one."
        )
    if _digest_of_text(text) != digest:
        raise _damaged(file, "the description of the model")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file}: expected a description in JSON, found: {error}.") from error


def _check_parts(file: Path, description: Data, parts: dict[str, Tensor]) -> None:
    """Every part is there, and is what it was."""
    try:
        expected = {
            part: digest
            for facts in description["tensors"].values()
            for part, digest in facts["sha256"].items()
        }
    except _MALFORMED as error:
        raise FileError(
            f"{file}: expected a checksum of every tensor, found none ({type(error).__name__}: "
            f"{error}). The file was written by other hands than spre_fx.save."
        ) from error
    if expected.keys() != parts.keys():
        odd = sorted(expected.keys() ^ parts.keys())
        raise FileError(
            f"{file}: expected {len(expected)} tensors, found {len(parts)}; missing or not "
            f"expected: {', '.join(odd[:3])}. The file is damaged: copy or save it again."
        )
    for name, part in parts.items():
        if _digest(part) != expected[name]:
            raise _damaged(file, name)


def _damaged(file: Path, what: str) -> FileError:
    return FileError(
        f"{file}: expected the checksum of {what} to be the one it was saved with, found another. "
        "The file is damaged: copy or save it again."
    )


def _foreign(file: Path, error: Exception) -> str:
    with file.open("rb") as content:
        start = content.read(16)
    for mark, kind in _OTHER_KINDS.items():
        if start.startswith(mark) and start[8:9] != b"{":
            return f"expected a file that spre_fx.save wrote, found {kind}."
    if start[8:9] == b"{":
        return (
            f"expected a whole file, found a truncated or damaged one ({error}). Copy or save it "
            "again."
        )
    return f"expected a file that spre_fx.save wrote, found something else ({error})."


def _tensors(facts: Data, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they were, of the shapes and types that the description tells."""
    found: dict[str, Tensor] = {}
    for name, fact in facts.items():
        if "same" in fact:
            found[name] = found[fact["same"]]
            continue
        shape = tuple(fact["shape"])
        if "pattern" in fact:
            packed = Packed(parts[f"{name}/values"], parts[f"{name}/indices"])
            tensor = unpack(packed, shape, Pattern.parse(fact["pattern"]))
        else:
            tensor = parts[name].clone()  # off the file's pages
        if tensor.shape != shape or str(tensor.dtype) != f"torch.{fact['dtype']}":
            raise FileError(
                f"{name} of {tensor.dtype} and shape {tuple(tensor.shape)} where {fact['dtype']} "
                f"and {shape} was announced"
            )
        found[name] = _lay_out(name, tensor, fact.get("strides"))
    return found


def _lay_out(name: str, tensor: Tensor, strides: list[int] | None) -> Tensor:
    if strides is None:
        return tensor
    if len(strides) != tensor.ndim or not _fills(tuple(tensor.shape), tuple(strides)):
        raise FileError(f"{name} with strides {strides}, which shape {tuple(tensor.shape)} lacks")
    laid_out = torch.empty_strided(tuple(tensor.shape), strides, dtype=tensor.dtype)
    return laid_out.copy_(tensor)
