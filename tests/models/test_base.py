"""Model files: what is kept, what is refused, and that users' own classes come back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffperception.models import Backbone, Condition, Conditioner, FeatureInfo, Model
from diffperception.models.base import FORMAT, describe, file_kind
from tests.helpers.networks import tiny_unet
from tests.training.tiny_detector import TinyDetector

OURS = ("tests",)  # the package of the classes below


@dataclass
class Settings:
    """A user's options."""

    rate: float = 0.5
    names: list[str] = field(default_factory=lambda: ["a", "b"])


class Part(Model):
    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(width))
        self.register_buffer("count", torch.tensor(3))


class Whole(Model):
    """Arguments of every kind that a file keeps."""

    kind = "whole"

    def __init__(
        self,
        parts: Sequence[Part],
        by_name: dict[str, Part],
        settings: Settings = Settings(),  # noqa: B008 (not changed)
        folder: Path = Path("nowhere"),
        shape: tuple[int, int] = (2, 3),
        nothing: None = None,
        *,
        flag: bool = True,
        **more: float,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.by_name = nn.ModuleDict(by_name)
        self.linear = nn.Linear(*shape)
        self.settings, self.more = settings, more


class Special(Whole):
    """A subclass with fewer arguments, which its file names instead of its parent's."""

    def __init__(self, width: int) -> None:
        super().__init__([Part(width)], {"one": Part(width)}, thickness=width)


class Silent(Whole):
    """A subclass without a constructor of its own."""


class OwnBackbone(Backbone):
    multiple = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.info = [FeatureInfo("only", channels, 4)]
        self.conv = nn.Conv2d(3, channels, 4, stride=4)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.conv(images)]


class Holder(Model):
    """Like a detector, it takes parts of any kind."""

    def __init__(self, backbone: Backbone, conditioner: Conditioner | None = None) -> None:
        super().__init__()
        self.backbone, self.conditioner = backbone, conditioner


class Pretrained(Model):
    """Replaces an argument by what it stands for."""

    def __init__(self, source: str, fetch: bool = True) -> None:
        super().__init__()
        if fetch:
            raise RuntimeError("there is no network here")
        self.record(fetch=False, source=source.upper())


def whole() -> Whole:
    return Whole([Part(2), Part(3, 2.0)], {"x": Part(4)}, Settings(0.1, ["c"]), Path("a/b"), flag=False, thickness=0.25)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("make", [whole, lambda: Special(5), lambda: Silent([], {}), lambda: Holder(OwnBackbone(8))])
def test_models_come_back_with_all_their_arguments(tmp_path: Path, make: Any) -> None:
    model, path = make(), tmp_path / "deep" / "model.safetensors"
    model.save(path)
    loaded = Model.load(path, allow=OURS)
    assert type(loaded) is type(model)
    assert describe(loaded) == describe(model)
    assert_same(loaded, model)
    assert not loaded.training
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_dataclasses_lists_and_further_keywords_are_arguments(tmp_path: Path) -> None:
    whole().save(tmp_path / "model.safetensors")
    loaded = Whole.load(tmp_path / "model.safetensors", allow=OURS)
    assert loaded.settings == Settings(0.1, ["c"])
    assert loaded.more == {"thickness": 0.25}
    assert [part.arguments for part in loaded.parts] == [{"width": 2, "scale": 1.0}, {"width": 3, "scale": 2.0}]  # type: ignore[union-attr]
    assert loaded.arguments["folder"] == "a/b"


class Witness(Model):
    """Sees whether its layers draw their weights."""

    def __init__(self) -> None:
        super().__init__()
        before = torch.get_rng_state()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 1), nn.Embedding(3, 4), nn.LSTM(2, 2))
        garbage = nn.init.constant_(nn.Parameter(torch.empty(5)), 7.0)
        nn.init.trunc_normal_(garbage)  # comes to an end, whatever is in memory
        self.register_buffer("fixed", nn.init.constant_(torch.full((2,), 5.0), 0.5), persistent=False)
        nn.init.xavier_uniform_(self.layers[0].weight)
        self.drew = not torch.equal(before, torch.get_rng_state())


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    assert Witness().drew
    Witness().save(tmp_path / "model.safetensors")
    loaded = Witness.load(tmp_path / "model.safetensors", allow=OURS)
    assert not loaded.drew
    assert loaded.fixed.tolist() == [0.5, 0.5]  # type: ignore[union-attr,operator]
    whole().save(tmp_path / "whole.safetensors")
    tiny_unet().save(tmp_path / "unet.safetensors")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for name in ("model", "whole", "unet"):
        Model.load(tmp_path / f"{name}.safetensors", allow=OURS)
    assert torch.equal(torch.rand(4), expected)


def test_weights_are_put_where_and_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole().save(path)
    half = Whole.load(path, dtype=torch.bfloat16, allow=OURS)
    assert half.linear.weight.dtype == torch.bfloat16
    assert half.parts[0].count.dtype == torch.int64  # type: ignore[union-attr]
    assert Whole.load(path, device="meta", allow=OURS).device.type == "meta"
    half.save(path)
    assert Whole.load(path, allow=OURS).linear.weight.dtype == torch.bfloat16  # as in the file
    assert all(parameter.requires_grad for parameter in half.parameters())


def test_an_argument_that_was_replaced_is_kept_as_such(tmp_path: Path) -> None:
    model = Pretrained("abc", fetch=False)
    model.save(tmp_path / "model.safetensors")
    assert Pretrained.load(tmp_path / "model.safetensors", allow=OURS).arguments == {"source": "ABC", "fetch": False}


@pytest.mark.parametrize("value", [object(), torch.zeros(2), nn.Linear(1, 1), {1, 2}])
def test_an_argument_that_no_file_can_keep_is_named(tmp_path: Path, value: Any) -> None:
    part = Part(2)
    part.record(scale=value)
    with pytest.raises(ValueError, match=f"a {type(value).__name__} cannot be kept in a model file"):
        part.save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_header_says_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole().save(path)
    assert file_kind(path) == "whole"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == FORMAT
    assert header["class"] == "tests.models.test_base:Whole"
    assert json.loads(header["arguments"])["settings"]["class"] == "tests.models.test_base:Settings"


# What is refused


def write(path: Path, name: str, arguments: str = "{}", kind: str = FORMAT) -> Path:
    save_file({"weight": torch.zeros(1)}, path, {"format": kind, "class": name, "arguments": arguments})
    return path


def test_a_file_names_no_class_outside_the_package_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    Part(3).save(path)
    with pytest.raises(ValueError, match=r"test_base:Part: pass allow=\('tests',\), or --trust tests, if"):
        Model.load(path)
    assert isinstance(Model.load(path, allow=OURS), Part)
    assert isinstance(Model.load(path, allow="tests"), Part)
    with pytest.raises(ValueError, match="allow"):
        Model.load(path, allow=("test",))


def test_what_takes_a_model_takes_its_file_too(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save(tmp_path / "model.safetensors")
    assert Model.loaded(unet) is unet
    again = Model.loaded(str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(again.parameters(), unet.parameters(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "diffperception.models.base:Path",
        "diffperception.models.base:importlib.import_module",
        "diffperception.models.base:Model.load",
        "diffperception.models.base:json.loads",
        "diffperception.models.base:nothing",
        "diffperception.models.unet.unet:torch.nn.Linear",
        "diffperception",
        ":",
        "",
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_names_of_anything_but_models_are_refused(tmp_path: Path, name: str, inside: bool) -> None:
    arguments = json.dumps({"network": {"class": name, "arguments": {}}} if inside else {})
    outer = "diffperception.models.generator:DiffusionModel" if inside else name
    with pytest.raises(ValueError, match=r"model\.safetensors names"):
        Model.load(write(tmp_path / "model.safetensors", outer, arguments))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("segmentation.feature_folder:ExtractedFeatures", {"folder": ".", "allow": ["evil"]}),
        ("segmentation.features:DiffusionFeatures", {"generator": "extractor.safetensors"}),
        ("models.reader:ActivationReader", {"generator": "missing.safetensors", "blocks": [0]}),
        ("models.backbones.reader:UNetBackbone", {"unet": "missing.safetensors", "blocks": [0]}),
    ],
)
def test_a_file_loads_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    write(tmp_path / "extractor.safetensors", "evil:Model")
    path = write(tmp_path / "model.safetensors", f"diffperception.{name}", json.dumps(arguments))
    with pytest.raises(ValueError, match=r"model\.safetensors names the file (missing|extractor)\.safetensors"):
        Model.load(path)
    tiny_unet().save(path)
    Model.load(path)  # what was refused does not hinder the next


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("models.space:Pixels", "[1]"),
        ("models.space:Pixels", "{"),
        ("models.space:Pixels", "[" * 10**5),
        ("models.space:Pixels", '{"unknown": 1}'),
        ("models.generator:DiffusionModel", '{"network": [1], "classes": null}'),
        ("models.generator:DiffusionModel", '{"network": {"class": 1, "arguments": {}}}'),
    ],
)
def test_headers_that_do_not_fit_are_one_sentence(tmp_path: Path, name: str, arguments: str) -> None:
    path = write(tmp_path / "model.safetensors", f"diffperception.{name}", arguments)
    with pytest.raises(ValueError, match=r"another version|does not say which model|names the class 1:"):
        Model.load(path)


def test_a_constructor_of_arguments_without_names_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes \*arguments, which have no names"):
        type("Nameless", (Model,), {"__init__": lambda self, *parts: None})


def test_an_argument_of_another_type_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "diffperception.models.space:Pixels", '{"channels": [3]}')
    with pytest.raises(ValueError, match=r"describes a Pixels of another version \(channels is \[3\]\)"):
        Model.load(path)


def test_weights_of_half_the_precision_are_all_of_it(tmp_path: Path) -> None:
    model = TinyDetector(["a", "b"]).to(torch.bfloat16)
    model.save(tmp_path / "model.safetensors")
    assert TinyDetector.load(tmp_path / "model.safetensors", allow=("tests",)).box.weight.dtype == torch.bfloat16
    model.box.double()
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"types that do not go together \(bfloat16, float64, int64\)"):
        TinyDetector.load(tmp_path / "model.safetensors", allow=("tests",))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "diffperception.models.space:Pixels", '{"channels": 3}')
    with pytest.raises(ValueError, match=r"does not fit the Pixels it describes: 1 name is left over: weight"):
        Model.load(path)


def test_another_model_than_was_asked_for_is_refused(tmp_path: Path) -> None:
    tiny_unet().save(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet\.safetensors holds a UNet, not a Whole"):
        Whole.load(tmp_path / "unet.safetensors")


def test_a_file_cut_in_half_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tiny_unet().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        Model.load(path)
    with pytest.raises(FileNotFoundError, match=r"name the model\.safetensors in that folder"):
        Model.load(tmp_path)
    with pytest.raises(ValueError, match=r"take the model\.safetensors beside it"):
        Model.load(path.rename(tmp_path / "last.ckpt"))


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    with pytest.raises(FileNotFoundError, match=r"foreign\.safetensors"):
        Model.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    for read in (Model.load, file_kind):
        with pytest.raises(ValueError, match="`diffperception convert` reads foreign checkpoints"):
            read(path)


class Twins(Model):
    """Two layers that share their weights, which safetensors refuses to write."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(2, 2)


def test_a_failure_leaves_nothing_beside(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="share memory"):
        Twins().save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: name a file"):
        Part(1).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Words(Conditioner):
    """A user's conditioner, of the length of texts."""

    has_absent = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, said: list[str]) -> Condition:
        return Condition(vector=torch.tensor([[float(len(text))] for text in said]) * self.weight)

    def read(self, targets: Sequence[Any]) -> list[str]:
        return [target["caption"] for target in targets]

    def absent(self, batch: int) -> list[str]:
        return [""] * batch

    def drop(self, said: list[str], dropped: Tensor) -> list[str]:
        return ["" if gone else text for text, gone in zip(said, dropped, strict=True)]

    def choose(self, names: Sequence[str] | None, numbers: Sequence[int]) -> list[str]:
        return [list(names or [""])[number % len(names or [""])] for number in numbers]


def test_a_users_parts_come_back_by_their_import_path(tmp_path: Path) -> None:
    model, path = Holder(OwnBackbone(8), Words(6)), tmp_path / "model.safetensors"
    model.save(path)
    loaded = Holder.load(path, allow=OURS)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.backbone(images)[0], model.backbone(images)[0])
    assert isinstance(loaded.conditioner, Words)
