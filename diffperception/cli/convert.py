"""`diffperception convert`: a checkpoint of the reference DiffusionDet as a model file of ours."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffperception.cli import say
from diffperception.coco import labels_of, read_coco
from diffperception.detection import DiffusionDet

WEIGHTS = ("model", "state_dict")  # where training programs put the weights
EMA = "ema_state"

# What numpy's arrays and numbers are pickled with; numpy 2 renamed the module. Nothing here calls what a file names.
_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64().__reduce__()[0]
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")),
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def convert(
    checkpoint: Path, output: Path, ema: bool = False, annotations: Path | None = None, overwrite: bool = False
) -> None:
    """Turn a checkpoint of the reference DiffusionDet into a model file for `evaluate`, `predict` and `train --init`.

    Backbone (ResNet-50/101, Swin-T/S/B), classes, stages and widths are read off the weights' names and shapes. Only
    weights and numbers are read: a checkpoint that would run code is refused.

    Args:
        checkpoint: a .pth or .safetensors file: the weights themselves, or a dictionary with them under model,
            state_dict or ema_state.
        output: the file to write, model.safetensors for example.
        ema: take the averaged weights, under ema_state.
        annotations: a COCO JSON file whose categories name the classes. Without it 80 classes get COCO's names, any
            other number of classes are numbered.
        overwrite: replace the output file.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already: name another file, or replace it with --overwrite")
    weights, part, parts = read_checkpoint(checkpoint, ema)
    classes = None if annotations is None else labels_of(read_coco(annotations)["categories"])[1]
    detector = DiffusionDet.from_reference(weights, classes)
    detector.save(output)
    say(f"{checkpoint}{f' ({part})' if part else ''}: {describe(detector)}")
    if EMA in parts and part != EMA:
        say(f"it also has averaged weights ({EMA}): --ema takes those")
    if detector.classes[0] == "0":
        say("its classes are numbered: --annotations FILE names them after the categories of a COCO file")
    say(f"{output}: for `diffperception evaluate`, `predict` and `train --init`")


def describe(detector: DiffusionDet) -> str:
    """A line about the model."""
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return (
        f"DiffusionDet with backbone {detector.arguments['backbone']}, {len(detector.classes)} classes"
        f" ({', '.join(detector.classes[:3])}{', ...' if len(detector.classes) > 3 else ''}),"
        f" {detector.arguments['stages']} stages, {parameters / 1e6:.2f} M parameters"
    )


def read_checkpoint(path: Path, ema: bool = False) -> tuple[dict[str, Tensor], str, list[str]]:
    """The weights in a file of PyTorch or safetensors, by name, on the CPU; no code in the file is run.

    Args:
        path: the file; its weights may lie under model, state_dict or ema_state.
        ema: take those under ema_state.

    Returns: the weights; what they were found under, empty if they are the file itself; all that there was of such.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds more than weights and numbers, or has no weights at that place.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = _load(path)
    parts = [key for key in (*WEIGHTS, EMA) if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
    if ema and EMA not in parts:
        raise ValueError(f"{path} has no averaged weights ({EMA}): leave out --ema")
    part = EMA if ema else next(iter(parts), "")
    found = content[part] if part else content
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is expected")
    weights = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in found.items()}
    others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} has something else than tensors beside its weights ({', '.join(others[:8])}): it is expected to"
            f" hold them alone, or under {', '.join(WEIGHTS)} or {EMA}"
        )
    return weights, part, parts


def _load(path: Path) -> Any:
    """What a file holds, if that is tensors, arrays, numbers, texts and collections of them."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged file can fail at any instruction of its pickle
        refused = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"{path} holds more than weights ({refused[1]}), and reading that could run code: it is refused; ask"
                " for its weights alone, or save them alone from a program that you trust the file to"
            ) from None
        raise ValueError(
            f"{path} is damaged, or of another format than torch.save's and safetensors' ({type(error).__name__}):"
            " copy it again"
        ) from None
