"""`diffperception predict`: objects in images, as a COCO results file and as pictures."""

import glob
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from diffperception.cli import counted, say
from diffperception.cli.evaluate import load_detector, pick_device, prediction_options
from diffperception.cli.report import STRIP_STEPS, draw_strip, write_text
from diffperception.data.images import BrokenImageError, read_image
from diffperception.detection import Detector, DiffusionDet
from diffperception.diffusion import sample_seed
from diffperception.detection.evaluator import results_rows
from diffperception.detection.inference import require_options
from diffperception.visualization.draw import THRESHOLD, draw_detections, save_png

SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def predict(
    model: Path,
    images: str,
    output: Path,
    steps: PositiveInt | None = None,
    num_boxes: PositiveInt | None = None,
    renewal: ClosedUnitInterval | None = None,
    ensemble: bool | None = None,
    eta: ClosedUnitInterval | None = None,
    nms: ClosedUnitInterval | None = None,
    score_threshold: ClosedUnitInterval = THRESHOLD,
    pictures: NonNegativeInt = 100,
    strips: NonNegativeInt = 3,
    batch_size: PositiveInt = 1,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    trust: str | None = None,
) -> None:
    """Detect objects in an image, or in all images of a folder.

    Writes OUTPUT/predictions.json, a COCO results file with all detections; OUTPUT/images.json, a COCO file with the
    images' ids, names and sizes and with the categories; OUTPUT/pictures, the images with their detections; and
    OUTPUT/strips, where noise turns into boxes. Images that cannot be read are left out and named at the end.

    Args:
        model: file that training wrote, model.safetensors.
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        output: folder for the results; it is made if it is not there.
        steps: denoising steps; more are slower and a little better. By default the model's own number.
        num_boxes: boxes to start from; more find more in crowded images. By default the model's own number.
        renewal: between steps, boxes with no class above this probability are drawn anew; 0 turns it off. By default
            0.5.
        ensemble: whether the detections of all steps count, or the last step's alone. By default they do.
        eta: how much noise a step adds: 1, by default, is the ancestral step, 0 the deterministic one.
        nms: of two boxes of a class whose IoU is above this, only the better counts; 1 turns it off. By default 0.5.
        score_threshold: boxes with a lower score are not drawn; predictions.json has them all.
        pictures: draw the detections of at most this many images.
        strips: draw noise turning into boxes for at most this many images.
        batch_size: images that are predicted together; the results do not depend on it.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        seed: of the noise that boxes start from; it and the name of an image decide the noise of that image.
        overwrite: write into a folder that is not empty, replacing files of the same names.
        trust: a Python package of your own whose model classes the model file may name.
    """
    root, paths = find_images(images, output)
    detector = load_detector(model, trust).to(pick_device(device))
    settings = {
        "steps": steps,
        "num_boxes": num_boxes,
        "renewal_threshold": renewal,
        "ensemble": ensemble,
        "eta": eta,
        "nms_threshold": nms,
    }
    options = prediction_options(detector, {name: value for name, value in settings.items() if value is not None})
    require_options(detector, options)
    require_room(output, overwrite)
    results = Results(detector.classes)
    picture_names = name_pictures([path.relative_to(root) for path in paths])
    for sample, detections in detect(detector, paths, options, seed, batch_size, workers):
        if sample.image is None:
            results.broken.append(sample.problem)
            continue
        name = sample.path.relative_to(root)
        results.add(name, sample.image, detections)
        if len(results.images) <= pictures:
            picture = draw_detections(sample.image, detections, detector.classes, score_threshold)
            save_png(picture, output / "pictures" / picture_names[name])
        if len(results.images) <= strips and isinstance(detector, DiffusionDet):
            noise = noise_seed(seed, sample.path)
            of_strip = replace(options["options"], steps=steps or STRIP_STEPS)
            strip = draw_strip(detector, sample.image, noise, of_strip, score_threshold)
            save_png(strip, output / "strips" / picture_names[name])
    results.write(output)
    say(results.summary(output))


def find_images(images: str, output: Path) -> tuple[Path, list[Path]]:
    """The image files that a path, a folder or a pattern names, but for those below `output`; and the folder above all.

    Raises:
        FileNotFoundError, ValueError: there is nothing of that name, or no image in it.
    """
    path = Path(images)
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        matches = sorted(Path(name) for name in glob.glob(images, recursive=True) if Path(name).is_file())
        if not matches:
            raise FileNotFoundError(f"there is no image or folder {images}, nor does it match as a pattern")
        return Path(os.path.commonpath([match.parent for match in matches])), matches
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not file.name.startswith(".")
        and output.resolve() not in file.resolve().parents
    )
    if not found:
        raise ValueError(f"the folder {path} has no images in it (files that end in {', '.join(SUFFIXES)})")
    return path, found


def require_room(output: Path, overwrite: bool) -> None:
    """ValueError if `output` has something in it that must not be overwritten."""
    if output.is_file():
        raise ValueError(f"{output} is a file: name a folder for the results")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"the folder {output} is not empty: choose another, or allow to overwrite it with --overwrite")


def name_pictures(names: list[Path]) -> dict[Path, Path]:
    """A PNG's name for each image: a/b.jpg gives a/b.png, or a/b.jpg.png where there is an a/b.png too."""
    doubled = Counter(name.with_suffix(".png") for name in names)
    return {
        name: name.with_suffix(".png") if doubled[name.with_suffix(".png")] == 1 else name.with_name(f"{name.name}.png")
        for name in names
    }


class Sample(NamedTuple):
    """An image file: float32 (3, H, W), RGB, 0..1; or None and what the problem is."""

    path: Path
    image: Tensor | None
    problem: str = ""


class ImageFiles(Dataset[Sample]):
    """Image files as samples, broken ones included."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        try:
            return Sample(path, TF.to_dtype(read_image(path), torch.float32, scale=True))
        except BrokenImageError as error:
            return Sample(path, None, str(error))


def detect(
    detector: Detector, paths: list[Path], options: dict[str, Any], seed: int, batch_size: int, workers: int
) -> Iterator[tuple[Sample, dict[str, Tensor]]]:
    """Each image with its detections, on the CPU, as they are made; broken images have none. Shows the time left."""
    files = ImageFiles(paths)
    processes = min(workers, (len(files) - 1) // batch_size)
    with tqdm(total=len(files), desc="predict", unit="image", disable=None) as bar:
        for batch in DataLoader(files, batch_size, num_workers=processes, collate_fn=list):
            images = [sample.image.to(detector.device) for sample in batch if sample.image is not None]
            seeds = [noise_seed(seed, sample.path) for sample in batch if sample.image is not None]
            detections = iter(detector.predict(images, seeds=seeds, **options) if images else [])
            for sample in batch:
                found = {} if sample.image is None else next(detections)
                yield sample, {key: value.cpu() for key, value in found.items()}
                bar.update()


def noise_seed(seed: int, path: Path) -> int:
    """The seed of an image's noise: it does not depend on which other images are predicted."""
    return sample_seed(seed, zlib.crc32(path.name.encode()))


class Results:
    """Detections of many images in COCO's formats: image ids count from 1, the category id of label k is k + 1."""

    def __init__(self, classes: list[str]):
        self.classes = classes
        self.category_ids = list(range(1, len(classes) + 1))
        self.images: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.broken: list[str] = []

    def add(self, name: Path, image: Tensor, detections: dict[str, Tensor]) -> None:
        """Take the detections of an image, whose pixels their boxes are in."""
        number, (height, width) = len(self.images) + 1, image.shape[-2:]
        self.images.append({"id": number, "file_name": name.as_posix(), "width": width, "height": height})
        self.rows += results_rows([number], [detections], self.category_ids)

    def write(self, output: Path) -> None:
        """Write predictions.json and images.json; ValueError if there is no image to write about."""
        if not self.images:
            raise ValueError(f"no image can be read: {self.broken[0]}")
        categories = [{"id": k, "name": name} for k, name in zip(self.category_ids, self.classes, strict=True)]
        content = {"images": self.images, "annotations": [], "categories": categories}
        write_text(output / "images.json", json.dumps(content))
        write_text(output / "predictions.json", json.dumps(self.rows))

    def summary(self, output: Path) -> str:
        """What was found and where it is, and which images are broken."""
        lines = [f"{counted(len(self.rows), 'detection')} in {counted(len(self.images), 'image')}: {output}"]
        if self.broken:
            lines.append(f"{counted(len(self.broken), 'image')} left out:")
        return "\n".join(lines + [f"  {problem}" for problem in self.broken])
