"""`diffperception extract`."""

import json
import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from diffperception.cli import counted, say
from diffperception.configuration.settings import differences, read_settings
from diffperception.data.images import BrokenImageError, read_image, read_size
from diffperception.devices import pick_device
from diffperception.files import list_images as find_images
from diffperception.files import write_text
from diffperception.segmentation import FeatureExtractor
from diffperception.segmentation.feature_cache import file_bytes, fingerprint, in_bytes, parse_bytes, save_maps

SETTINGS = "settings.json"
LEFT_OUT = "left_out.json"  # images whose headers can be read, but not their pixels: their problems, and of which file
Size = tuple[int, int]  # height and width


def extract(
    features: FeatureExtractor,
    images: str,
    output: Path,
    short_side: PositiveInt | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    limit: str | None = None,
    device: str = "auto",
) -> None:
    """Write the feature maps of images to disk, at their native resolutions: a safetensors file an image.

    Before it starts it says how many bytes that will be. It can be interrupted: given again, the command goes on with
    the images whose files are missing or incomplete. Images that cannot be read are left out and named at the end.

    For example: `diffperception extract --features diffperception.segmentation.DiffusionFeatures
    --features.generator runs/shapes_ddpm/model.safetensors --images photos --output features --limit 2GB`.

    The files hold the maps by their names, and are read by `diffperception.segmentation.feature_cache.load_maps`.

    Args:
        features: what gives the maps: DiffusionFeatures, TimmFeatures or RGBFeatures.
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        output: folder for the files, named as the images, and settings.json, which says what they hold.
        short_side: resize the images to this short side first.
        dtype: of the numbers.
        limit: refuse to start if all files would take more than this, such as 2GB.
        device: cpu, cuda, cuda:1, ... or auto.
    """
    most = None if limit is None else parse_bytes(limit)
    root, paths = find_images(images, output)
    settings = settings_of(features, dtype, short_side)
    require_same(output / SETTINGS, settings)
    known = read_settings(output / LEFT_OUT) if (output / LEFT_OUT).exists() else {}
    unreadable = {
        path: known[str(path)]["problem"]
        for path in paths
        if str(path) in known and known[str(path)]["file"] == stamp(path)
    }
    sizes, broken = image_sizes([path for path in paths if path not in unreadable], short_side)
    broken += unreadable.values()
    if not sizes:
        raise ValueError(f"no image can be read: {broken[0]}")
    files = {path: output / path.relative_to(root).with_name(f"{path.name}.safetensors") for path in sizes}
    each = {path: file_bytes(features, size, getattr(torch, dtype)) for path, size in sizes.items()}
    left = [path for path, file in files.items() if not (file.exists() and file.stat().st_size == each[path])]
    announce(features, sizes, each, left, settings, most, output)
    write_text(output / SETTINGS, json.dumps(settings, indent=2) + "\n")
    features.to(pick_device(device))
    done = len(files) - len(left)
    for path in tqdm(left, desc="extract", unit="image", initial=done, total=len(files), disable=None):
        try:
            image = read_resized(path, short_side)
        except BrokenImageError as error:
            broken.append(str(error))
            known[str(path)] = {"problem": str(error), "file": stamp(path)}
            write_text(output / LEFT_OUT, json.dumps(known, indent=2) + "\n")
            continue
        save_maps(features.maps(image).stored(getattr(torch, dtype), str(path)), features.info, files[path])
    if len(broken) == len(paths):
        raise ValueError(f"no image can be read: {broken[0]}")
    say(f"{output}: feature maps of {counted(len(paths) - len(broken), 'image')}")
    if broken:
        say("left out:\n" + "\n".join(broken))


def stamp(path: Path) -> list[int]:
    """What tells a file from the one that had its name before: bytes, and when it was written."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def settings_of(features: FeatureExtractor, dtype: str, short_side: int | None) -> dict[str, Any]:
    """What the files depend on besides the images."""
    return {
        "features": type(features).__name__,
        "arguments": json.loads(json.dumps(features.arguments)),
        "weights": fingerprint(features),
        "maps": [[info.name, info.channels, info.stride] for info in features.info],
        "dtype": dtype,
        "short_side": short_side,
    }


def require_same(path: Path, settings: dict[str, Any]) -> None:
    """ValueError if the folder of a settings file holds maps of other settings, or other things."""
    if path.exists():
        changed = differences(read_settings(path), settings)
        if changed:
            raise ValueError(
                f"{path.parent} holds features of other settings ({', '.join(changed)}): choose another --output"
            )
    elif path.parent.is_dir() and any(path.parent.iterdir()):
        raise ValueError(f"the folder {path.parent} holds other files: choose another --output")


def image_sizes(paths: Sequence[Path], short_side: int | None) -> tuple[dict[Path, Size], list[str]]:
    """Heights and widths that images will have, from their headers alone; and what is wrong with broken ones."""
    sizes: dict[Path, Size] = {}
    broken = []
    for path in paths:
        try:
            size = read_size(path)
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        sizes[path] = size if short_side is None else resized(*size, short_side)
    return sizes, broken


def resized(height: int, width: int, short_side: int) -> Size:
    """The size that torchvision's `resize` gives an image for its short side."""
    long_side = int(short_side * max(height, width) / min(height, width))
    return (short_side, long_side) if height <= width else (long_side, short_side)


def read_resized(path: Path, short_side: int | None) -> Tensor:
    """An image, float32 (3, H, W), 0..1."""
    image = TF.to_dtype(read_image(path), torch.float32, scale=True)
    return image if short_side is None else TF.resize(image, [short_side], antialias=True)


def announce(
    features: FeatureExtractor,
    sizes: dict[Path, Size],
    each: dict[Path, int],
    left: Sequence[Path],
    settings: dict[str, Any],
    limit: int | None,
    output: Path,
) -> None:
    """Say how many bytes will be written and how many are free; ValueError where they are too many."""
    dtype = getattr(torch, settings["dtype"])
    total, to_write = sum(each.values()), sum(each[path] for path in left)
    folder = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    say(
        f"{counted(len(sizes), 'image')} with {features.channels} features a pixel, {settings['dtype']}: {total} bytes"
        f" ({in_bytes(total)}), of which {in_bytes(to_write)} are to be written; {in_bytes(free)} are free"
    )
    if limit is not None and total > limit:
        raise ValueError(
            f"the features of {counted(len(sizes), 'image')} take {in_bytes(total)}, more than the limit of"
            f" {in_bytes(limit)}: {what_fits(features, list(each.values()), sizes, dtype, limit)}"
        )
    if to_write > free:
        raise ValueError(f"the features take {in_bytes(to_write)}, but only {in_bytes(free)} are free in {folder}")


def what_fits(
    features: FeatureExtractor, each: Sequence[int], sizes: dict[Path, Size], dtype: torch.dtype, most: int
) -> str:
    """Ways to stay under a limit."""
    ways = [f"{sum(total <= most for total in accumulate(each))} of the images would fit"]
    if dtype == torch.float32:
        half = sum(file_bytes(features, size, torch.float16) for size in sizes.values())
        ways.append(f"float16 would take {in_bytes(half)}")
    cells = [
        sum(h * w for h, w in (features.map_sizes(*size)[i] for size in sizes.values()))
        for i in range(len(features.info))
    ]
    share = [info.channels * number * dtype.itemsize for info, number in zip(features.info, cells, strict=True)]
    largest = max(range(len(share)), key=share.__getitem__)
    if len(share) > 1:
        ways.append(f"the largest map, {features.info[largest].name}, takes {in_bytes(share[largest])}")
    return "; ".join(ways)
