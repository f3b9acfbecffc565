"""`diffperception convert`: checkpoints of other programs as model files, and generators as folders of diffusers."""

import inspect
import json
import warnings
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from diffperception.configuration.parser import OptionsOf
from diffperception.data.annotations import labels_of, read_coco, tabulate
from diffperception.data.images import read_image, to_float
from diffperception.data.listing import list_images
from diffperception.detection import DiffusionDet
from diffperception.devices import pick_device
from diffperception.echo import echo, plural
from diffperception.files import OutputFolder, read_lines, require_file_name
from diffperception.models import DiffusionModel, NoisyClassifier, UNet
from diffperception.models.base import Model, file_kind, is_model_file
from diffperception.models.convert import adm
from diffperception.models.convert.checkpoints import WEIGHTS_OF_DIFFUSERS, is_diffusers_folder, read_weights
from diffperception.models.convert.diffusers import generator_from_folder, has_scheduler, write_folder
from diffperception.models.convert.trial import CLEARLY, HOPELESS, SLIGHTLY, changed_options, try_conventions
from diffperception.models.convert.unet2d import ForeignLayoutError
from diffperception.models.generator import load_generator, require_here
from diffperception.models.unet.encoder import both_sides
from diffperception.segmentation import FeatureExtractor, PixelEnsemble, PixelSegmenter

Reference = DiffusionDet | DiffusionModel | NoisyClassifier
MOST_PICTURES = 4  # that a checkpoint is tried on
USES = {
    "detector": "`diffperception evaluate`, `predict` and `train --init`",
    "generator": "`diffperception sample`, and as the network of detectors and pixel classifiers",
    "classifier": "`diffperception sample --classifier`",
    "pipeline": "`diffusers.DiffusionPipeline.from_pretrained`",
    "unet": "`diffusers.UNet2DModel.from_pretrained` and the scheduler's, with the loop in docs/integrations.md",
}


def convert_checkpoint(
    checkpoint: Path,
    output: Path,
    generator: Annotated[partial[DiffusionModel], OptionsOf(DiffusionModel.from_reference, "state", "classes")],
    ema: bool = False,
    annotations: Path | None = None,
    image: Path | None = None,
    num_res_blocks: int | None = None,
    to: Literal["diffusers"] | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint of another program into a model file, or a generator into a folder of diffusers.

    Four kinds are known: detectors of DiffusionDet (ResNet-50/101, Swin-T/S/B), diffusion models of guided-diffusion
    and improved-diffusion, noisy classifiers of guided-diffusion, and diffusers' UNet2DModel. Widths, classes and
    layouts are read off names and shapes; what those cannot tell of diffusion models and classifiers is said by
    --num-res-blocks and the options from --image-size on. With --image a diffusion model is tried on a picture: options
    that are left open are found, and options under which it denoises clearly worse than under others are refused. Only
    weights and numbers are read: a checkpoint that would run code is refused. The pixel classifiers of
    ddpm-segmentation become a segmenter by `--checkpoints`, with options of their own.

    A folder of diffusers (unet/ and scheduler/, or a UNet2DModel alone) says itself what it is: of these options
    --annotations and --image-size alone belong to it. A network of diffusers that our UNet cannot be (Stable Diffusion,
    DiT, ...) goes into the file as it is, and diffusers runs it. With `--to diffusers` a generator is written as such a
    folder: a model file of ours, or a checkpoint of guided-diffusion in one command. Options that diffusers cannot say
    are refused by their names.

    For example: `diffperception convert --checkpoint lsun_cat.pt --output cat.safetensors --num-head-channels 64
    --image-size 256`, `diffperception convert --checkpoint ddpm-cat-256 --output cat.safetensors`, and
    `diffperception convert --checkpoint cat.safetensors --to diffusers --output cat`.

    Args:
        checkpoint: a file of torch.save, pickle or safetensors: the weights themselves, or a dictionary with them under
            model, state_dict, ema or the like. What wrappers put before names (module., model., _orig_mod., ...) comes
            off. Or a folder of diffusers; with --to also a model file of ours.
        output: the file to write, model.safetensors for example; with --to the folder.
        ema: take the averaged weights, under ema_state, model_ema or the like.
        annotations: a COCO JSON file whose categories name the classes, or a text file with one name per line; equal
            names are told apart by their ids, or their labels 0, 1, ..., in brackets. Without it a detector's 80
            classes get COCO's names, any others are numbered.
        image: a picture such as a diffusion model was trained on, or a folder of them, of which the first 4 are taken:
            the path, how times are told, prediction and attention heads are tried on it.
        num_res_blocks: residual blocks per level, for a classifier whose names fit several numbers.
        to: diffusers writes a folder that diffusers reads, a DDPMPipeline where it has one for such a model; null a
            model file of ours.
        overwrite: replace the output file, if it is a model file of ours, or what an earlier run wrote into the folder.
    """
    if to is None:
        require_new_file(output, overwrite)
    else:
        OutputFolder(output, overwrite)  # refused before the work
    require_here(checkpoint)
    is_ours, is_folder = is_model_file(checkpoint), is_diffusers_folder(checkpoint)
    if is_ours and to is None:
        raise ValueError(
            f"{checkpoint} is a model file already, with nothing to convert: name it as --model or --init, or give"
            " --to diffusers"
        )
    if is_folder and to is not None:
        raise ValueError(f"{checkpoint} is a folder of diffusers already: leave out --to for a model file")
    if checkpoint.is_file() and checkpoint.name.startswith((WEIGHTS_OF_DIFFUSERS, "model_index.json", "config.json")):
        raise ValueError(f"{checkpoint} is a part of a folder of diffusers: name the folder, {checkpoint.parent}")
    classes = None if annotations is None else read_names(annotations)
    if is_ours or is_folder:
        own = {"ema": ema, "annotations": annotations, "image": image, "num_res_blocks": num_res_blocks}
        given = {**generator.keywords, **own}
        model: Reference = read_ours(checkpoint, given) if is_ours else read_diffusers(checkpoint, classes, given)
    else:
        model = read_reference(checkpoint, generator, classes, ema, image, num_res_blocks)
    if model.classes and model.classes[0] == "0":
        echo("its classes are numbered: --annotations FILE names them after a COCO file's categories or a .txt's lines")
    if to is None:
        model.save(output)
        echo(f"{output}: for {USES[model.kind]}")
    elif isinstance(model, DiffusionModel):
        write_folder(model, output, overwrite)
        whole = model.classes is None and model.prediction != "flow"
        echo(f"{output}: for {USES['pipeline' if whole else 'unet']}")
    else:
        raise ValueError(f"{checkpoint} holds a {model.kind}: diffusers has no such models, only generators")


def read_ours(checkpoint: Path, given: Mapping[str, Any]) -> DiffusionModel:
    """The generator in a model file of ours; ValueError for options, as the file says itself what it holds."""
    refuse_options(checkpoint, given)
    model = load_generator(checkpoint)
    echo(f"{checkpoint}: {in_one_line(model)}")
    return model


def read_diffusers(checkpoint: Path, classes: Sequence[str] | None, given: Mapping[str, Any]) -> DiffusionModel:
    """The generator in a folder of diffusers, and how to train it on; ValueError for options that it says itself.

    A network that our UNet cannot be is run by diffusers itself, its weights in our file.
    """
    refuse_options(checkpoint, given, known=("image_size", "annotations"))
    try:
        model = generator_from_folder(checkpoint, classes, given["image_size"])
    except ForeignLayoutError as reason:
        if classes is not None or given["image_size"] is not None:
            raise
        model = load_generator(checkpoint, keep_weights=True)
        echo(f"{reason}: diffusers itself runs the network, and must be installed where the file is used")
        echo(f"{checkpoint}: {in_one_line(model)}")
        return model
    echo(f"{checkpoint}: {in_one_line(model)}")
    if not has_scheduler(checkpoint):
        echo("assumed, as there is no scheduler with it: DDPM's linear path of 1000 steps, prediction of eps")
    if not model.arguments["betas"]:  # too many to be typed
        layout = {**changed_arguments(model, "classes", "network"), "network": changed_arguments(model.network)}
        echo(
            "to train it on: `train --task generation --init FILE --model.class_path DiffusionModel --model.init_args"
            f" '{json.dumps(layout)}'`"
        )
    return model


def changed_arguments(model: Model, *left_out: str) -> dict[str, Any]:
    """The arguments of a model's constructor that have other values than by default."""
    parameters = inspect.signature(type(model)).parameters
    arguments = {name: value for name, value in model.arguments.items() if name not in left_out}
    return {name: value for name, value in arguments.items() if value != parameters[name].default}


def refuse_options(checkpoint: Path, given: Mapping[str, Any], known: Container[str] = ()) -> None:
    """ValueError for an option that says what a file or folder says itself."""
    defaults = {p.name: p.default for p in inspect.signature(DiffusionModel.from_reference).parameters.values()}
    for name, value in given.items():
        if name not in known and value not in (None, False, defaults.get(name)):
            raise ValueError(f"option {name}: {checkpoint} says itself what it holds, so leave the option out")


def read_reference(
    checkpoint: Path,
    generator: partial[DiffusionModel],
    classes: Sequence[str] | None,
    ema: bool,
    image: Path | None,
    num_res_blocks: int | None,
) -> Reference:
    """The model of a reference program's checkpoint; what was assumed of it and left out is said."""
    found = read_weights(checkpoint, ema)
    weights = found.state
    if image is not None and not adm.is_unet(weights):
        raise ValueError("option image: only diffusion models are tried on pictures, and this checkpoint holds none")
    of_both = {name: value for name, value in generator.keywords.items() if name not in ("image_size", "prediction")}
    model: Reference
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        if adm.is_unet(weights):
            tried = {} if image is None else find_conventions(weights, image, generator.keywords)
            model = generator(weights, classes=classes, **tried)
        elif adm.is_classifier(weights):
            model = NoisyClassifier.from_reference(weights, classes, num_res_blocks=num_res_blocks, **of_both)
        elif any("head.head_series." in name for name in weights):
            model = DiffusionDet.from_reference(weights, classes)
        else:
            raise ValueError(
                f"{checkpoint} is no checkpoint of the reference DiffusionDet, nor of guided-diffusion's or"
                f" improved-diffusion's UNet or classifier: its weights are named {', '.join(list(weights)[:3])}, ..."
            )
    for remark in remarks:
        echo(str(remark.message))
    echo(f"{checkpoint}{f' ({found.place})' if found.place else ''}: {in_one_line(model)}")
    if isinstance(model, DiffusionModel) and image is None:
        echo(f"assumed, as no checkpoint tells it: {conventions(model)}; --image PICTURE tries it out")
    if found.left_out:
        echo(
            f"{plural(len(found.left_out), 'weight')} beside the network left out: {', '.join(found.left_out[:3])}, ..."
        )
    if found.averages:
        echo("it also has averaged weights: --ema takes those")
    return model


def find_conventions(weights: Mapping[str, Tensor], image: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a diffusion model that fit it best on pictures, where those given do not fit as well.

    Raises:
        ValueError: others than those given fit clearly better; it names them.
    """
    if given["image_size"] is None:
        raise ValueError("give image_size, the side of the images it was trained on: a checkpoint does not tell it")
    size = list(both_sides(given["image_size"]))
    pictures = [to_float(read_image(path)) for path in list_images(image).paths[:MOST_PICTURES]]
    covering = [F.resize(picture, max(size), antialias=True) for picture in pictures]  # by their short sides
    images = torch.stack([F.center_crop(picture, size) for picture in covering]).to(pick_device())
    fit, best = try_conventions(weights, images, given)
    better = changed_options(given, best.options)
    if fit is not None and fit.error > CLEARLY * best.error:
        raise ValueError(
            f"{image} is denoised {fit.error / best.error:.1f} times better with {better}, with {best.error:.0%} of the"
            f" error of a blind guess instead of {fit.error:.0%}: give these options, or leave out --image if you know"
            " better"
        )
    taken = best if fit is None else fit
    others = ", and with no other options better"
    if fit is None:
        others = f"; found by trying: {better}"
    elif fit.error > SLIGHTLY * best.error:
        others = f", and with {better} {best.error:.0%}: try more pictures"
    echo(f"{image}: it is denoised with {taken.error:.0%} of the error of a blind guess{others}")
    if best.error > HOPELESS:
        echo(
            "which tells nothing: the checkpoint has not learned such pictures, or another convention is not as assumed"
        )
    return {**taken.options}


def conventions(model: DiffusionModel) -> str:
    """What a checkpoint does not tell of a diffusion model, as it was taken."""
    told = model.schedule.conditioning(torch.tensor([(model.schedule.num_timesteps or 1) - 1]))
    layout = model.network.arguments
    heads = (
        f"{layout['num_heads']} heads" if layout["num_heads"] else f"heads of {layout['num_head_channels']} channels"
    )
    return (
        f"{model.arguments['schedule']} path, whose times the network is told as 0 to {float(told):g}, prediction of"
        f" {model.prediction}, attention in {heads}"
    )


def require_new_file(path: Path, overwrite: bool) -> None:
    """ValueError if `path` is a folder, or a file that may not be replaced: only model files of ours ever may."""
    require_file_name(path)
    if not path.exists():
        return
    try:
        kind = file_kind(path)
    except ValueError:
        raise ValueError(f"{path} is there already, and no model file of ours: name another file") from None
    if not overwrite:
        raise ValueError(f"{path} is there already, a {kind}: name another file, or replace it with --overwrite")


def read_names(path: Path) -> list[str]:
    """The names of the classes in a COCO file (.json), or the lines of a text file; unique, see `labels_of`."""
    if path.suffix.lower() == ".json":
        return tabulate(read_coco(path), path).labels()[1]
    names = read_lines(path)
    return labels_of(range(len(names)), names)[1]


def in_one_line(model: Reference) -> str:
    """What a converted model is."""
    if isinstance(model, DiffusionDet):
        kind = f"DiffusionDet with backbone {model.arguments['backbone']}, {model.head.arguments['stages']} stages"
    else:
        height, width = model.image_size
        network = model.network if isinstance(model, DiffusionModel) else model
        steps = f"{model.schedule.num_timesteps} steps" if model.schedule.num_timesteps else "any steps"
        kind = (
            f"{type(model).__name__} of {height} x {width} pixels with {_layout(network)},"
            f" {model.arguments['schedule']} path of {steps}"
        )
    names = model.classes or []
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    classes = f"{len(names)} classes ({first})" if names else "no classes"
    return f"{kind}, {classes}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"


def _layout(network: Model) -> str:
    """What a network consists of: levels for ours, the class for one that diffusers runs."""
    layout = network.arguments
    if not isinstance(network, UNet | NoisyClassifier):
        return f"diffusers' {layout['architecture']}"
    widths = ", ".join(f"{layout['channels'] * factor:g}" for factor in layout["channel_mult"])
    return f"levels {widths} channels wide, {layout['num_res_blocks']} residual blocks per level"


def convert_ensemble(
    features: FeatureExtractor,
    checkpoints: list[Path],
    classes: list[str],
    output: Path,
    short_side: PositiveInt | None = None,
    overwrite: bool = False,
) -> None:
    """Turn the pixel classifiers of ddpm-segmentation into a segmenter file.

    The features must be those that the classifiers were trained on: of the same UNet, which `diffperception convert`
    makes a model file of first, with the same blocks and timesteps in the same order.

    For example: `diffperception convert --features diffperception.segmentation.DiffusionFeatures --features.generator
    cat.safetensors --checkpoints model_0.pth model_1.pth --classes "[background, ...]" --output cats.safetensors`.

    Args:
        features: what is known of pixels; DiffusionFeatures and its arguments.
        checkpoints: model_0.pth, model_1.pth, ...: a file per member of the ensemble. Nothing in them is run.
        classes: names of the classes 0, 1, ...
        output: the file to write.
        short_side: images are resized to this short side first; null for not.
        overwrite: replace the output file, if it is a model file of ours.
    """
    require_new_file(output, overwrite)
    PixelSegmenter(features, PixelEnsemble.from_reference(checkpoints), classes, short_side).save(output)
    echo(
        f"{plural(len(checkpoints), 'classifier')} of {features.channels} features and {len(classes)} classes\n"
        f"{output}: for `diffperception predict`, `autolabel` and `evaluate`"
    )


BY_KIND = {"checkpoint": convert_checkpoint, "checkpoints": convert_ensemble}
