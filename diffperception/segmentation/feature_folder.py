"""Feature maps of many images on disk: writing a folder of them, and training on what is there."""

import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from diffperception.data.images import BrokenImageError, load_images, read_size, resize_short_side, short_side_size
from diffperception.data.listing import list_images
from diffperception.devices import (
    Precision,
    autocast,
    first_process,
    gather,
    hide_bar,
    join_processes,
    pick_device,
    share,
)
from diffperception.echo import echo, echo_remark, plural
from diffperception.files import write_json
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.segmentation.feature_cache import (
    file_bytes,
    image_key,
    in_bytes,
    kept_images,
    load_maps,
    parse_bytes,
    save_maps,
    settings_of,
)
from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import FeatureMaps

EXTRACTOR = "extractor.safetensors"
SETTINGS = "settings.json"


class ExtractedFeatures(FeatureExtractor):
    """Maps from a folder that :func:`extract_features` wrote; those of other images or other sizes are computed.

    Args:
        folder: what was written.
        allow: packages of yours whose feature extractor may be loaded from it.

    Raises:
        FileNotFoundError, ValueError: the folder holds no features, or a feature extractor that is not allowed.
    """

    def __init__(self, folder: str | Path, allow: Sequence[str] = ()) -> None:
        features = FeatureExtractor.load(Path(folder) / EXTRACTOR, allow=tuple(allow))
        super().__init__(features.info, features.multiple, features.window)
        self.features = features
        self.files = kept_images(Path(folder))

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.features.encode(images)

    def maps(self, image: Tensor) -> FeatureMaps:
        file = self.files.get(image_key(image))
        return self.features.maps(image) if file is None else load_maps(file).to(torch.float32).to(self.device)

    def portable(self) -> FeatureExtractor:
        return self.features

    def save(self, path: str | Path) -> None:
        """A file names no folders: it holds the extractor."""
        self.features.save(path)


def extract_features(
    features: FeatureExtractor,
    images: str,
    output: Path,
    short_side: PositiveInt | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    max_bytes: str | None = None,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> list[str]:
    """Write the feature maps of images to disk, at their native resolutions: a safetensors file per image.

    Before it starts it says how many bytes that will be. It can be interrupted: given again, it goes on with the images
    whose files are missing, and does those anew that have changed. Images that cannot be read are left out and named at
    the end. Several processes, started by torchrun, share the images.

    For example: `diffperception extract --features diffperception.segmentation.DiffusionFeatures
    --features.generator runs/shapes_ddpm/model.safetensors --images photos --output features --max_bytes 2GB`.

    Training takes the maps from there instead of computing them: `diffperception train --task segmentation
    --features diffperception.segmentation.ExtractedFeatures --features.folder features ...`.

    Args:
        features: what gives the maps: DiffusionFeatures, TimmFeatures, RGBFeatures, or a class of your own.
        output: folder for the files, named as the images, settings.json, which says what they hold, and the extractor,
            so that ExtractedFeatures knows other images.
        short_side: resize the images to this short side first.
        dtype: type of the numbers.
        max_bytes: refuse to start if all files would take more than this, such as 2GB.
        overwrite: begin anew in a folder that is not empty; what earlier calls wrote is removed, and nothing else.

    Returns: what is wrong with images that cannot be read, a sentence each.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: the folder holds other things, the files would be too large, or no image can be read.
    """
    limit = None if max_bytes is None else parse_bytes(max_bytes)
    number_type: torch.dtype = getattr(torch, dtype)
    features = features.to(pick_device(device))
    root, paths, remark = list_images(images, leave_out=output)
    maps_of = [[info.name, info.channels, info.stride] for info in features.info]
    settings = {**settings_of(features), "maps": maps_of, "dtype": dtype, "short_side": short_side}
    folder = ResumableFolder(output, overwrite)
    sizes, broken = _sizes(paths, short_side)
    each = {path: file_bytes(features, size, number_type) for path, size in sizes.items()}
    with join_processes():
        of_item = {_item(path, root): path for path in share(list(sizes))}
        left = {of_item[item]: item for item in folder.left_of({"command": "extract", **settings}, list(of_item))}
        to_write = sum(gather([each[path] for path in left]))
        echo_remark(remark)
        _require_room(features, sizes, each, to_write, number_type, limit, output)
        folder.begin()
        if first_process():
            write_json(folder.file(SETTINGS), settings)
            features.save(folder.file(EXTRACTOR))
        for (sample,) in tqdm(load_images(list(left), workers=workers), "extract", unit="image", disable=hide_bar()):
            item = left[sample.path]
            if sample.image is None:
                folder.add(item, [], sample.problem)
                continue
            image = resize_short_side(sample.image, short_side)
            with autocast(features.device, precision):
                maps = features.maps(image).stored(number_type, str(sample.path))
            save_maps(maps, features.info, folder.file(item.files[0]), image_key(image))
            folder.add(item, item.files, None)
        broken += [problem for problem in folder.results(gather(list(of_item))) if problem]
    if len(broken) == len(paths):
        raise ValueError(f"no image can be read: {broken[0]}")
    echo("\n".join([f"{output}: feature maps", *(["left out:", *broken] if broken else [])]))
    return broken


def _item(path: Path, root: Path) -> Item:
    name = path.relative_to(root)
    return Item(name.as_posix(), content_of(path), (name.with_name(f"{name.name}.safetensors").as_posix(),))


def _sizes(paths: Sequence[Path], short_side: int | None) -> tuple[dict[Path, tuple[int, int]], list[str]]:
    """Height and width that images will have, by their headers; and what is wrong with those that cannot be read."""
    sizes, broken = {}, []
    for path in paths:
        try:
            sizes[path] = short_side_size(*read_size(path), short_side)
        except BrokenImageError as error:
            broken.append(str(error))
    if not sizes:
        raise ValueError(f"no image can be read: {broken[0]}")
    return sizes, broken


def _require_room(
    features: FeatureExtractor,
    sizes: dict[Path, tuple[int, int]],
    each: dict[Path, int],
    to_write: int,
    dtype: torch.dtype,
    limit: int | None,
    output: Path,
) -> None:
    """Say how many bytes will be written and how many are free; ValueError where they are too many."""
    total = sum(each.values())
    folder = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    echo(
        f"{plural(len(sizes), 'image')} with {features.channels} features per pixel,"
        f" {str(dtype).removeprefix('torch.')}: {total} bytes ({in_bytes(total)}), of which {in_bytes(to_write)} are to"
        f" be written; {in_bytes(free)} are free"
    )
    if limit is not None and total > limit:
        ways = [f"{sum(so_far <= limit for so_far in accumulate(each.values()))} of the images would fit"]
        if dtype == torch.float32:
            half = sum(file_bytes(features, size, torch.float16) for size in sizes.values())
            ways.append(f"float16 would take {in_bytes(half)}")
        if len(features.info) > 1:
            cells = torch.tensor([features.map_sizes(*size) for size in sizes.values()]).prod(-1).sum(0).tolist()
            room = [info.channels * number * dtype.itemsize for info, number in zip(features.info, cells, strict=True)]
            largest = features.info[room.index(max(room))].name
            ways.append(f"the largest map, {largest}, takes {in_bytes(max(room))}")
        raise ValueError(
            f"the features of {plural(len(sizes), 'image')} take {in_bytes(total)}, more than the limit of"
            f" {in_bytes(limit)}: {'; '.join(ways)}"
        )
    if to_write > free:
        raise ValueError(f"the features take {in_bytes(to_write)}, but only {in_bytes(free)} are free in {folder}")
