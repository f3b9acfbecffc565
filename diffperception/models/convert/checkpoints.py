"""Reading checkpoints of other programs, which are not trusted: weights and numbers alone, no code."""

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Where training programs put the weights, the likeliest first; any other key that holds tensors counts if it is alone.
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "module", "weights", "params")
WEIGHTS_OF_DIFFUSERS = "diffusion_pytorch_model"  # how the names of its files begin
_AVERAGES = re.compile(r"(^|_)(ema|averaged?|swa|shadow)(_|$)")  # keys and prefixes of averaged weights
_NO_WEIGHTS = re.compile(r"optim|^opt$|sched|scaler|^amp$|rng|random|callback|loop|hyper|metadata", re.IGNORECASE)
# Modules that programs wrap around a network: the first part of its weights' names, which says nothing of it.
_WRAPPERS = (
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),  # torch's own
    *("model", "net", "network", "unet", "diffusion_model", "denoise_fn", "detector", "student"),
    *("ema", "ema_model", "model_ema", "online_model", "averaged_model"),
)
_INNER_WRAPPERS = re.compile(r"(?<=\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# What numpy's arrays and numbers are pickled with; numpy 2 renamed the module. Nothing here calls what a file names.
_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64().__reduce__()[0]
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")),
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_PLAIN = [argparse.Namespace]  # timm keeps the options of a training beside the weights


class Checkpoint(NamedTuple):
    """The weights of one network in a file, and what else was there."""

    state: dict[str, Tensor]  # by name, without the names of wrappers, on the CPU
    place: str  # the keys and wrappers that they were under, with dots between; empty if they are the file itself
    averages: bool  # there are averaged weights, and these are not they
    left_out: list[str]  # names of weights beside the network, such as those of a loss


def read_weights(path: Path, ema: bool = False) -> Checkpoint:
    """The weights in a file of PyTorch, pickle or safetensors; no code in the file is run.

    Dictionaries around them (model, state_dict, ema, nested ones too) and the names of wrappers (module., model.,
    _orig_mod., ...) come off.

    Args:
        path: the file.
        ema: take averaged weights, which lie under a key or prefix such as ema_state, model_ema or ema_model.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_untrusted`; or there are no weights, none that are averaged, or
            those of several networks.
    """
    content = load_untrusted(path)
    places = dict(_places(content)) if isinstance(content, Mapping) else {}
    if not places:
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is expected")
    averaged = [keys for keys in places if any(_AVERAGES.search(key) for key in keys)]
    plain = [keys for keys in places if keys not in averaged]
    keys = _likeliest(path, averaged if averaged and (ema or not plain) else plain)
    weights = {str(n): torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in places[keys].items()}
    if others := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} has something else than tensors beside its weights ({', '.join(others[:8])}): they must be alone,"
            f" or under a key of their own such as {', '.join(WEIGHT_KEYS[:3])}"
        )
    state, wrappers, dropped = _unwrapped(weights, ema or keys in averaged)
    place = [*keys, *wrappers]
    is_average = any(_AVERAGES.search(key) for key in place)
    if ema and not is_average:
        raise ValueError(f"{path} has no averaged weights (under ema_state, model_ema, ...): leave out --ema")
    there_are = bool(averaged) or any(_AVERAGES.search(name.partition(".")[0]) for name in dropped)
    return Checkpoint(state, ".".join(place), there_are and not is_average, dropped)


def state_of(path: str | Path) -> dict[str, Tensor]:
    """The weights of the network in a foreign file, as :func:`read_weights` finds them."""
    return read_weights(Path(path)).state


def _places(content: Mapping[Any, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """The innermost dictionaries with tensors, by the keys that lead there; not those of optimizers and the like."""
    inner: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and not _NO_WEIGHTS.search(key):
            inner += _places(value, (*keys, key))
    if inner:
        yield from inner
    elif any(isinstance(value, Tensor | np.ndarray) for value in content.values()):
        yield keys, content


def _likeliest(path: Path, places: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The keys that lead to the network; ValueError if several may."""
    rank = {name: number for number, name in enumerate(WEIGHT_KEYS)}
    ranks = [min((rank.get(key, len(rank)) for key in keys), default=0) for keys in places]
    best = [keys for keys, number in zip(places, ranks, strict=True) if number == min(ranks)]
    if len(best) > 1 and min(ranks) == len(rank):
        listed = ", ".join(".".join(keys) for keys in best[:8])
        raise ValueError(f"{path} holds the weights of several networks ({listed}): save the one that you want alone")
    return min(best, key=len)


def _unwrapped(weights: dict[str, Tensor], ema: bool) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights without wrappers' names, the averaged ones if asked for; those names; the weights beside them."""
    state = {_INNER_WRAPPERS.sub("", name): value for name, value in weights.items()}
    if len(state) < len(weights):
        state = dict(weights)  # two networks: which of them is wanted, names cannot tell
    wrappers: list[str] = []
    dropped: list[str] = []
    while True:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if first in _WRAPPERS and rest:
                groups.setdefault(first, {})[rest] = value
        averaged = {first: group for first, group in groups.items() if _AVERAGES.search(first)}
        beside = {n: v for n, v in state.items() if n.partition(".")[0] not in averaged}
        if averaged and not ema and 2 * len(beside) > max(map(len, averaged.values())):
            dropped += [name for name in state if name not in beside]
            state = beside
            continue
        if not (wanted := averaged if averaged else groups):
            return state, wrappers, dropped
        wrappers.append(max(wanted, key=lambda first: len(wanted[first])))
        dropped += [name for name in state if name.partition(".")[0] != wrappers[-1]]
        state = wanted[wrappers[-1]]


def complaints(given: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> str:
    """Sentences naming the weights that are missing, left over or of another shape; empty if there are none."""
    shapes = {name: (tuple(given[name].shape), tuple(expected[name])) for name in expected if name in given}
    found = {
        "missing": [name for name in expected if name not in given],
        "left over": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {has} instead of {needs}" for name, (has, needs) in shapes.items() if has != needs
        ],
    }
    return " ".join(
        f"{len(names)} {'name is' if len(names) == 1 else 'names are'} {kind}: {_first(names)}."
        for kind, names in found.items()
        if names
    )


def assign(model: nn.Module, state: Mapping[str, Tensor], problem: str) -> None:
    """Make the tensors of `state` the model's; ValueError, which begins with the problem, if they do not fit."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if wrong := complaints(state, expected):
        raise ValueError(f"{problem}: {wrong}")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # numbers of a wrong type
        raise ValueError(f"{problem}: {str(error).splitlines()[-1].strip()}") from error


def _first(names: Sequence[str], shown: int = 6) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def class_names(given: Sequence[str] | None, count: int) -> list[str]:
    """The names given for a checkpoint's classes, else their numbers; ValueError if there are not as many."""
    names = [str(label) for label in range(count)] if given is None else list(given)
    if len(names) != count:
        raise ValueError(f"{len(names)} class names are given for a checkpoint with {count or 'no'} classes")
    return names


def load_untrusted(path: Path) -> Any:
    """The tensors, arrays, numbers, texts and collections of them in a file of PyTorch, pickle or safetensors.

    FileNotFoundError without it; ValueError if it is a folder or damaged, or holds anything else, which could run code.
    """
    if path.is_dir():
        raise ValueError(f"{path} is {folder_in_words(path)}: name the file of a checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        if head[8:9] == b"{":
            return load_file(path)
        if not is_zipfile(path):
            with open(path, "rb") as file:
                content = _Arrays(file, encoding="latin1").load()
            if not isinstance(content, int):  # what torch.save wrote before 1.6 begins with a magic number
                return content
        with torch.serialization.safe_globals([*_NUMPY, *_PLAIN]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file can fail at any instruction of its pickle
        raise ValueError(f"{path} {_why_unread(error, head)}") from None


def _why_unread(error: Exception, head: bytes) -> str:
    refused = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"holds more than weights ({refused[1]}), and reading that could run code: it is refused; ask for its"
            " weights alone, or save them alone from a program that you trust the file to"
        )
    if "TorchScript" in str(error):
        return "is a program in TorchScript: save the state_dict() of what torch.jit.load makes of it"
    if head.startswith(b"version https://git-lfs"):
        return "is not the checkpoint itself but a pointer to it: `git lfs pull` fetches it"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page: the download did not give the checkpoint"
    return (
        "is damaged, or of another format than torch.save's, pickle's and safetensors'"
        f" ({type(error).__name__}): copy it again"
    )


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether a folder is one that diffusers wrote: a pipeline's, or that of a network."""
    folder = Path(path)
    places = (folder, folder / "unet", folder / "transformer")
    return (folder / "model_index.json").is_file() or any(list(p.glob(f"{WEIGHTS_OF_DIFFUSERS}*")) for p in places)


def folder_in_words(folder: Path) -> str:
    """What a folder that was given in place of a file is."""
    if is_diffusers_folder(folder):
        return "a folder of diffusers, which `diffperception convert --checkpoint` turns into a model file"
    if within := sorted(path for path in folder.iterdir() if path.is_dir() and is_diffusers_folder(path)):
        return f"a folder around the folder of diffusers {within[0]}, which can be named instead"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".pt", ".ckpt", ".safetensors"))
    return f"a folder ({_first(files, 3)} in it)" if files else "a folder, with no checkpoint in it"


class _Arrays(pickle.Unpickler):
    """Reads numbers, texts and numpy's arrays, as in detectron2's .pkl files; nothing else that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return _KNOWN[module, name]


def _encode_latin(text: str, _: str) -> bytes:
    """How Python 3 writes bytes in pickles of the second protocol."""
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
}
