"""mmsegmentation trains, tests and uses our features and classifiers, and we train on its data sets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("mmseg", reason="the plug-in's tests need mmsegmentation")

from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import get_state_dict
from mmengine.structures import PixelData
from mmseg.apis import inference_model, init_model
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from diffperception.data import ShapesSettings, write_shapes
from diffperception.data.images import to_float
from diffperception.integrations.mmseg import (
    DiffusionBackbone,
    DiffusionPyramid,
    DiffusionSegmentor,
    FittedSegmentor,
    FrozenBackbone,
    PixelEnsembleHead,
    labelled,
)
from diffperception.models import DiffusionModel
from diffperception.segmentation import (
    DiffusionFeatures,
    MeanIoU,
    PixelEnsemble,
    PixelSegmenter,
    RGBFeatures,
    evaluate_segmenter,
)
from diffperception.training import FitOptions, fit_segmenter
from diffperception.training.options import TrainerOptions
from diffperception.visualization.draw import save_png, to_pil
from tests.helpers.networks import conditional_generator, tiny_unet
from tests.helpers.pixel_classifiers import trained_like
from tests.helpers.runs import python
from tests.helpers.scenes import Pyramid, scene

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "mmseg"
FROZEN = ["ensemble", "upernet", "fcn_two_timesteps", "segformer"]
CLASSES = ["background", "ellipse", "rectangle", "triangle", "star", "cross", "ring"]
PREPROCESSOR = {"type": "SegDataPreProcessor", "mean": [127.5] * 3, "std": [127.5] * 3, "bgr_to_rgb": True}
CPU = TrainerOptions(accelerator="cpu")
others = [pytest.param(name, marks=pytest.mark.slow) for name in (*FROZEN[1:], "upernet_finetuned")]


@pytest.fixture(autouse=True)
def in_mmseg() -> Iterator[None]:
    """Names of classes are mmseg's; one thread, as in all tests."""
    init_default_scope("mmseg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures to learn from and four, of odd sides, to measure with; a corner of each mask is ignored."""
    folder = tmp_path_factory.mktemp("scenes")
    for part, size in (("train", (48, 56)), ("val", (41, 53))):
        for number in range(4):
            image, mask = scene(number, *size)
            mask[-4:, -9:] = 255
            save_png(to_pil(image), folder / part / f"{number}.png")
            save_png(Image.fromarray(mask.byte().numpy()), folder / "masks" / part / f"{number}.png")
    return folder


def generator() -> DiffusionModel:
    return DiffusionModel(None, tiny_unet(), image_size=40).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a generator."""
    path = tmp_path_factory.mktemp("generator") / "model.safetensors"
    generator().save(path)
    return path


def prepared(name: str, data: Path, file: Path, folder: Path) -> Config:
    """A shipped configuration with other folders, two iterations, and few channels."""
    cfg = Config.fromfile(CONFIGS / f"{name}.py", format_python_code=False)  # which takes longer than all else
    if "pure" not in name:  # of which that would make text
        cfg = Config(cfg.to_dict(), format_python_code=False)  # fromfile reads the option for pure Python alone
    cfg.work_dir = str(folder)
    cfg.experiment_name = f"{name}_{folder.name}"
    cfg.log_level = "ERROR"
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(data), serialize_data=False)  # which collects garbage, for half a second
    cfg.train_dataloader.batch_size = 2
    if "backbone" in cfg.model:
        cfg.model.backbone.generator = str(file)
    smaller = {"channels": 8, "members": 2}
    if "decode_head" in cfg.model:
        cfg.model.decode_head.update({key: smaller[key] for key in smaller.keys() & cfg.model.decode_head.keys()})
    return cfg


def predicted(model: Any, data: Path) -> list[Tensor]:
    paths = sorted(str(path) for path in (data / "val").glob("*.png"))
    return [sample.seg_logits.data for sample in inference_model(model, paths)]


def targets(*masks: Tensor) -> list[SegDataSample]:
    return [SegDataSample(gt_sem_seg=PixelData(data=mask[None])) for mask in masks]


# Training, testing, resuming, predicting


@pytest.mark.parametrize("name", [FROZEN[0], *others])
def test_a_shipped_configuration_trains_tests_resumes_and_predicts(
    name: str, data: Path, file: Path, tmp_path: Path
) -> None:
    runner = Runner.from_cfg(prepared(name, data, file, tmp_path))
    begun = {key: value.clone() for key, value in runner.model.state_dict().items()}
    runner.train()
    assert any(not torch.equal(begun[key], value) for key, value in runner.model.state_dict().items())
    assert 0 <= runner.test()["mIoU"] <= 100
    cfg = prepared(name, data, file, tmp_path / "resumed")
    cfg.update(load_from=str(tmp_path / "iter_2.pth"), resume=True)
    cfg.train_cfg.max_iters = 3
    resumed = Runner.from_cfg(cfg)
    resumed.train()
    assert resumed.iter == 3
    loaded = init_model(prepared(name, data, file, tmp_path), str(tmp_path / "iter_2.pth"), device="cpu")
    assert list(loaded.dataset_meta["classes"]) == CLASSES
    for logits, expected in zip(predicted(loaded, data), predicted(runner_model(runner), data), strict=True):
        assert logits.shape == (7, 41, 53)
        torch.testing.assert_close(logits, expected)


def runner_model(runner: Runner) -> Any:
    runner.model.cfg = runner.cfg  # what inference_model asks a model for
    return runner.model.eval()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_configuration_makes_a_segmentor(path: Path, data: Path, file: Path, tmp_path: Path) -> None:
    if path.stem == "fitted":
        features = DiffusionFeatures(file, [4])
        ensemble = PixelEnsemble(features.channels, len(CLASSES), 2)
        PixelSegmenter(features, ensemble, CLASSES).save(tmp_path / "segmenter.safetensors")
    cfg = prepared(path.stem, data, file, tmp_path)
    if path.stem == "fitted":
        cfg.model.segmenter = str(tmp_path / "segmenter.safetensors")
    model = init_model(cfg, device="cpu")
    found = inference_model(model, str(data / "val" / "0.png"))
    assert found.pred_sem_seg.data.shape == (1, 41, 53)
    assert found.seg_logits.data.shape == (7, 41, 53)


def test_a_pure_python_configuration_trains_and_is_tested(data: Path, file: Path, tmp_path: Path) -> None:
    runner = Runner.from_cfg(prepared("upernet_pure_python", data, file, tmp_path))
    runner.train()
    assert isinstance(runner.model.backbone, DiffusionBackbone)
    assert runner.model.decode_head.in_channels == runner.model.backbone.channels
    assert 0 <= runner.test()["mIoU"] <= 100


# Scores


def test_mmsegs_iou_is_ours(data: Path, file: Path, tmp_path: Path) -> None:
    """Of a segmenter that mmseg's data taught, saved, in mmseg and in `diffperception evaluate`."""
    cfg = prepared("fitted", data, file, tmp_path)
    val = labelled(cfg.val_dataloader.dataset)
    features = DiffusionFeatures(file, [4, 2], [50, 250])
    options = FitOptions(max_minibatches=30)
    segmenter = fit_segmenter(features, labelled(cfg.train_dataloader.dataset), CLASSES, 3, options, trainer=CPU)
    segmenter.save(tmp_path / "segmenter.safetensors")
    cfg.model.segmenter = str(tmp_path / "segmenter.safetensors")
    found = Runner.from_cfg(cfg).test()
    ours = evaluate_segmenter(tmp_path / "segmenter.safetensors", val, workers=0)
    assert ours["miou"] > 0.2
    assert found["mIoU"] == pytest.approx(100 * ours["miou"], abs=0.01)
    model = init_model(cfg, device="cpu")
    sample = inference_model(model, str(data / "val" / "1.png"))
    expected = PixelSegmenter.load(tmp_path / "segmenter.safetensors").segment(val[1][0])
    assert torch.equal(sample.pred_sem_seg.data[0], expected.labels)
    augmented = SegTTAModel(module=model).test_step({"inputs": [[val[1][0].flip(0)]], "data_samples": [[sample]]})
    assert torch.equal(augmented[0].pred_sem_seg.data[0], expected.labels)


def test_the_heads_iou_is_that_of_our_mean_probabilities(data: Path, file: Path, tmp_path: Path) -> None:
    cfg = prepared("ensemble", data, file, tmp_path)
    val = labelled(cfg.val_dataloader.dataset)
    runner = Runner.from_cfg(cfg)
    runner.model.decode_head.ensemble = trained_like(runner.model.decode_head.ensemble)
    counts = MeanIoU(7)
    for image, mask in val:
        maps = runner.model.backbone.features.maps(to_float(image))
        found = runner.model.decode_head.ensemble.segment(maps, probabilities=True).probabilities
        counts.update(found.argmax(0), mask)
    assert runner.test()["mIoU"] == pytest.approx(100 * counts.mean(), abs=0.2)  # maps are cropped: borders differ


def test_a_head_gives_what_the_ensemble_gives() -> None:
    """In images that need no padding, whole, and as a window of one."""
    features = Pyramid()
    head = PixelEnsembleHead([3] * 4, features.strides, 5, members=2)
    trained_like(head.ensemble)
    image = scene(0, 24, 36)[0]
    expected = head.ensemble.segment(features.maps(image), probabilities=True).probabilities
    maps = FrozenBackbone(features)(2 * image[None] - 1)
    torch.testing.assert_close(head(maps)[0].exp(), expected)
    for meta in ({"img_shape": (24, 36)}, {"img_shape": torch.Size((24, 36)), "pad_shape": (99, 99)}):
        torch.testing.assert_close(head.predict(maps, [meta], None)[0].exp(), expected)


# What is frozen, and what learns


def steps(model: Any, number: int = 2) -> None:
    """Train on two pictures of odd sides."""
    wrapped = OptimWrapper(torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2))
    image, mask = scene(0, 41, 53)
    for _ in range(number):
        picture = (255 * image.flip(0)).byte()
        model.train().train_step({"inputs": [picture] * 2, "data_samples": targets(mask, mask)}, wrapped)


def segmentor(backbone: dict[str, Any], head: dict[str, Any] | None = None, neck: dict[str, Any] | None = None) -> Any:
    head = head or {"type": "PixelEnsembleHead", "num_classes": 7, "members": 2, "pixels": 16}
    head.setdefault("in_index", "all")
    preprocessor = PREPROCESSOR | {"size": (41, 53)}
    model = {"type": "DiffusionSegmentor", "data_preprocessor": preprocessor, "test_cfg": {"mode": "whole"}}
    return MODELS.build(model | {"backbone": backbone, "neck": neck, "decode_head": head})


def fcn() -> dict[str, Any]:
    return {"type": "FCNHead", "channels": 8, "num_convs": 1, "num_classes": 7, "input_transform": "resize_concat"}


def test_frozen_weights_stay_to_the_last_bit() -> None:
    model = segmentor({"type": "DiffusionBackbone", "generator": generator(), "blocks": [4, 2]}, fcn())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    frozen = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    head = model.decode_head.conv_seg.weight.clone()
    steps(model)
    assert not model.backbone.features.training
    assert all(torch.equal(frozen[key], value) for key, value in model.backbone.state_dict().items())
    assert not torch.equal(head, model.decode_head.conv_seg.weight)


def test_an_extractor_of_ones_own_is_frozen_too() -> None:
    class Convolved(RGBFeatures):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def encode(self, images: Tensor) -> list[Tensor]:
            return [self.layers(images)]

    model = segmentor({"type": "FrozenBackbone", "features": Convolved()})
    backbone = model.backbone
    begun = {key: value.clone() for key, value in backbone.state_dict().items()}
    steps(model)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(begun[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("conditional", [False, True])
def test_every_trainable_parameter_of_a_fine_tuned_pyramid_has_a_gradient(conditional: bool) -> None:
    source = conditional_generator() if conditional else generator()
    backbone = {"type": "DiffusionPyramid", "generator": source, "blocks": [2, 0] if conditional else [4, 2, 0]}
    model = segmentor(backbone | {"label": 1} if conditional else backbone, fcn())
    image, mask = scene(0, 41, 53)
    model.train()(2 * image[None] - 1, targets(mask), mode="loss")["decode.loss_ce"].backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, parameter in learning.items() if parameter.grad is None] == []
    assert any(name.startswith("backbone.body.reader") for name in learning)
    assert any(not p.requires_grad for p in model.backbone.parameters())  # the blocks that no map depends on


def train_in_a_group(rank: int, folder: Path) -> None:
    """One of two processes: two steps of two models under DDP, which waits for a gradient of every parameter."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    init_default_scope("mmseg")
    dist.init_process_group("gloo", f"file://{folder / 'group'}", rank=rank, world_size=2)
    for name, kind in (("frozen", "DiffusionBackbone"), ("pyramid", "DiffusionPyramid")):
        model = segmentor({"type": kind, "generator": generator(), "blocks": [4, 2, 0]})
        wrapped = MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=False)
        steps(wrapped)
        torch.save(model.state_dict(), folder / f"{name}{rank}.pt")
    dist.destroy_process_group()


# In a process of its own: torch cannot fork one in which autograd has threads, as other tests may have left it.
TWO_PROCESSES = """
import sys
from pathlib import Path
from torch.multiprocessing import start_processes
from tests.integrations.test_mmseg import train_in_a_group
start_processes(train_in_a_group, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
"""


def test_two_processes_train_without_looking_for_unused_parameters(tmp_path: Path) -> None:
    assert python("-c", TWO_PROCESSES, str(tmp_path)) == 0
    for name in ("frozen", "pyramid"):
        one, two = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
        trained = [key for key in one if "mlps" in key and "running" not in key]  # each has statistics of its own
        assert trained
        assert all(torch.equal(one[key], two[key]) for key in trained)
        same = generator().state_dict()
        prefix = {"frozen": "backbone.features.reader.generator.", "pyramid": "backbone.body.reader.generator."}[name]
        changed = [key for key, value in same.items() if not torch.equal(value, one[prefix + key])]
        assert bool(changed) == (name == "pyramid")


# Checkpoints without frozen weights


def test_a_checkpoint_without_frozen_weights_is_small_and_loads(data: Path, file: Path, tmp_path: Path) -> None:
    runner = Runner.from_cfg(prepared("ensemble", data, file, tmp_path))
    runner.save_checkpoint(str(tmp_path), "iter_2.pth", save_optimizer=False, save_param_scheduler=False)
    saved = torch.load(tmp_path / "iter_2.pth", weights_only=False)["state_dict"]
    assert [key for key in saved if key.startswith("backbone.")] == ["backbone.frozen"]
    cfg = prepared("ensemble", data, file, tmp_path)
    loaded = init_model(cfg, str(tmp_path / "iter_2.pth"), device="cpu")
    for logits, expected in zip(predicted(loaded, data), predicted(runner_model(runner), data), strict=True):
        assert torch.equal(logits, expected)
    missing, unexpected = loaded.load_state_dict(saved, strict=True)
    assert (missing, unexpected) == ([], [])
    other = generator()
    next(other.parameters()).data += 1
    cfg.model.backbone.generator = str(tmp_path / "other.safetensors")
    other.save(cfg.model.backbone.generator)
    with pytest.raises(ValueError, match=r"trained on other frozen weights .* name the file that it was trained with"):
        init_model(cfg, str(tmp_path / "iter_2.pth"), device="cpu")
    cfg.model.backbone.generator = str(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no model file .*gone\.safetensors"):
        init_model(cfg, str(tmp_path / "iter_2.pth"), device="cpu")


def test_checkpoints_hold_frozen_weights_where_asked_for() -> None:
    holding, without = (FrozenBackbone(DiffusionFeatures(generator(), [4]), save_frozen=save) for save in (True, False))
    assert len(holding.state_dict()) > 10
    other = generator()
    next(other.parameters()).data += 1
    changed = FrozenBackbone(DiffusionFeatures(other, [4]))
    changed.load_state_dict(holding.state_dict())
    assert all(torch.equal(value, holding.state_dict()[key]) for key, value in changed.state_dict().items())
    changed.load_state_dict(without.state_dict())


def test_a_folder_of_diffusers_feeds_a_head_and_stays_out_of_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.integrations.diffusers_folders import WORD, write_pipeline

    folder = write_pipeline(tmp_path / "sd", "sd")
    save_file({"prompt_embeds": torch.rand(7, WORD)}, tmp_path / "prompt.safetensors")
    told = {"prompt": str(tmp_path / "prompt.safetensors"), "attention": True}
    backbone = {"type": "DiffusionBackbone", "generator": str(folder), "blocks": ["up_blocks.0", 1], **told}
    holding, without = (segmentor(backbone | {"save_frozen": save}) for save in (True, False))
    assert without.decode_head.in_channels[-1] == without.backbone.features.info[-1].channels == 7  # a map a word
    steps(without)
    for state in (without.state_dict(), get_state_dict(without)):
        assert [key for key in state if key.startswith("backbone.")] == ["backbone.frozen"]
        holding.load_state_dict(holding.state_dict() | {k: v for k, v in state.items() if k.startswith("decode_head.")})
        image = 2 * scene(0, 41, 53)[0][None] - 1
        assert torch.equal(holding.eval()(image), without.eval()(image))
        without.load_state_dict(state, strict=True)
    for state in (holding.state_dict(), get_state_dict(holding)):
        assert any("conv_in" in key for key in state)


# Maps for any head


def test_maps_are_those_of_the_extractor_at_any_size() -> None:
    features = DiffusionFeatures(generator(), [4, 2, 0], [50, 250])
    backbone = FrozenBackbone(features)
    for size in ((41, 37), (33, 57)):  # the latter in windows of 40 pixels
        images = torch.stack([scene(seed, *size)[0] for seed in (0, 1)])
        maps = backbone.train()(2 * images - 1)
        assert [m.shape[1] for m in maps] == backbone.channels
        for number, image in enumerate(images):
            for found, expected in zip(maps, features.maps(image).cropped().maps, strict=True):
                torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)
    assert [tuple(m.shape[2:]) for m in maps[:3]] == [(33, 57), (17, 29), (9, 15)]


def test_an_extractor_may_be_named() -> None:
    backbone = MODELS.build({"type": "FrozenBackbone", "features": {"type": "TimmFeatures", "name": "resnet10t"}})
    assert backbone.strides == [4, 8, 16, 32]
    model = segmentor({"type": "FrozenBackbone", "features": {"type": "RGBFeatures"}})
    steps(model)
    assert model.decode_head.in_channels == [3]


def test_one_block_or_timestep_is_a_list_too() -> None:
    cases = [
        (DiffusionBackbone, {"blocks": 4}, r"blocks is 4, but must be a list, such as \[4, 2\]"),
        (DiffusionBackbone, {"blocks": "up_blocks.0"}, "blocks is 'up_blocks.0', but must be a list"),
        (DiffusionBackbone, {"blocks": [4], "timesteps": 50}, r"timesteps is 50, but must be a list, such as \[50\]"),
        (DiffusionBackbone, {"blocks": [4], "timesteps": "50"}, "timesteps is '50', but must be a list"),
        (DiffusionPyramid, {"blocks": 4}, "blocks is 4, but must be a list"),
    ]
    for backbone, options, said in cases:
        with pytest.raises(ValueError, match=said):
            backbone(generator(), **options)
    with pytest.raises(ValueError, match="the window must be a multiple of 4 pixels, 8 at least, not 0"):
        DiffusionBackbone(generator(), [4], window=0)
    with pytest.raises(ValueError, match="features is a FCNHead, which is no feature extractor"):
        FrozenBackbone(fcn() | {"in_channels": [3], "in_index": [0]})


def test_heads_are_told_the_channels() -> None:
    backbone = {"type": "DiffusionBackbone", "generator": generator(), "blocks": [4, 2, 0]}
    uper = {"type": "UPerHead", "channels": 8, "num_classes": 7, "in_index": [0, 2]}
    assert segmentor(backbone, dict(uper)).decode_head.in_channels == [32, 64]
    assert (
        segmentor(
            backbone, {"type": "FCNHead", "channels": 8, "num_classes": 7, "in_index": -1}
        ).decode_head.in_channels
        == 64
    )
    ensemble = segmentor(backbone).decode_head
    assert (ensemble.in_channels, ensemble.strides) == ([32, 32, 64], [1, 2, 4])
    assert segmentor(backbone, uper | {"in_channels": (32, 64), "in_index": (0, 2)}).decode_head.in_channels == [32, 64]
    with pytest.raises(ValueError, match=r"decode_head.in_channels is \[32, 99\], but the backbone gives \[32, 64\]"):
        segmentor(backbone, uper | {"in_channels": [32, 99]})
    with pytest.raises(ValueError, match=r"decode_head.in_index is \[0, 3\], but the backbone gives 3 maps"):
        segmentor(backbone, uper | {"in_index": [0, 3]})


def test_a_head_may_take_one_map_or_all() -> None:
    backbone = {"type": "DiffusionBackbone", "generator": generator(), "blocks": [4, 2, 0]}
    ensemble = {"type": "PixelEnsembleHead", "num_classes": 7, "members": 2}
    for index, strides in ((2, [4]), (-3, [1]), (None, [1, 2, 4])):
        assert segmentor(backbone, ensemble | {"in_index": index}).decode_head.strides == strides
    single = {"type": "FCNHead", "channels": 8, "num_classes": 7}
    for head, check in (
        (single | {"in_index": "all"}, r"isinstance\(in_channels, int\)"),
        ({"type": "UPerHead", "channels": 8, "num_classes": 7, "in_index": 1}, r"isinstance\(in_channels, \(list"),
    ):
        with pytest.raises(ValueError, match=rf'decode_head fails its check `assert {check}.*in_index="all" or a list'):
            segmentor(backbone, head)
    for several in ([single, single], None):
        with pytest.raises(ValueError, match=r"decode_head is a \w+, but must be the configuration of one head"):
            DiffusionSegmentor(backbone, several, data_preprocessor=PREPROCESSOR)  # type: ignore[arg-type]


def test_what_lies_behind_a_neck_is_said() -> None:
    backbone = {"type": "DiffusionBackbone", "generator": generator(), "blocks": [4, 2, 0]}
    neck = {"type": "FPN", "in_channels": [32, 32, 64], "out_channels": 16, "num_outs": 3}
    head = {"type": "FPNHead", "channels": 8, "num_classes": 7, "in_index": [0, 1, 2], "feature_strides": [1, 2, 4]}
    model = segmentor(backbone, head | {"in_channels": [16] * 3}, neck)
    steps(model, 1)
    with pytest.raises(ValueError, match=r"neck.in_channels is \[32, 64, 64\], but the backbone gives \[32, 32, 64\]"):
        segmentor(backbone, head | {"in_channels": [16] * 3}, neck | {"in_channels": [32, 64, 64]})
    with pytest.raises(ValueError, match=r"decode_head takes what the neck gives: say in its in_channels"):
        segmentor(backbone, dict(head), neck)


def test_other_pixels_than_a_generators_are_said_to_be() -> None:
    backbone = {"type": "FrozenBackbone", "features": {"type": "RGBFeatures"}}
    head = {"type": "PixelEnsembleHead", "num_classes": 2, "members": 1}
    segmenter = PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 2, 1), ["a", "b"])
    for changes in ({"mean": [123.675, 116.28, 103.53]}, {"std": [58.395, 57.12, 57.375]}, {"mean": [0] * 3}):
        with pytest.raises(
            ValueError, match=r"data_preprocessor has mean .* give data_preprocessor mean=\[127.5\] \* 3"
        ):
            DiffusionSegmentor(backbone, head, data_preprocessor=PREPROCESSOR | changes)
        with pytest.raises(ValueError, match=r"data_preprocessor has mean .* this model takes pixels in -1"):
            FittedSegmentor(segmenter, PREPROCESSOR | changes)
    with pytest.raises(
        ValueError, match="data_preprocessor has pad_val 255, which is filled in after the normalisation"
    ):
        DiffusionSegmentor(backbone, head, data_preprocessor=PREPROCESSOR | {"size": (40, 40), "pad_val": 255})
    with pytest.warns(UserWarning, match="data_preprocessor swaps no channels, but this model takes RGB"):
        DiffusionSegmentor(backbone, head, data_preprocessor=PREPROCESSOR | {"bgr_to_rgb": False})
    image = scene()[0][None]
    for images in (255 * image, (image - 0.45) / 0.225):  # as plain EncoderDecoders might give
        for module in (FrozenBackbone(RGBFeatures()), DiffusionPyramid(generator(), [4, 2])):
            with pytest.raises(ValueError, match=r"the images reach from .* but this model takes pixels in -1\.\.1"):
                module(images)


# The ensemble as a head


def test_members_learn_the_classes_from_the_labelled_pixels_alone() -> None:
    torch.manual_seed(0)
    head = PixelEnsembleHead([3] * 4, Pyramid().strides, 3, members=3, pixels=32)
    image, mask = scene(0, 41, 53)
    maps = FrozenBackbone(Pyramid())(2 * torch.stack([image, image]) - 1)
    partly = mask.clone()
    partly[:, ::2] = 255
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        losses = head.train().loss(maps, targets(partly, torch.full_like(mask, 255)), None)  # the second has no label
        losses["loss_ce"].backward()
        optimizer.step()
    found = head.eval().predict(maps, [{"img_shape": (41, 53)}], None)
    assert found.shape == (2, 3, 41, 53)
    assert (found[0].argmax(0) == mask).float().mean() > 0.97
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 41, 53))


def test_members_learn_and_predict_in_half_precision() -> None:
    model = segmentor({"type": "DiffusionBackbone", "generator": generator(), "blocks": [4, 2, 0]}).train()
    image, mask = scene(0, 41, 53)
    expected = model.eval()(2 * image[None] - 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(2 * image[None] - 1, targets(mask), mode="loss")["decode.loss_ce"]
        found = model.eval()(2 * image[None] - 1)
    loss.backward()
    assert loss.dtype == found.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decode_head.parameters())
    assert 0 < (found - expected).abs().max() < 0.1


def test_a_batch_without_a_label_has_no_loss_but_gradients() -> None:
    head = PixelEnsembleHead([3] * 4, Pyramid().strides, 3, members=2, pixels=8, ignore_index=7)
    image, mask = scene(0, 24, 36)
    maps = [m.requires_grad_() for m in FrozenBackbone(Pyramid())(2 * image[None] - 1)]  # as of what is fine-tuned
    loss = head.train().loss(maps, targets(torch.full_like(mask, 7)), None)["loss_ce"]
    loss.backward()
    assert loss == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (*head.parameters(), *maps))
    with pytest.raises(ValueError, match="label 5, but the head has 3 classes, 0 to 2, and ignores 7: set num_classes"):
        head.loss(maps, targets(torch.full_like(mask, 5)), None)


# mmseg's data sets in our training


def dataset(data: Path, pipeline: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    prefix = {"img_path": "train", "seg_map_path": "masks/train"}
    common = {"type": "BaseSegDataset", "data_root": str(data), "data_prefix": prefix, "img_suffix": ".png"}
    common["serialize_data"] = False
    return common | {"metainfo": {"classes": list("abc")}, "pipeline": pipeline} | changes


LOAD, MASKS, PACK = ({"type": name} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs"))


def test_images_are_rgb_and_masks_as_the_data_set_says(data: Path) -> None:
    plain = labelled(dataset(data, [LOAD, MASKS, PACK]))
    image, mask = plain[2]
    drawn, truth = scene(2, 48, 56)
    assert (to_float(image) - drawn).abs().max() < 0.01
    truth[-4:, -9:] = 255
    assert torch.equal(mask, truth)
    assert [Path(name).name for name in plain.names] == [f"{number}.png" for number in range(4)]
    rgb = labelled(dataset(data, [LOAD | {"to_float32": True}, MASKS, PACK]), channel_order="rgb")
    torch.testing.assert_close(rgb[2][0].flip(0), to_float(image))
    reduced = labelled(dataset(data, [LOAD, MASKS, PACK], reduce_zero_label=True, metainfo={"classes": ["b", "c"]}))
    assert torch.equal(reduced[2][1], torch.where((truth == 0) | (truth == 255), 255, truth - 1))
    ignoring = dataset(data, [LOAD, MASKS, PACK], ignore_index=1)
    twice = {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {"type": "ConcatDataset", "datasets": [ignoring, ignoring]},
    }
    for samples, number in ((labelled(ignoring), 4), (labelled(twice), 16)):
        assert (len(samples), len(samples.names)) == (number, number)
        assert torch.equal(samples[number - 2][1], torch.where(truth == 1, 255, truth))


def test_a_random_crop_has_its_mask_and_is_drawn_once(data: Path, tmp_path: Path) -> None:
    """Colours tell the classes, so that images beside masks of another draw could not be learned."""
    crop = {"type": "RandomCrop", "crop_size": (24, 24)}
    samples = labelled(dataset(data, [LOAD, MASKS, crop, {"type": "RandomFlip", "prob": 0.5}, PACK]))
    drawn: list[int] = []
    draw = type(samples).__getitem__

    class Counting(type(samples)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            drawn.append(index)
            return draw(self, index)

    counting = Counting(samples.dataset, "bgr")
    options = FitOptions(max_minibatches=200, lr=1e-2)
    segmenter = fit_segmenter(RGBFeatures(), counting, counting.classes, 2, options, trainer=CPU)
    assert drawn == [0, 1, 2, 3]
    assert evaluate_segmenter(segmenter, labelled(dataset(data, [LOAD, MASKS, PACK])), workers=0)["miou"] > 0.95


def test_data_sets_that_cannot_be_learned_from_are_refused(data: Path) -> None:
    resize = {"type": "Resize", "scale": (28, 24)}
    cases = [
        ([LOAD, PACK], "gives no image with a mask: it needs LoadAnnotations"),
        ([LOAD, resize, MASKS, PACK], "put LoadAnnotations before Resize"),
        ([LOAD, MASKS, {"type": "Normalize", "mean": [127.5] * 3, "std": [127.5] * 3}, PACK], "leave Normalize out"),
    ]
    for pipeline, said in cases:
        with pytest.raises(ValueError, match=said):
            labelled(dataset(data, pipeline))[0]
    with pytest.raises(ValueError, match="does not name its classes"):
        labelled(dataset(data, [LOAD, MASKS, PACK], metainfo=None))
    with pytest.raises(ValueError, match="the configuration of a data loader: give that of its data set"):
        labelled({"batch_size": 2, "dataset": dataset(data, [LOAD, MASKS, PACK])})
    with pytest.raises(ValueError, match="channel_order is bgr or rgb, not 'RGB'"):
        labelled(dataset(data, [LOAD, MASKS, PACK]), "RGB")  # type: ignore[arg-type]


# As the page says


def test_the_pages_program_runs(data: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other folders, with configurations that inherit from the shipped ones and take fewer steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "mmseg").mkdir(parents=True)
    short = (
        "train_cfg = dict(max_iters=2, val_interval=2)\ndefault_hooks = dict(checkpoint=dict(interval=2))\n"
        "log_level = 'ERROR'\n"
        "brief = dict(num_workers=0, persistent_workers=False, dataset=dict(serialize_data=False))\n"
        "train_dataloader = val_dataloader = test_dataloader = brief\n"
    )
    for name in ("upernet", "fitted"):
        (tmp_path / "configs" / "mmseg" / f"{name}.py").write_text(f"_base_ = ['{CONFIGS / name}.py']\n{short}")
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8").split("## mmsegmentation")[1]
    program = page.split("```python\n")[1].split("```")[0]
    for name, path in (("data/scenes", data), ("runs/scenes_ddpm/model.safetensors", file)):
        assert program.count(f'"{name}"') == 1
        program = program.replace(name, str(path))
    program = program.replace("samples.classes, ", "samples.classes, options=FitOptions(max_minibatches=20), ")
    assert program.count("return cfg") == 1  # formatting would take half of the time
    program = program.replace("return cfg", "return Config(cfg.to_dict(), format_python_code=False)")
    results: list[Any] = []
    exec(
        compile(program, "integrations.md", "exec"),
        {"__name__": "__main__", "print": results.append, "FitOptions": FitOptions},
    )
    heads, fitted = (result["mIoU"] for result in results)
    assert 0 <= heads <= 100
    assert fitted > 10  # of 20 minibatches, and of three classes of seven
    assert PixelSegmenter.load("runs/mmseg/segmenter.safetensors").classes == CLASSES


# The official packages


OFFICIAL = ["mmengine==0.10.7", "mmcv-lite==2.1.0", "mmsegmentation==1.2.2"]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the official packages, and for all others those of this environment."""
    folder = tmp_path_factory.mktemp("official")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    (folder / "constraints.txt").write_text("setuptools<81")
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *OFFICIAL]
    environment = os.environ | {"PIP_CONSTRAINT": str(folder / "constraints.txt")}
    if subprocess.run(command, env=environment, capture_output=True).returncode:
        pytest.skip("the official packages cannot be installed here")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_official_packages_pass_these_tests_too(official: Path) -> None:
    command = [official, "-m", "pytest", "-p", "tests.integrations.uncompiled_mmcv", "-m", "not slow", "-n0", __file__]
    environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
    version = "import mmseg; print(mmseg.__version__)"
    assert subprocess.run([official, "-c", version], capture_output=True, text=True).stdout == "1.2.2\n"


@pytest.mark.slow
def test_an_mmcv_without_operators_is_said_to_be(official: Path) -> None:
    command = [official, "-c", "import diffperception.integrations.mmseg"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: this mmsegmentation needs mmcv with its compiled operators")
    assert "`pip install onedl-mmcv" in said


# Both ways of training


@pytest.mark.slow
def test_a_runner_trains_the_ensemble_as_well_as_fit_does(file: Path, tmp_path: Path) -> None:
    """Of six kinds of shapes and what is behind them, from forty masks, without crops or flips."""
    write_shapes(tmp_path / "shapes", ShapesSettings(40, 20, min_side=40, max_side=40, max_objects=3, min_size=18))
    cfg = prepared("ensemble", tmp_path / "shapes", file, tmp_path / "run")
    cfg.train_cfg.update(max_iters=300, val_interval=300)
    cfg.param_scheduler = None
    cfg.train_dataloader.update(batch_size=8)
    cfg.train_dataloader.dataset.pipeline = [LOAD, MASKS, PACK]
    cfg.model.decode_head.members = 4
    runner = Runner.from_cfg(cfg)
    runner.train()
    learned = runner.test()["mIoU"]
    samples, val = (labelled(loader.dataset) for loader in (cfg.train_dataloader, cfg.val_dataloader))
    options = FitOptions(max_minibatches=300)
    segmenter = fit_segmenter(runner.model.backbone.features, samples, CLASSES, 4, options, trainer=CPU)
    fitted = 100 * evaluate_segmenter(segmenter, val, workers=0)["miou"]
    assert min(learned, fitted) > 15  # background alone would be 11
    assert learned == pytest.approx(fitted, abs=2)
