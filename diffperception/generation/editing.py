"""Pictures noised part of the way and drawn again: whole (SDEdit, arXiv 2108.01073), or in part by RePaint's steps."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from diffperception.data import CocoDetection
from diffperception.data.formats import Format, open_annotations
from diffperception.data.images import read_image, to_float
from diffperception.devices import Precision, autocast, hide_bar, pick_device
from diffperception.diffusion import Denoiser, SampleNoise, Schedule, add_noise, name_seed, sample_repaint, sample_seed
from diffperception.files import OutputFolder, png_names, safe_path, write_json
from diffperception.generation.sampling import SAMPLERS, Sampler, SamplingOptions, said_alike, sampling_grid
from diffperception.models import DiffusionModel
from diffperception.models.base import describe, fingerprint
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.visualization.draw import save_png, to_pil
from diffperception.visualization.panels import image_grid

Where = Literal["outside", "inside", "everywhere"]


@dataclass
class EditOptions:
    """How a picture is drawn again.

    Args:
        strength: the share of the path, above 0 and up to 1, that the picture is noised to and comes back from: the
            smaller, the more it stays itself. By default 0.5, and 1 where a mask says what is drawn anew.
        jump: with a mask, the steps that are taken back to noise again and again, that both parts may agree.
        resamples: with a mask, how often each piece of so many steps is done; 1 is once.
    """

    strength: float | None = None
    jump: PositiveInt = 10
    resamples: PositiveInt = 5

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is a share of the path, above 0 and up to 1, not {self.strength:g}")


def edit_grid(schedule: Schedule, sampler: Sampler, steps: int, strength: float) -> Tensor:
    """The times of :func:`sampling_grid` that are cleaner than the time at a fraction of the path, after that time."""
    grid = sampling_grid(schedule, sampler, steps)
    if strength == 1:
        return grid
    start = schedule.from_fraction(torch.tensor([strength], dtype=torch.float64)).to(grid.dtype)
    level, highest = (schedule.sigma(t) / schedule.alpha(t) for t in (grid, start))
    return torch.cat([start, grid[level < highest]])


@torch.no_grad()
def edit_images(
    model: DiffusionModel,
    images: Tensor,
    noise: SampleNoise,
    sampling: SamplingOptions,
    edit: EditOptions = EditOptions(),  # noqa: B008 (not changed)
    redrawn: Tensor | None = None,
    denoiser: Denoiser | None = None,
) -> Tensor:
    """Images (B, C, H, W) in 0..1, noised and drawn again; with a mask only there, and exact elsewhere.

    Args:
        images: of any size: they are padded with their last pixels to what the model takes.
        noise: draws each image's noise.
        redrawn: (B, 1, H, W) or (1, 1, H, W) bool, what is drawn anew, by RePaint's steps, which are DDPM's whatever
            the sampler; None for all, by the sampler's own.
        denoiser: to use instead of the model's own.

    Raises:
        ValueError: as :func:`sample`.
    """
    height, width = images.shape[2:]
    below, right = -height % model.stride, -width % model.stride
    padded = F.pad(images, (0, right, 0, below), mode="replicate")
    model.signal_shape(*padded.shape[2:])
    signal = model.space.encode(padded)
    denoiser = sampling.limit(denoiser or model.denoiser(None, sampling.guidance), model.space.bounded)
    strength = edit.strength or (0.5 if redrawn is None else 1.0)
    grid = edit_grid(model.schedule, sampling.sampler, sampling.steps, strength)
    x = add_noise(model.schedule, signal, grid[0], noise(signal))
    if redrawn is None:
        drawn = SAMPLERS[sampling.sampler].loop(denoiser, model.schedule, x, grid, sampling, noise)
        return model.space.decode(drawn)[:, :, :height, :width]
    free = F.pad(redrawn.float(), (0, right, 0, below))
    known = F.max_pool2d(free, model.space.stride) == 0  # a cell is known where all of its pixels are
    drawn = sample_repaint(denoiser, model.schedule, x, grid, signal, known, edit.jump, edit.resamples, draw=noise)
    return torch.where(redrawn, model.space.decode(drawn)[:, :, :height, :width], images)


def edit_picture(
    model: DiffusionModel | str | Path,
    image: str | Path,
    output: str | Path,
    mask: str | Path | None = None,
    num_samples: int = 4,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (not changed)
    edit: EditOptions = EditOptions(),  # noqa: B008 (not changed)
    said: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> None:
    """Draw a picture again, or the white parts of a mask of its size: OUTPUT/images and OUTPUT/grid.png.

    The arguments are as for :func:`sample_folder` and :func:`edit_images`; grid.png has the picture first.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or the mask has another size or nothing white.
    """
    folder, place = OutputFolder(output, overwrite), pick_device(device)
    model = DiffusionModel.loaded(model).to(place).eval()
    original = to_float(read_image(image))
    picture = original.mean(0, keepdim=True) if model.space.image_channels == 1 else original
    redrawn = None if mask is None else read_redrawn(mask, (original.shape[1], original.shape[2]))
    denoiser = model.denoiser(said_alike(model, said, 1), sampling.guidance)
    drawn = []
    with autocast(place, precision):
        for number in tqdm(range(num_samples), "sample", unit="image", disable=hide_bar()):
            noise = sampling.draws([sample_seed(seed, number)], model.device)
            free = None if redrawn is None else redrawn[None].to(place)
            found = edit_images(model, picture[None].to(place), noise, sampling, edit, free, denoiser)
            drawn.append(found[0].float().cpu().expand(3, -1, -1))
    folder.clear()
    for number, each in enumerate(drawn):
        save_png(to_pil(each), folder.file(f"images/{number:06}.png"))
    erased = [] if redrawn is None else [torch.where(redrawn, 0.5, original)]
    save_png(image_grid([original, *erased, *drawn]), folder.file("grid.png"))


def read_redrawn(mask: str | Path, size: tuple[int, int]) -> Tensor:
    """Where a mask is white, (1, H, W) bool; ValueError for another size than the picture's, or nothing white."""
    found = read_image(mask).float().mean(0, keepdim=True) > 127
    if found.shape[1:] != size:
        raise ValueError(
            f"the mask {mask} has {found.shape[1]} x {found.shape[2]} pixels, but the picture {size[0]} x {size[1]}"
        )
    if not found.any():
        raise ValueError(f"the mask {mask} has nothing white, which would be what is drawn anew")
    return found


def augment_dataset(
    model: DiffusionModel | str | Path,
    annotations: Path,
    output: str | Path,
    images: Path | None = None,
    format: Format = "coco",
    where: Where = "outside",
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (not changed)
    edit: EditOptions = EditOptions(strength=0.3),  # noqa: B008 (not changed)
    said: str | None = None,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> CocoDetection:
    """Draw the pictures of a detection data set again, such that its boxes stay valid: more pictures to learn from.

    Each is noised to `edit.strength` and restored by a generator of such pictures, outside of its boxes, inside or
    everywhere; what is not drawn anew stays exact. Writes OUTPUT/images (PNG) and OUTPUT/annotations.json, whose
    objects are those of the data set. The command can be interrupted: given again, it goes on with what is missing.

    Args:
        annotations: COCO JSON file, or what `format` says.
        images: the folder that its file names are relative to; by default where the format has it.
        format: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv; auto looks for itself.
        where: what is drawn anew: outside of all boxes, inside of them, or everywhere, in which case only a small
            strength leaves objects where they are.
        said: the class, or the text, that a generator with such is told of all pictures; null for nothing.
        seed: seed of the noise; that of a picture hangs on this and its name alone.

    Returns: the data set written.

    Raises:
        FileNotFoundError, ValueError: no such file, annotations that cannot be read, or pictures that are missing.
    """
    found = open_annotations(annotations, images, format)
    content = deepcopy(found.content)
    dataset = CocoDetection(found)
    dataset.require_files()
    folder, place = ResumableFolder(output, overwrite), pick_device(device)
    model = DiffusionModel.loaded(model).to(place).eval()
    denoiser = model.denoiser(said_alike(model, said, 1), sampling.guidance)
    pngs = {name: png.as_posix() for name, png in _png_names(dataset.file_names).items()}
    settings: dict[str, Any] = {"command": "augment", "model": fingerprint(model), "where": where, "said": said}
    settings |= {"sampling": describe(sampling), "edit": describe(edit), "seed": seed, "precision": precision}
    of_item = {
        Item(name, content_of(dataset.images / name), (f"images/{pngs[name]}",)): index
        for index, name in enumerate(dataset.file_names)
    }
    left = folder.left_of(settings, list(of_item))
    folder.begin(["annotations.json"])
    with autocast(place, precision):
        for item in tqdm(left, "augment", unit="image", disable=hide_bar()):
            image, target = dataset[of_item[item]]
            picture = image.mean(0, keepdim=True) if model.space.image_channels == 1 else image
            inside = covered_by(target["boxes"], (image.shape[1], image.shape[2]))
            redrawn = {"outside": ~inside, "inside": inside, "everywhere": None}[where]
            if redrawn is None or redrawn.any():
                noise = sampling.draws([name_seed(seed, item.name)], model.device)
                free = None if redrawn is None else redrawn[None, None].to(place)
                picture = edit_images(model, picture[None].to(place), noise, sampling, edit, free, denoiser)[0]
            save_png(to_pil(picture.float().cpu().expand(3, -1, -1)), folder.file(item.files[0]))
            folder.add(item, item.files, None)
    for entry in content["images"]:
        entry["file_name"] = pngs[entry["file_name"]]
    write_json(folder.file("annotations.json"), content, indent=None)
    return CocoDetection(folder.path / "annotations.json", folder.path / "images")


def _png_names(names: list[str]) -> dict[str, Path]:
    paths = {name: safe_path(name) for name in names}
    pngs = png_names(paths.values())
    return {name: pngs[path] for name, path in paths.items()}


def covered_by(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels (H, W) have their middle in one of the boxes (n, 4), x1 y1 x2 y2."""
    rows, columns = (torch.arange(side) + 0.5 for side in size)
    x1, y1, x2, y2 = boxes.T[..., None]  # each (n, 1)
    down, across = (rows > y1) & (rows < y2), (columns > x1) & (columns < x2)
    return (down[:, :, None] & across[:, None]).any(0)
