"""A generated annotation file of COCO's size, and what loading and checking it costs.

`python tests/data/large_coco.py` writes it to a temporary folder and prints the figures.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LOAD = "from diffperception.data import CocoDetection; CocoDetection({path!r}, '.')"
CHECK = "from diffperception.data.check import check_coco; assert not check_coco({path!r}).errors"
MEASURE = """
import resource, time
{code}
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def write_large(path: Path, images: int = 118_000, objects: int = 860_000, outline_points: int = 0) -> None:
    """Write a sound COCO file with 80 categories, each object with an outline of so many points."""
    rng = np.random.default_rng(0)
    image = rng.integers(images, size=objects).tolist()
    category = rng.integers(80, size=objects).tolist()
    sides = rng.uniform(5, 200, size=(objects, 2)).round(2)
    boxes = np.concatenate([rng.uniform(0, (400, 200), size=(objects, 2)).round(2), sides], axis=1).tolist()
    outline = [float(number) for number in rng.uniform(0, 400, size=2 * outline_points).round(2)]
    with open(path, "w") as file:
        file.write('{"images": [')
        file.write(
            ", ".join(
                f'{{"id": {i}, "file_name": "{i:012d}.jpg", "width": 640, "height": 480, "license": 1}}'
                for i in range(images)
            )
        )
        file.write('], "annotations": [')
        for number, (i, k, box) in enumerate(zip(image, category, boxes, strict=True)):
            file.write(", " if number else "")
            file.write(
                f'{{"segmentation": [{outline}], "area": {box[2] * box[3]:.2f}, "iscrowd": 0, "image_id": {i},'
                f' "bbox": {box}, "category_id": {k + 1}, "id": {number + 1}}}'
            )
        file.write('], "categories": [')
        file.write(", ".join(f'{{"id": {k}, "name": "class {k}"}}' for k in range(1, 81)))
        file.write("]}")


def cost(code: str, path: Path) -> tuple[float, float]:
    """CPU seconds and peak resident gigabytes of a fresh process that runs `code` on the file, imports included."""
    script = MEASURE.format(code=code.format(path=str(path)))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, result.stdout.split())
    return seconds, gigabytes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "instances.json"
        for points in (0, 25):
            write_large(file, outline_points=points)
            sys.stdout.write(f"{file.stat().st_size / 1e6:.0f} MB, outlines of {points} points\n")
            for name, code in (("load", LOAD), ("check", CHECK)):
                seconds, gigabytes = cost(code, file)
                sys.stdout.write(f"  {name}: {seconds:.1f} s of one core, {gigabytes:.2f} GB\n")
