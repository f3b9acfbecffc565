"""Models on disk: weights and the constructor's arguments in one safetensors file, which runs no code when loaded."""

import copy
import dataclasses
import errno
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from diffperception.devices import pick_device
from diffperception.files import require_file_name, written_beside
from diffperception.models.convert.checkpoints import assign, folder_in_words

FORMAT = "diffperception-2"
PACKAGE = "diffperception"
ELSEWHERE = "weights_elsewhere"  # in a state dict: the number of weights that it leaves out
_rebuilding: ContextVar[str | Path | None] = ContextVar("rebuilding", default=None)  # the file, while it is
_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())
_weights: ContextVar[Path | None] = ContextVar("weights", default=None)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where frozen weights lie that a model file leaves out.

    Args:
        place: the file or folder that they were read from.
        part: the component of a folder, such as its unet.
        weights: their :func:`weights_digest`.
    """

    place: str
    part: str
    weights: str


class Model(nn.Module):
    """A network that can be saved and loaded, and what users' own networks derive from.

    The arguments of the outermost constructor are recorded by themselves, defaults included. They must be JSON-able, or
    other models, dataclasses, or lists and dictionaries of these. A constructor that replaces an argument by what it
    stands for says so with :meth:`record`.
    """

    kind: str = "model"  # what its file says that it is: a detector, a segmenter, a generator, ...
    # Its modules whose weights have a row per class, of the innermost model around them that has `classes`: names, *
    # for any part, and the axis of the rows. Where training starts from other weights, rows go by class name.
    class_layers: ClassVar[Mapping[str, int]] = {}
    arguments: dict[str, Any]  # of the constructor, by name
    origin: Origin | None = None  # where its weights lie, which files and checkpoints then leave out

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    def record(self, **arguments: Any) -> None:
        """What the file shall hold in place of arguments that the outermost constructor was given."""
        self.arguments |= {name: value for name, value in arguments.items() if name in self.arguments}

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a model without any."""
        return next((tensor.device for tensor in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As every module's, but in place of weights that lie elsewhere (:attr:`origin`) it has their number."""
        if self.origin is None:
            return super().state_dict(*args, **kwargs)
        number = torch.tensor(list(bytes.fromhex(self.origin.weights)), dtype=torch.uint8)
        found = {} if kwargs.get("destination") is None else kwargs["destination"]
        found[kwargs.get("prefix", "") + ELSEWHERE] = number
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.origin is not None:
            number = state_dict.pop(prefix + ELSEWHERE, None)
            if number is not None and bytes(number.tolist()).hex() != self.origin.weights:
                args[-1].append(f"it was made with other frozen weights than those in {self.origin.place}")
            state_dict |= {f"{prefix}{name}": value for name, value in tensors_of(self).items()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy, such as an average of weights in training; weights that lie elsewhere are fixed, and shared by it."""
        if self.origin is not None:
            memo |= {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # as every module's: not what torch has compiled
        return copied

    @property
    def leaves_weights(self) -> bool:
        """Whether weights of it, or of models in it, lie elsewhere (:attr:`origin`)."""
        return any(module.origin is not None for module in self.modules() if isinstance(module, Model))

    def keep_weights(self) -> None:
        """Have files hold all weights, those too that lie elsewhere (:attr:`origin`)."""
        for module in self.modules():
            if isinstance(module, Model):
                module.origin = None

    def weights_at(self, place: Path, part: str) -> dict[str, Tensor]:
        """Weights of such a model at an :class:`Origin`: by default in one of our files; errors as for :meth:`load`.

        A place is named by a model file, which is not trusted: this reads numbers alone, and runs no code.
        """
        with _opened(place) as (file, _):
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; ValueError for a folder, or an argument no file can keep."""
        path = Path(path)
        require_file_name(path)
        described = describe(self)
        arguments = json.dumps(described["arguments"])
        header = {"format": FORMAT, "kind": self.kind, "class": described["class"], "arguments": arguments}
        if self.origin is not None:
            header["origin"] = json.dumps(described["origin"])
        save_tensors({name: value.contiguous() for name, value in self.state_dict().items()}, path, header)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        allow: str | tuple[str, ...] = (),
        weights: str | Path | None = None,
    ) -> Self:
        """The model of a file, in evaluation mode. No random weights are drawn first.

        Args:
            path: what :meth:`save` wrote.
            device: where to put it; the CPU by default.
            dtype: of its floating point weights; by default the file's.
            allow: package or packages, beside this one, that the file may name classes from: yours, if it has some.
            weights: where frozen weights lie that the file leaves out; by default where they did, or beside the file.

        Raises:
            FileNotFoundError: no such file, or no weights that it leaves out.
            ValueError: it is no whole model file, or holds another model than this class, or names a class outside of
                ``allow``, or another model file: then whoever made it, not you, would choose what is loaded; or weights
                that it leaves out are others by now.
        """
        require_not_named_by_a_file(path)
        with _opened(Path(path)) as (file, header):
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            described = {"class": header["class"], "arguments": json.loads(header["arguments"])}
            if "origin" in header:
                described["origin"] = json.loads(header["origin"])
        except (KeyError, ValueError, RecursionError):
            raise ValueError(f"{path} does not say which model it holds: export it again") from None
        token = _rebuilding.set(path)
        try:
            with undrawn(), weights_lie_in(weights):
                model = rebuild(
                    described, path, (PACKAGE, *([allow] if isinstance(allow, str) else allow), *_trusted.get())
                )
        finally:
            _rebuilding.reset(token)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        for name, built in model.state_dict().items():  # what is assigned keeps the layout that the constructor chose
            if name in state and state[name].shape == built.shape and state[name].stride() != built.stride():
                state[name] = torch.empty_like(built, dtype=state[name].dtype).copy_(state[name])
        types = {(built.dtype, state[name].dtype) for name, built in model.state_dict().items() if name in state}
        if dtype is None and len(types) > len(dict(types)):  # half precision is that of all weights
            found = ", ".join(sorted({str(given).removeprefix("torch.") for _, given in types}))
            raise ValueError(f"{path} holds numbers of types that do not go together ({found}): export it again")
        assign(model, state, f"{path} does not fit the {type(model).__name__} it describes")
        return model.to(device=device, dtype=dtype).eval()

    @classmethod
    def loaded(cls, source: Self | str | Path) -> Self:
        """The model itself; that of a file on the accelerator, if there is one, with the errors of :meth:`load`."""
        return cls.load(source, pick_device()) if isinstance(source, str | Path) else source


@contextmanager
def trusting(package: str | None) -> Iterator[None]:
    """Within it every model file may name classes of this package too: `allow` for files that are named in options."""
    token = _trusted.set((*_trusted.get(), *([package] if package else [])))
    try:
        yield
    finally:
        _trusted.reset(token)


def require_not_named_by_a_file(path: str | Path) -> None:
    """ValueError while the model of a file is rebuilt: its arguments must not choose what else is read."""
    if (outer := _rebuilding.get()) is not None:
        raise ValueError(f"{outer} names the file {path}, but a model file holds all of its parts: export it again")


@contextmanager
def weights_lie_in(place: str | Path | None) -> Iterator[None]:
    """Within it frozen weights that model files leave out are looked for there, if a place is given."""
    token = _weights.set(Path(place) if place else _weights.get())
    try:
        yield
    finally:
        _weights.reset(token)


@contextmanager
def undrawn() -> Iterator[None]:
    """Within it modules begin with whatever is in memory; torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]), _Undrawn():
        yield


def is_model_file(path: str | Path) -> bool:
    """Whether a file is one of ours, of this version or another; False for one that is not there."""
    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("format")).startswith(PACKAGE)
    except (SafetensorError, OSError):
        return False


def file_kind(path: str | Path) -> str:
    """The :attr:`Model.kind` that a file names in its header; errors as for :meth:`Model.load`."""
    with _opened(Path(path)) as (_, header):
        return header.get("kind", Model.kind)


def describe(value: Any) -> Any:
    """The value as JSON can hold it, models and dataclasses by their class and arguments; ValueError if it cannot."""
    if isinstance(value, Model):
        origin = {} if value.origin is None else {"origin": dataclasses.asdict(value.origin)}
        return {"class": class_name(type(value)), "arguments": describe(value.arguments), **origin}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {"class": class_name(type(value)), "arguments": describe(fields)}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):  # lists of configuration libraries, too
        return [describe(item) for item in value]
    raise ValueError(
        f"a {type(value).__name__} cannot be kept in a model file: give numbers, texts, Models or dataclasses"
    )


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; OSError where there is no room for it."""
    with written_beside(path) as beside:
        permissions = beside.stat().st_mode
        try:
            save_file(tensors, beside, header)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from None
        beside.chmod(permissions)  # as of any new file: safetensors makes its own readable by the owner alone


def fingerprint(model: Model) -> dict[str, Any]:
    """What a model's results depend on, as JSON has it: class, arguments, and a number of the weights."""
    return {**describe(model), "weights": weights_digest(model.state_dict())}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A number of weights and their names, in this order, whatever their type and device."""
    weights = hashlib.sha256()
    for name, value in state.items():
        weights.update(name.encode())
        weights.update(value.float().cpu().contiguous().numpy().data)
    return weights.hexdigest()[:16]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A module's weights as its `state_dict` has them, but as parameters, and those that lie elsewhere too."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        kept = module._non_persistent_buffers_set
        own = chain(module._parameters.items(), ((n, b) for n, b in module._buffers.items() if n not in kept))
        found |= {f"{path}.{name}".removeprefix("."): value for name, value in own if value is not None}
    return found


def class_name(kind: type) -> str:
    """`package.module:Class`, as files name it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def rebuild(described: Any, path: str | Path, allow: tuple[str, ...]) -> Any:
    """What :func:`describe` described in the file ``path``; ValueError for a class outside of the packages allowed."""
    if isinstance(described, list):
        return [rebuild(item, path, allow) for item in described]
    if not isinstance(described, dict):
        return described
    if described.keys() - {"origin"} != {"class", "arguments"}:
        return {key: rebuild(item, path, allow) for key, item in described.items()}
    kind = _resolve(described["class"], path, allow)
    try:
        arguments = rebuild(described["arguments"], path, allow)
        _require_plain_types(kind, arguments)
        built = kind(**arguments)
        origin = Origin(**described["origin"]) if "origin" in described else None
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} describes a {kind.__name__} of another version ({error})") from None
    if origin is not None:
        bring_weights(built, origin, Path(path))
    return built


def bring_weights(model: Model, origin: Origin, path: Path) -> None:
    """Give a model the weights that its file ``path`` leaves out.

    The file names a place, and so chooses what is read there. That is harmless, unlike naming a model file: its own
    header says which model it is, down to the last layer, what is read are numbers (:meth:`Model.weights_at`), and
    these must be those that the header knows.

    Raises:
        FileNotFoundError: they are neither there, nor beside the file.
        ValueError: others are.
    """
    known, name = Path(origin.place), type(model).__name__
    places = [known, path.absolute().parent / known.name] if (given := _weights.get()) is None else [given]
    there = [place for place in places if place.exists()]
    ways = "name where they are with --weights, or Model.load(weights=...)"
    if not there:
        missing = " nor ".join(str(place) for place in dict.fromkeys(places))
        raise FileNotFoundError(
            f"{path} leaves out the frozen weights of its {name}, and there is no {missing}: {ways}"
        )
    state = model.weights_at(there[0], origin.part)
    if weights_digest(dict(sorted(state.items()))) != origin.weights:
        raise ValueError(
            f"{path} was made with the frozen weights of a {name} that lay in {known}, but {there[0]} holds others:"
            f" {ways}"
        )
    assign(model, state, f"{there[0]} does not fit the {name} that {path} describes")
    model.origin = dataclasses.replace(origin, place=str(there[0].absolute()))


def leave_weights(model: Model, place: Path, part: str = "") -> None:
    """Have files leave out the weights of a model, which were read there."""
    weights = weights_digest(dict(sorted(model.state_dict().items())))
    model.origin = Origin(str(place.absolute()), part, weights)


def _require_plain_types(kind: type, arguments: Mapping[str, Any]) -> None:
    """TypeError for a text where a constructor takes a number, and the like, as far as its types are Python's own."""
    plain: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool, type(None): type(None)}
    try:
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    except NameError:  # a type that is imported for checkers alone
        return
    for name in arguments.keys() & hints.keys():
        hint = hints[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(k in plain for k in kinds) and not any(isinstance(arguments[name], plain[k]) for k in kinds):
            raise TypeError(f"{name} is {arguments[name]!r}")


def _recording(constructor: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which first notes its arguments, unless that of a subclass has."""
    signature = inspect.signature(constructor)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        raise TypeError(f"{constructor.__qualname__} takes *arguments, which have no names in a file: take a sequence")
    options = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(constructor)
    def recording(self: Model, *args: Any, **kwargs: Any) -> None:
        if "arguments" not in self.__dict__:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = dict(list(bound.arguments.items())[1:])  # all but the instance
            further = given.pop(options, {})  # those of `**options`
            self.__dict__["arguments"] = given | further
        constructor(self, *args, **kwargs)

    return recording


class _Undrawn(TorchFunctionMode):
    """Draws no numbers where modules fill tensors from the global generator; deterministic fills are done.

    Rejection sampling, as in `trunc_normal_`, takes NaN at once, where arbitrary memory could make it try for ever.
    """

    INITS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)  # the others come down to the methods
    METHODS = (Tensor.uniform_, Tensor.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None and func in self.INITS:
            return args[0] if args else kwargs["tensor"]
        if kwargs.get("generator") is None and func in self.METHODS:
            return args[0].fill_(torch.nan)
        return func(*args, **kwargs)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A model file and its header; an error that says what to do if it is none."""
    if not path.is_file():
        if not path.is_dir():
            raise FileNotFoundError(f"there is no model file {path}")
        if (path / "model.safetensors").is_file():
            raise FileNotFoundError(f"{path} is a folder: name the model.safetensors in that folder")
        raise FileNotFoundError(f"{path} is {folder_in_words(path)}: name a model file that diffperception wrote")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"{path} was not written by this version of diffperception: `diffperception convert` reads foreign"
                    " checkpoints"
                )
            yield file, header
    except SafetensorError as error:
        advice = "take the model.safetensors beside it" if path.suffix == ".ckpt" else "copy or export it again"
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {advice}") from None


def _resolve(name: str, path: str | Path, allow: tuple[str, ...]) -> type:
    """The class that a file names; ValueError unless it is a model's, or a dataclass, of an allowed package."""
    module, _, attribute = str(name).partition(":")
    if (package := module.split(".")[0]) not in allow:
        raise ValueError(
            f"{path} names the class {name}: pass allow=({package!r},), or --trust {package}, if you trust it"
        )
    try:
        found = functools.reduce(getattr, attribute.split("."), cast(Any, importlib.import_module(module)))
    except (ImportError, AttributeError) as error:
        if isinstance(error, ImportError) and error.name and error.name.split(".")[0] != package:  # a neighbour
            raise ValueError(f"{path} names {name}, which cannot be imported: {error}") from None
        raise ValueError(f"{path} names {name}, which there is not in this version") from None
    own = isinstance(found, type) and class_name(found) == name
    if own and (issubclass(found, Model) or dataclasses.is_dataclass(found)):
        return found
    raise ValueError(f"{path} names {name}, which is not a model of this version")
