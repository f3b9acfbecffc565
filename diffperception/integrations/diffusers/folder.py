"""A folder that diffusers wrote, as a generator: its network, its autoencoder and its path, by component."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffperception.doctor import require_installed
from diffperception.integrations.diffusers.families import FAMILIES, Family
from diffperception.integrations.diffusers.latents import Latents
from diffperception.integrations.diffusers.network import DiffusersNetwork
from diffperception.integrations.diffusers.prompt import WORDS, Prompt
from diffperception.integrations.diffusers.weights import file_of, plain, read_component, read_config
from diffperception.models import DiffusionModel, Pixels, Space, UNet
from diffperception.models.base import leave_weights, undrawn
from diffperception.models.convert.checkpoints import assign
from diffperception.models.convert.schedulers import path_arguments
from diffperception.models.convert.unet2d import read_object
from diffperception.models.generator import CODECS

NETWORKS = ("unet", "transformer", "image_unet")  # components of pipelines, the first that there is
CELLS = 64  # of the side of the images that a network learned from, where its config does not say
PIXELS = 8  # that a cell of latents is wide where no autoencoder says so


def read_folder(folder: Path) -> DiffusionModel:
    """The generator in a folder of diffusers; its files leave the weights where they are.

    Args:
        folder: a pipeline's, of which the network is taken (unet, transformer, image_unet), the autoencoder (vae,
            vqvae, movq) if there is one, and the scheduler; or a network's own, with the others beside it. Pipelines
            themselves, which are programs, are never made.

    Raises:
        FileNotFoundError: a component or its weights are not there.
        ImportError: diffusers is not installed.
        ValueError: another folder; a network or path that we do not run; components that do not fit each other.
    """
    root, part = locate(folder)
    require_installed("diffusers", f"the network in {folder}", "pip install diffusers")
    config = read_config(root / part)
    architecture = architecture_of(config, root / part)
    space = read_space(root, architecture, config)
    pixels = PIXELS if isinstance(space, Pixels) and FAMILIES[architecture].latent else space.stride
    with undrawn():
        network = DiffusersNetwork(architecture, plain(config), pixels)
    _require_channels(network, space, root / part)
    bring(network, root, part)
    inside, outside = network.in_channels, network.out_channels
    labels = labels_of_pipeline(root, network.num_labels)
    prompt = Prompt(
        labels or None,
        network.has_null_label,
        None if network.word_width is None else [WORDS, network.word_width],
        next(iter(network.vector_widths), None),
    )
    told = labels or network.word_width or network.vector_widths
    return DiffusionModel(
        labels or None,
        cast(UNet, network),
        prompt if told else None,
        space,
        learned_range=outside == 2 * inside,
        image_size=_image_size(network, config),
        **read_path(root, FAMILIES[architecture]),
    ).eval()


def locate(folder: Path) -> tuple[Path, str]:
    """The folder of a pipeline and the component in it that is the network; ValueError if there is none.

    A component's own folder lies in that of a pipeline if others do.
    """
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        beside = folder.absolute().parent
        others = ("model_index.json", "scheduler", *CODECS)
        is_part = any((beside / name).exists() for name in others)
        return (beside, folder.absolute().name) if is_part else (folder, "")
    for part in NETWORKS:
        if (folder / part / "config.json").is_file():
            return folder, part
    found = sorted(path.name for path in folder.iterdir())
    there = f"it holds {', '.join(found[:6])}" if found else "it is empty"
    raise ValueError(
        f"{folder} is no folder of diffusers with a network ({', '.join(NETWORKS)}, or a config.json of one): {there};"
        " name such a folder, or the file of a generator"
    )


def architecture_of(config: Mapping[str, Any], folder: Path) -> str:
    """The class of a network; ValueError for one that we do not run."""
    name = str(config["_class_name"])
    if name == "Transformer2DModel":  # what DiT and PixArt were once called
        by_norm = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
        name = by_norm.get(str(config.get("norm_type")), name)
    if name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}, which is not run here: that is {', '.join(FAMILIES)}")
    return name


def read_space(root: Path, architecture: str, config: Mapping[str, Any]) -> Space:
    """The autoencoder beside a network, else pixels; FileNotFoundError where an autoencoder is needed and absent."""
    for part in CODECS:
        if (root / part / "config.json").is_file():
            about = read_config(root / part)
            with undrawn():
                space = Latents(str(about["_class_name"]), plain(about))
            bring(space, root, part)
            return space
    channels = config.get("in_channels")
    if FAMILIES[architecture].latent or channels not in (1, 3):
        raise FileNotFoundError(
            f"the {architecture} in {root} sees latents of {channels} channels, and there is no vae beside it: name the"
            " folder of the whole pipeline, or put its vae folder there"
        )
    return Pixels(channels)


def bring(model: DiffusersNetwork | Latents, root: Path, part: str) -> None:
    """Give a model the weights of a component, which its files then leave out, unless it is a pickle."""
    state = read_component(root / part, model.architecture, "network.", pickles=True)
    assign(model, state, f"{root / part} does not fit its config.json")
    if file_of(root / part).is_safe:
        leave_weights(model, root, part)


def read_path(root: Path, family: Family) -> dict[str, Any]:
    """Arguments of a :class:`DiffusionModel` for the path that a scheduler says, else the family's own.

    The times are those that the network is told; which of them a sampler takes does not matter here, nor does the
    `shift` of flow matching, which only moves these.

    Raises:
        ValueError: a path that we do not have.
    """
    files = [root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        is_flow = family.schedule["schedule"] == "flow"
        return {**family.schedule, "prediction": "flow" if is_flow else "eps"}
    scheduler = read_object(file)
    try:
        return path_arguments(scheduler)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def labels_of_pipeline(root: Path, count: int) -> list[str]:
    """Names of a network's classes, by the pipeline's index if it has some; else their numbers."""
    index = root / "model_index.json"
    named = read_object(index).get("id2label") if index.is_file() else None
    return [str((named or {}).get(str(label), label)) for label in range(count)]


def _require_channels(network: DiffusersNetwork, space: Space, folder: Path) -> None:
    """ValueError where a network sees more than what its space makes of an image."""
    inside, outside = network.in_channels, network.out_channels
    if inside != space.channels or outside not in (inside, 2 * inside):
        raise ValueError(
            f"the network in {folder} takes {inside} channels and gives {outside}, but of an image there are"
            f" {space.channels}: networks that fill in, enlarge or edit images see more, and are not run here"
        )


def _image_size(network: DiffusersNetwork, config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the images that a network learned from, in whole multiples."""
    size = config.get("sample_size") or CELLS
    sides = [size, size] if isinstance(size, int) else size
    height, width = (-(-side // network.stride) * network.stride * network.pixels for side in sides)
    return height, width
