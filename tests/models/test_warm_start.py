"""Starting from another model's weights: what is taken, by which names, and what is refused."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffperception.detection import FCOS, BoxSampler, Detector, DiffusionDet, DynamicHead
from diffperception.models import DiffusionModel, NoisyClassifier, UNetBackbone
from diffperception.models.warm_start import same_classes, warm_start
from diffperception.segmentation import PixelEnsemble, PixelSegmenter, RGBFeatures
from tests.detection.test_reference_checkpoints import RESNET50, SMALL_HEAD, head_shapes, resnet_shapes
from tests.helpers.networks import two_level_unet
from tests.parity import fill_state

HEAD = partial(DynamicHead, width=16, stages=2, pool_size=3, dynamic_width=8, ffn_width=16, num_heads=2)
PRIOR = -4.59512  # log(0.01 / 0.99), of a class layer's bias at the beginning


def detector(
    classes: list[str], backbone: str | UNetBackbone = "resnet10t", head=HEAD, strides=(8, 16)
) -> DiffusionDet:
    return DiffusionDet(classes, backbone, head, strides=strides, num_boxes=5, min_size=None)


def saved(model: nn.Module, path: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is as any other model begins
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save(path / "source.safetensors")
    return path / "source.safetensors"


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_classes_are_taken_by_name_whatever_their_order_and_new_ones_begin_as_always(tmp_path: Path) -> None:
    source, model = detector(["cat", "dog", "cow"]), detector(["dog", "hen", "cat", "owl"])
    path, before = saved(source, tmp_path), state(model)
    report = warm_start(model, path)
    theirs, now = source.state_dict(), model.state_dict()
    for name, value in now.items():
        if "class_logits" in name:
            assert torch.equal(value[0], theirs[name][1])
            assert torch.equal(value[2], theirs[name][0])
            assert torch.equal(value[[1, 3]], before[name][[1, 3]])
        else:
            assert torch.equal(value, theirs[name]), name
    assert now["head.stages.1.class_logits.bias"][[1, 3]].tolist() == pytest.approx([PRIOR, PRIOR], abs=1e-4)
    assert report.classes == {"dog": "dog", "cat": "cat"}
    assert report.new_classes == ["hen", "owl"]
    assert not report.anew
    assert not report.unused
    assert [taken == whole for taken, whole in report.parts.values()] == [True, True, False]
    assert list(report.parts) == ["backbone", "pyramid", "head"]
    assert "classes taken by name: dog, cat; anew: hen, owl" in str(report)


@pytest.mark.parametrize("classes", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_classes_of_other_names_begin_anew_with_as_many_of_them_too(tmp_path: Path, classes: list[str]) -> None:
    path, model = saved(detector(["x", "y", "z"]), tmp_path), detector(classes)
    before = state(model)
    report = warm_start(model, path)
    anew = [
        name
        for name, value in model.state_dict().items()
        if value.dtype.is_floating_point and torch.equal(value, before[name])
    ]
    assert set(report.anew) == {n for n in before if "class_logits" in n} <= set(anew)
    assert report.classes == {}


@pytest.mark.parametrize(
    ("ours", "theirs", "places"),
    [
        (["a", "b"], ["b", "a"], {0: 1, 1: 0}),
        (["Person", "stop_sign"], ["stop sign", "person"], {0: 1, 1: 0}),
        (["person", "Person"], ["Person", "x"], {1: 0}),  # exact names first, and nothing twice
        (["PERSON"], ["person", "Person"], {}),  # which of them is meant?
        (["0", "1"], ["0", "1"], {0: 0, 1: 1}),
        (["1", "x"], ["0", "1", "2"], {}),  # numbers that stand for no names
    ],
)
def test_which_classes_are_the_same(ours: list[str], theirs: list[str], places: dict[int, int]) -> None:
    assert same_classes(ours, theirs) == places


def test_a_shorter_backbone_is_taken_whole_though_it_is_a_small_part_of_a_longer_one(tmp_path: Path) -> None:
    path, model = saved(detector(["a"]), tmp_path), FCOS(["b"], "resnet10t")
    taken, whole = warm_start(model, path).parts["backbone"]
    assert 0 < taken < whole / 3


def test_fewer_stages_and_another_backbone_take_what_fits(tmp_path: Path) -> None:
    source = detector(["a"], head=partial(HEAD, stages=3))
    path, model = saved(source, tmp_path), detector(["a"], "resnet18")
    report = warm_start(model, path)
    assert torch.equal(model.head.stages[1].box_deltas.weight, source.head.stages[1].box_deltas.weight)
    assert report.parts["head"][0] == report.parts["head"][1]
    assert report.parts["backbone"][0] < report.parts["backbone"][1]
    assert any(name.startswith("head.stages.2.") for name in report.unused)
    assert "left in the file: " in str(report)


def test_a_layer_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    path, model = saved(detector(["a"]), tmp_path), detector(["a"], head=partial(HEAD, width=32))
    before = state(model)
    report = warm_start(model, path)
    now = model.state_dict()
    for name in ("head.stages.0.class_logits.bias", "head.stages.1.box_deltas.bias"):  # of the same shape in both
        assert torch.equal(now[name], before[name])
    assert report.classes == {}
    assert report.parts["head"][0] < 0.1 * report.parts["head"][1]


def test_another_networks_weights_are_refused_though_some_have_the_same_shape(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="less than a third of any part"):
        warm_start(detector(["a"], "resnet50"), tmp_path / "resnet18.pth")


def test_more_stages_begin_anew_in_the_last_ones(tmp_path: Path) -> None:
    path, model = saved(detector(["a"]), tmp_path), detector(["a"], head=partial(HEAD, stages=3))
    last = state(model.head.stages[2])
    report = warm_start(model, path)
    assert all(torch.equal(value, last[name]) for name, value in model.head.stages[2].state_dict().items())
    assert all(name.startswith("head.stages.2.") for name in report.anew)


def test_fcos_takes_a_diffusiondets_backbone_and_fcos_its_classes(tmp_path: Path) -> None:
    source = detector(["a"])
    model = FCOS(["a", "b"], "resnet10t", strides=(8, 16), width=64)
    report = warm_start(model, saved(source, tmp_path))
    body, theirs = model.model.backbone.backbone.state_dict(), source.backbone.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in body.items())
    assert list(report.parts) == ["backbone", "pyramid", "head"]
    assert report.parts["head"][0] == 0
    other = FCOS(["b", "c"], "resnet10t", strides=(8, 16), width=64)
    warm_start(other, saved(model, tmp_path))
    logits, known = (m.model.head.classification_head.cls_logits for m in (other, model))
    assert torch.equal(logits.weight[0], known.weight[1])
    assert logits.bias[1].item() == pytest.approx(PRIOR, abs=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "backbone.", "module.model.backbone.0."])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_of_a_backbone_alone_by_timms_names(tmp_path: Path, prefix: str, ending: str) -> None:
    network, model = timm.create_model("resnet10t", num_classes=7), detector(["a"])
    weights = {prefix + name: value + 1 for name, value in network.state_dict().items()}
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        save_file(weights, path)
    before = state(model.head)
    report = warm_start(model, path)
    for name, value in model.backbone.backbone.body.state_dict().items():
        assert torch.equal(value, weights[prefix + name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.head.state_dict().items())
    assert report.parts["backbone"][0] == report.parts["backbone"][1]
    assert sum(name.endswith(("fc.weight", "fc.bias")) for name in report.unused) == 2


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_timms_names_of_networks_that_give_maps(tmp_path: Path, name: str) -> None:
    strides = (16,) if name.startswith("vit") else (8, 16)
    model, network = detector(["a"], name, strides=strides), timm.create_model(name)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    report = warm_start(model, tmp_path / "weights.pt")
    body = {n for n, _ in model.named_parameters() if ".body." in n}
    assert body
    assert not body & set(report.anew)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_files_of_other_number_types_counters_of_norms_included(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in timm.create_model("resnet10t").state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = detector(["a"])
    report = warm_start(model, tmp_path / "w.safetensors")
    assert report.parts["backbone"][0] == report.parts["backbone"][1]
    assert torch.equal(model.backbone.backbone.body.layer1[0].bn1.weight, weights["layer1.0.bn1.weight"].float())
    weights["layer1.0.bn1.weight"][0] = 1e39 if dtype == torch.float64 else torch.inf  # more than a float32 holds
    save_file(weights, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"not finite in its weights for .*layer1\.0\.bn1\.weight"):
        warm_start(model, tmp_path / "large.safetensors")


def test_another_programs_last_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": timm.create_model("resnet10t").state_dict(), "epoch": 1}, tmp_path / "last.ckpt")
    taken, whole = warm_start(detector(["a"]), tmp_path / "last.ckpt").parts["backbone"]
    assert taken == whole


def test_a_frozen_norm_takes_the_statistics_too(tmp_path: Path) -> None:
    model = DiffusionDet(["a"], "resnet10t", HEAD, strides=(8, 16), freeze_norm=True)
    weights = {n: v + 1 for n, v in timm.create_model("resnet10t").state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    warm_start(model, tmp_path / "w.safetensors")
    body = model.backbone.backbone.body.state_dict()
    assert torch.equal(body["layer1.0.bn1.running_mean"], weights["layer1.0.bn1.running_mean"])


def test_a_converted_checkpoint_starts_on_classes_of_ones_own(tmp_path: Path) -> None:
    weights = fill_state(resnet_shapes(RESNET50, width=32) | head_shapes(classes=80, **SMALL_HEAD))
    converted = DiffusionDet.from_reference(weights)
    converted.save(tmp_path / "coco.safetensors")
    head = partial(DynamicHead, **converted.head.arguments | {"num_classes": None})
    head.keywords.pop("num_classes")
    model = DiffusionDet(["Dog", "gear"], "resnet50", head, freeze_norm=True)
    report = warm_start(model, tmp_path / "coco.safetensors")
    place = converted.classes.index("dog")
    for ours, theirs in zip(model.head.stages, converted.head.stages, strict=True):
        assert torch.equal(ours.class_logits.weight[0], theirs.class_logits.weight[place])
        assert torch.equal(ours.box_deltas.weight, theirs.box_deltas.weight)
    assert report.parts["backbone"][0] == report.parts["backbone"][1]
    assert "dog" in str(report)
    assert report.new_classes == ["gear"]
    boxes = [{"boxes": torch.tensor([[1.0, 2.0, 20.0, 30.0]]), "labels": torch.tensor([1])}]
    assert sum(model.loss([torch.rand(3, 64, 64)], boxes).values()).isfinite()


def test_a_generator_into_a_detector_another_generator_and_a_classifier(tmp_path: Path) -> None:
    source = DiffusionModel(["cat", "dog"], two_level_unet(), image_size=16, null_class=True)
    path = saved(source, tmp_path)
    inner = DiffusionModel(None, two_level_unet(), image_size=16)
    blocks = {info.stride: i for i, info in enumerate(inner.block_info)}
    model = detector(["thing"], UNetBackbone(inner, list(blocks.values())), strides=tuple(sorted(blocks)))
    warm_start(model, path)
    network = model.backbone.backbone.reader.generator.network.state_dict()
    assert all(torch.equal(value, network[name]) for name, value in source.network.state_dict().items())

    other = DiffusionModel(["dog", "hen"], two_level_unet(), schedule="cosine", image_size=16, null_class=True)
    before = state(other)["conditioner.embedding.weight"]
    report = warm_start(other, path)
    rows, theirs = other.conditioner.embedding.weight, source.conditioner.embedding.weight
    assert torch.equal(rows[0], theirs[1])
    assert torch.equal(rows[1], before[1])
    assert torch.equal(rows[2], theirs[2])  # nothing in particular
    assert report.classes == {"dog": "dog"}
    assert report.settings == ["schedule linear (here cosine)"]
    assert torch.equal(other.network.out_conv.weight, source.network.out_conv.weight)

    layers = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention": (2,), "num_head_channels": 32}
    classifier = NoisyClassifier(["a", "b"], image_size=16, **layers)
    report = warm_start(classifier, path)
    assert torch.equal(
        classifier.encoder[0].state_dict()["0.conv1.weight"], source.network.encoder[0].state_dict()["0.conv1.weight"]
    )
    assert report.parts["pool"][0] == 0 < report.parts["encoder"][0] == report.parts["encoder"][1]


def test_a_segmenter_takes_layers_and_rows_of_classes(tmp_path: Path) -> None:
    source = PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 3, 2), ["sky", "sea", "sun"])
    model = PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 2, 2), ["sun", "ice"])
    before = state(model)
    warm_start(model, saved(source, tmp_path))
    for name, value in model.classifier.mlps.state_dict().items():
        theirs = source.classifier.mlps.state_dict()[name]
        if name.startswith("layers.6."):
            assert torch.equal(value[:, 0], theirs[:, 2])
            assert torch.equal(value[:, 1], before[f"classifier.mlps.{name}"][:, 1])
        else:
            assert torch.equal(value, theirs)


class OwnDetector(Detector):
    """A user's own, which says nothing of its class layer."""

    def __init__(self, classes: list[str], width: int = 32):
        super().__init__(classes)
        self.hidden, self.box, self.label = nn.Linear(6, width), nn.Linear(width, 4), nn.Linear(width, len(classes))

    def loss(self, images, targets, generator=None) -> dict[str, Tensor]:
        return {}

    def predict(self, images, seeds=None, sampler: BoxSampler | None = None) -> list[dict[str, Tensor]]:
        return []


def test_a_users_own_class_layer_is_not_mixed_up(tmp_path: Path) -> None:
    source = OwnDetector(["a", "b"])
    path = saved(source, tmp_path)
    same, swapped = OwnDetector(["a", "b"]), OwnDetector(["b", "a"])
    before = state(swapped)
    warm_start(same, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in same.state_dict().items())
    report = warm_start(swapped, path)
    assert torch.equal(swapped.hidden.weight, source.hidden.weight)
    assert torch.equal(swapped.label.weight, before["label.weight"])
    assert report.parts["label"][0] == 0
    assert set(report.unused) == {"label.weight", "label.bias"}


def test_what_does_not_fit_is_refused_in_one_sentence_and_changes_nothing(tmp_path: Path) -> None:
    model = detector(["a"])
    before = state(model)
    broken = detector(["a"])
    with torch.no_grad():
        broken.head.stages[1].box_deltas.weight[0, 0] = torch.nan
    broken.save(tmp_path / "nan.safetensors")
    PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 3, 2), ["x", "y", "z"]).save(tmp_path / "other.safetensors")
    save_file({"encoder.weight": torch.zeros(3, 3)}, tmp_path / "little.safetensors")
    save_file({"head.head_series.0.norm1.weight": torch.zeros(3)}, tmp_path / "reference.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    (tmp_path / "last.ckpt").write_bytes(b"")
    broken.save(tmp_path / "model.safetensors")
    for name, words in {
        "nan.safetensors": r"not finite in its weights for head\.stages\.1\.box_deltas\.weight",
        "other.safetensors": "PixelSegmenter of 3 classes.*less than a third of any part",
        "little.safetensors": "less than a third of any part",
        "reference.safetensors": "`diffperception convert` first",
        "text.pth": "damaged, or of another format",
        "number.pth": "holds no weights|else than tensors",
        "last.ckpt": r"name .*model\.safetensors instead",
    }.items():
        with pytest.raises(ValueError, match=words):
            warm_start(model, tmp_path / name)
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items()), name
    with pytest.raises(FileNotFoundError, match="there is no"):
        warm_start(model, tmp_path / "absent.safetensors")
