"""Starting from weights of another model: whatever fits by name and shape, layers of classes row by row."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffperception.files import CHECKPOINT
from diffperception.models.backbones.base import Backbone
from diffperception.models.base import Model, describe, is_model_file
from diffperception.models.convert.checkpoints import is_diffusers_folder, state_of
from diffperception.models.generator import load_generator

LEAST = 1 / 3  # of some part of the model, or of the file, must fit, or the file is of something else
COUNTER = "num_batches_tracked"  # of norms, where people turn all of a file to float16 too
LISTED = 4  # names or groups of names in a line of the report
REFERENCES = ("head_series.", "input_blocks.")  # in the names of checkpoints that `diffperception convert` reads


class ClassRows(NamedTuple):
    """Of a weight that has a row per class: along which axis, and the names; no axis where it can only be guessed."""

    axis: int | None
    classes: Sequence[str]


@dataclass(frozen=True)
class Source:
    """What a file has to give: weights by name, which of them have a row per class, and what it is, in words."""

    path: Path
    state: Mapping[str, Tensor]
    rows: Mapping[str, ClassRows]
    what: str
    model: Model | None = None  # that was described in the file


@dataclass
class WarmStart:
    """What a model was given of a file.

    Attributes:
        path, what: the file, and what it holds, in words.
        parts: numbers of parameters, taken and in all, of each part of the model.
        classes: of the model's classes, those whose rows were taken, and their names in the file.
        new_classes: the others; empty for a model without classes.
        anew: names of weights that begin anew in parts of which something is taken, with their shapes, and the file's
            where it has others.
        unused: names of the file's weights that were not taken.
        settings: arguments that have no weights and other values in the file, and so may mean something else.
    """

    path: Path
    what: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    new_classes: list[str] = field(default_factory=list)
    anew: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        taken, whole = (sum(numbers) for numbers in zip(*self.parts.values(), strict=True))
        parts = ", ".join(f"{part} {_share(*numbers)}" for part, numbers in self.parts.items())
        lines = [f"starting from {self.path} ({self.what}): {_share(taken, whole)} parameters taken: {parts}"]
        if self.classes or self.new_classes:
            renamed = (new if new == old else f"{new} (there {old})" for new, old in self.classes.items())
            lines.append(f"classes taken by name: {_listed(list(renamed))}; anew: {_listed(self.new_classes)}")
        if self.anew:
            lines.append(f"weights anew in parts that are taken: {_listed(_grouped(self.anew))}")
        if self.unused:
            lines.append(f"left in the file: {_listed(_grouped(dict.fromkeys(self.unused, '')))}")
        if self.settings:
            lines.append(f"set otherwise there: {_listed(self.settings)}")
        return "\n  ".join(lines)


def warm_start(model: nn.Module, path: str | Path, below: str = "") -> WarmStart:
    """Give a model the weights of a file that fit by name and shape; all others stay as they are.

    The file is one of ours, of any model (:meth:`Model.load`, with the package of this model's class allowed), or
    weights alone, whose names may have a prefix, or a generator's folder of diffusers. They are looked for below the
    model itself, and below the models and backbones in it, so that a detector takes the backbone of another one, a timm
    model's weights or a generator's UNet. Weights with a row per class (:attr:`Model.class_layers`) take the rows of
    classes with the same name, whatever their order; failing that, of the one that differs only in case, spaces, `_` or
    `-`. Rows after those of the classes, as for no class, are taken where both have as many. Whatever the model was, it
    is changed whole or not at all.

    Args:
        model: what is to be trained.
        path: the file.
        below: only the model's weights whose names begin with this are given any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no model or weights, not a third of any part of the model nor of the file fits, or numbers
            are not finite.
    """
    source = read_source(Path(path), (type(model).__module__.split(".")[0],))
    state = {name: value for name, value in model.state_dict().items() if name.startswith(below)}
    rows = class_rows(model)
    pairs = _pairs(state, rows, source, _roots(model))
    values = {
        ours: _taken(state[ours], source.state[theirs], rows.get(ours), source.rows.get(theirs))
        for ours, theirs in pairs.items()
    }
    report = _report(model, state, rows, source, pairs)
    _require_fit(model, source, report, {name: value.to(state[name].dtype) for name, value in values.items()})
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    return report


def read_source(path: Path, allow: tuple[str, ...] = ()) -> Source:
    """The weights of a file, of our own or not, or a folder of diffusers; errors as for :func:`warm_start`."""
    if is_model_file(path) or is_diffusers_folder(path):
        model = load_generator(path) if path.is_dir() else Model.load(path, allow=allow)
        classes = getattr(model, "classes", None)
        of_classes = f" of {len(classes)} class{'es' if len(classes) > 1 else ''}" if classes else ""
        return Source(path, model.state_dict(), class_rows(model), f"{type(model).__name__}{of_classes}", model)
    beside = path.with_name("model.safetensors")
    if path.name == CHECKPOINT and is_model_file(beside):  # other programs have files of this name too
        raise ValueError(f"{path} is what --resume goes on from: name {beside} instead")
    state = state_of(path)
    return Source(path, state, {}, f"{len(state)} weights without a description")


def class_rows(model: nn.Module) -> dict[str, ClassRows]:
    """The weights of a model, by name, that have a row per class."""
    names, found = list(model.state_dict()), dict[str, ClassRows]()
    models = {path: module for path, module in model.named_modules() if isinstance(module, Model)}
    for path, module in models.items():
        classes = _classes_of(models, path)
        for pattern, axis in module.class_layers.items():
            full = f"{path}.{pattern}.*".removeprefix(".")
            found |= {name: ClassRows(axis, classes or []) for name in names if fnmatch(name, full)}
    for path, module in models.items():
        classes = getattr(module, "classes", None)
        if classes and not any(list(rows.classes) == list(classes) for rows in found.values()):
            found |= {name: ClassRows(None, classes) for name in _guessed(module, path, len(classes))}
    return found


def _classes_of(models: Mapping[str, Any], path: str) -> Sequence[str] | None:
    """The names of the classes of the innermost model around a module that has some."""
    around = [outer for outer in models if f"{path}.".startswith(f"{outer}.") or not outer]
    named = [outer for outer in around if hasattr(models[outer], "classes")]
    return models[max(named, key=len)].classes if named else None


def _guessed(module: nn.Module, path: str, count: int) -> list[str]:
    """Names of weights that may have a row per class, of a model that does not say which have: none of a backbone."""
    places = _places(module)
    return [
        f"{path}.{name}".removeprefix(".")
        for name, value in module.state_dict().items()
        if value.ndim and value.shape[0] == count and not name.startswith(tuple(places))
    ]


def same_classes(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int]:
    """The places among `theirs` of our classes, by name: the same one, or the only one that is written otherwise.

    Numbers from 0 on stand for classes without a name, and are those of a list of the same numbers alone.
    """
    numbers = [str(label) for label in range(len(theirs))]
    if list(theirs) == numbers and list(ours) != numbers:
        return {}
    exact = {i: theirs.index(name) for i, name in enumerate(ours) if name in theirs}
    loose, other = ([_spelt(name) for name in names] for names in (ours, theirs))
    free = set(range(len(theirs))) - set(exact.values())
    for i, name in enumerate(loose):
        if i not in exact and loose.count(name) == other.count(name) == 1 and (place := other.index(name)) in free:
            exact[i] = place
    return dict(sorted(exact.items()))


def _spelt(name: str) -> str:
    """A name without what people write in several ways."""
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()


def _roots(model: nn.Module) -> list[str]:
    """Beginnings of names below which a file's may lie: the model's, and those of models and backbones in it."""
    roots = []
    for path, module in model.named_modules():
        if isinstance(module, Model):
            roots.append(path)
        if isinstance(module, Backbone):
            roots += (f"{path}.{inner}".removeprefix(".") for inner in _bodies(module))
    return [f"{root}." if root else "" for root in dict.fromkeys(roots)]


def _bodies(backbone: nn.Module) -> Iterator[str]:
    """The networks that a backbone is around, and those that are all that these hold."""
    for name, module in backbone.named_children():
        yield name
        while len(children := dict(module.named_children())) == 1:
            (inner, module), *_ = children.items()
            yield (name := f"{name}.{inner}")


def _pairs(
    state: Mapping[str, Tensor], rows: Mapping[str, ClassRows], source: Source, roots: Sequence[str]
) -> dict[str, str]:
    """The file's name of each of the model's weights that fits; of a layer of which one has another shape there, none.

    Below each root, outer ones first, names are the same but for one prefix in the file: that with which most numbers
    fit. timm writes _ for the dots in names of a network that gives feature maps, so no difference is made.
    """
    pairs: dict[str, str] = {}
    for root in roots:
        below = {_plain(n.removeprefix(root)): n for n in state if n.startswith(root) and n not in pairs}
        used = set(pairs.values())
        free = {_plain(name): name for name in source.state if name not in used}
        votes: Counter[str] = Counter()
        for plain, theirs in free.items():
            for start in [0, *(found.end() for found in re.finditer("_", plain))]:
                ours = below.get(plain[start:])
                if ours is not None and _may_give(state, rows, source, ours, theirs):
                    votes[plain[:start]] += state[ours].numel()
        if votes:
            prefix = max(votes, key=lambda prefix: (votes[prefix], -len(prefix)))
            there = {ours: free[prefix + plain] for plain, ours in below.items() if prefix + plain in free}
            wrong = {ours for ours, theirs in there.items() if not _may_give(state, rows, source, ours, theirs)}
            layers = {_layer(ours) for ours in wrong if not ours.endswith(COUNTER)}  # no bias without its weight
            pairs |= {ours: n for ours, n in there.items() if ours not in wrong and _layer(ours) not in layers}
    return pairs


def _may_give(
    state: Mapping[str, Tensor], rows: Mapping[str, ClassRows], source: Source, ours: str, theirs: str
) -> bool:
    return _fits(state[ours], source.state[theirs], rows.get(ours), source.rows.get(theirs))


def _layer(name: str) -> str:
    """The name of the module that a weight is of."""
    return name.rpartition(".")[0]


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _fits(ours: Tensor, theirs: Tensor, our_rows: ClassRows | None, their_rows: ClassRows | None) -> bool:
    """Whether a weight can be taken; of one with a row per class, at least one row."""
    if ours.is_floating_point() != theirs.is_floating_point() or ours.ndim != theirs.ndim:
        return False
    if our_rows is None and their_rows is None:
        return ours.shape == theirs.shape
    if our_rows is None or their_rows is None:
        return False
    if list(our_rows.classes) == list(their_rows.classes):
        return ours.shape == theirs.shape or (our_rows.axis is not None and _alike(ours, theirs, our_rows.axis))
    if our_rows.axis is None or our_rows.axis != their_rows.axis:
        return False
    return bool(same_classes(our_rows.classes, their_rows.classes)) and _alike(ours, theirs, our_rows.axis)


def _alike(ours: Tensor, theirs: Tensor, axis: int) -> bool:
    """Whether shapes are the same but along an axis."""
    sizes = zip(ours.shape, theirs.shape, strict=True)
    return all(a == b for i, (a, b) in enumerate(sizes) if i != axis)


def _taken(ours: Tensor, theirs: Tensor, our_rows: ClassRows | None, their_rows: ClassRows | None) -> Tensor:
    """What our weight becomes: theirs, or, with a row per class, those of theirs that ours has too."""
    if our_rows is None or their_rows is None or our_rows.axis is None:
        return theirs
    value, axis = ours.clone(), our_rows.axis
    for to, place in same_classes(our_rows.classes, their_rows.classes).items():
        value.select(axis, to).copy_(theirs.select(axis, place))
    further = ours.shape[axis] - len(our_rows.classes)
    if further and further == theirs.shape[axis] - len(their_rows.classes):
        value.narrow(axis, len(our_rows.classes), further).copy_(theirs.narrow(axis, len(their_rows.classes), further))
    return value


def _report(
    model: nn.Module,
    state: Mapping[str, Tensor],
    rows: Mapping[str, ClassRows],
    source: Source,
    pairs: Mapping[str, str],
) -> WarmStart:
    report = WarmStart(source.path, source.what)
    parameters, places = dict(model.named_parameters()), _places(model)
    for name, value in state.items():
        share = 0.0
        if name in pairs:
            share = _taken_share(value, rows.get(name), source.rows.get(pairs[name]))
        elif name.rpartition(".")[2] in ("weight", "bias") or name in parameters:
            report.anew[name] = _mismatch(name, value, source)
        if name in parameters:
            part = _part(name, places)
            taken, whole = report.parts.get(part, (0, 0))
            report.parts[part] = (taken + round(share * value.numel()), whole + value.numel())
    report.anew = {name: said for name, said in report.anew.items() if report.parts.get(_part(name, places), (1,))[0]}
    classes = getattr(model, "classes", None) or []
    ours = [name for name in pairs if name in rows and list(rows[name].classes) == list(classes)]
    found = source.rows[pairs[ours[0]]].classes if ours else []
    report.classes = {classes[i]: found[place] for i, place in same_classes(classes, found).items()}
    report.new_classes = [name for name in classes if name not in report.classes]
    used = set(pairs.values())
    report.unused = [name for name in source.state if name not in used and not name.endswith(COUNTER)]
    if isinstance(model, Model) and type(source.model) is type(model):
        ours_set, theirs_set = (dict(_settings(describe(m.arguments))) for m in (model, source.model))
        both = [name for name in ours_set if name in theirs_set and ours_set[name] != theirs_set[name]]
        report.settings = [f"{name} {theirs_set[name]} (here {ours_set[name]})" for name in both]
    return report


def _settings(described: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, texts and switches among a model's and its parts' arguments, by dotted names; not those of classes."""
    for name, value in described.items():
        if isinstance(value, Mapping):
            yield from _settings(value.get("arguments", value), f"{before}{name}.")
        elif not isinstance(value, list) and name != "num_classes":
            yield f"{before}{name}", value


def _taken_share(ours: Tensor, our_rows: ClassRows | None, their_rows: ClassRows | None) -> float:
    """The fraction of a weight that is taken of one that fits."""
    if our_rows is None or their_rows is None or our_rows.axis is None:
        return 1.0
    return len(same_classes(our_rows.classes, their_rows.classes)) / ours.shape[our_rows.axis]


def _mismatch(name: str, value: Tensor, source: Source) -> str:
    """The shape of a weight that begins anew, and that of the file's weight of this name if it has another one."""
    theirs = source.state.get(name)
    if theirs is None or theirs.shape == value.shape:
        return f"{tuple(value.shape)}"
    return f"{tuple(value.shape)} here, {tuple(theirs.shape)} there"


def _places(model: nn.Module) -> dict[str, str]:
    """What the beginnings of names say of a weight's part: of backbones, and of the pyramids around them."""
    places = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if path and isinstance(module, Backbone):
            places[f"{path}."] = "backbone"
            around = path.rpartition(".")[0]
            if around and not isinstance(modules[around], Model):
                places[f"{around}."] = "pyramid"
    return places


def _part(name: str, places: Mapping[str, str]) -> str:
    """The part of a model that a weight is of."""
    for start in sorted(places, key=len, reverse=True):
        if name.startswith(start):
            return places[start]
    return name.removeprefix("model.").partition(".")[0]


def _require_fit(model: nn.Module, source: Source, report: WarmStart, values: Mapping[str, Tensor]) -> None:
    """ValueError if too little fits, or something that does is not finite."""
    of_file = [sum(value.numel() for value in weights.values()) for weights in (values, source.state)]
    if not any(taken >= LEAST * whole > 0 for taken, whole in (*report.parts.values(), of_file)):
        of_reference = any(place in name for name in report.unused for place in REFERENCES)
        convert, other = "make a model file of it with `diffperception convert` first", "name another file"
        names = _listed(_grouped(dict.fromkeys(report.unused, ""))[:3])
        raise ValueError(
            f"{report.path} ({report.what}: {names}) fits too little of this {type(model).__name__}: by name and shape"
            f" less than a third of any part, and of the file; {convert if of_reference else other}"
        )
    for name, value in values.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{report.path} has numbers that are not finite in its weights for {name}: take another file"
            )


def _share(taken: int, whole: int) -> str:
    """Such as `1.20 of 3.40 M`."""
    if taken == whole:
        return f"all of {whole / 1e6:.2f} M"
    return f"{taken / 1e6:.2f} of {whole / 1e6:.2f} M" if taken else f"none of {whole / 1e6:.2f} M"


def _grouped(described: Mapping[str, str]) -> list[str]:
    """Names with what is said of them, those that differ in numbers alone as one with how many they are."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, said in described.items():
        groups.setdefault((re.sub(r"\d+", "*", name), said), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{len(names)} x {pattern}'}{said and f' {said}'}"
        for (pattern, said), names in groups.items()
    ]


def _listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "") if names else "none"
