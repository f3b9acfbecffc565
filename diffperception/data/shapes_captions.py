"""Captions of drawn scenes, in English and Chinese: names, colours, sizes, and what is left of or above what."""

from itertools import permutations

import numpy as np

from diffperception.data.shapes import CLASSES, Scene

LANGUAGES = {"en": "", "zh": "_zh"}  # with what their files' names end in
CAPTIONS = 5  # of an image, as COCO has them
SMALL, LARGE = 0.36, 0.48  # of an image's shorter side: what is called so is smaller, or larger
APART = 0.12  # of an image's side: how far centres are apart at least where one thing is beside another
RELATIONS = {"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}
CHINESE = {
    **{"red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "white": "白色"},
    **{"ellipse": "椭圆", "rectangle": "长方形", "triangle": "三角形", "star": "星形", "cross": "十字形"},
    **{"ring": "圆环", "small": "小的", "large": "大的"},
}


def describe_scene(rng: np.random.Generator, scene: Scene) -> list[dict[str, str]]:
    """Captions by language, those of each language saying the same; for scenes whose objects have named colours."""
    beside = _relations(scene)
    captions = []
    for _ in range(CAPTIONS):
        things = [_thing(scene, i, sized=bool(rng.random() < 0.4)) for i in range(len(scene.labels))]
        if beside and rng.random() < 0.7:
            captions.append(_related(things, *beside[rng.integers(len(beside))]))
        else:
            captions.append(_listed([things[i] for i in rng.permutation(len(things))], bool(rng.random() < 0.2)))
    return captions


def _thing(scene: Scene, index: int, sized: bool) -> dict[str, str]:
    """An object by its colour and shape, and its size if that is clear."""
    x1, y1, x2, y2 = scene.boxes[index]
    size = np.sqrt((x2 - x1) * (y2 - y1)) / min(scene.owner.shape)
    words = ["small" if size < SMALL else "large"] if sized and not SMALL <= size <= LARGE else []
    words += [scene.colors[index], CLASSES[scene.labels[index]]]
    return {"en": f"a {' '.join(words)}", "zh": "一个" + "".join(CHINESE[word] for word in words)}


def _relations(scene: Scene) -> list[tuple[int, str, int]]:
    """Which object is clearly left of, right of, above or below which other."""
    sides = np.array(scene.owner.shape[::-1])
    centers = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2 / sides
    found = []
    for i, j in permutations(range(len(centers)), 2):
        (x, y), words = centers[j] - centers[i], ("left of", "right of")
        if abs(y) > abs(x):
            x, y, words = y, x, ("above", "below")
        if abs(x) > max(APART, 1.5 * abs(y)):
            found.append((i, words[0] if x > 0 else words[1], j))
    return found


def _related(things: list[dict[str, str]], i: int, relation: str, j: int) -> dict[str, str]:
    first, second = things[i], things[j]
    return {
        "en": f"{first['en']} {relation} {second['en']}",
        "zh": f"{first['zh']}在{second['zh']}的{RELATIONS[relation]}",
    }


def _listed(things: list[dict[str, str]], picture: bool) -> dict[str, str]:
    english, chinese = ([thing[language] for thing in things] for language in LANGUAGES)
    *before, last = english
    *earlier, end = chinese
    caption = {
        "en": f"{', '.join(before)} and {last}" if before else last,
        "zh": f"{'、'.join(earlier)}和{end}" if earlier else end,
    }
    return {"en": f"a picture of {caption['en']}", "zh": f"{caption['zh']}的图片"} if picture else caption
