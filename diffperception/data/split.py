"""Holding images out for validation."""

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path


def held_out(names: Sequence[str], share: float, seed: int) -> list[bool]:
    """Which images are held out: `share` of them, to the nearest whole number, but at least one and not all.

    Images are ordered by a hash of the seed and their name, and the first are taken: images that are added later move
    few others, and the order in which they are listed moves none.

    Raises:
        ValueError: the share is not between 0 and 1, or there are fewer than two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"val_share is {share:g}: give a share between 0 and 1, such as 0.1")
    if len(names) < 2:
        raise ValueError("there is only one image: val_share cannot split it")
    rank = sorted(range(len(names)), key=lambda k: (_hash(names[k], seed), names[k]))
    chosen = set(rank[: min(max(1, round(share * len(names))), len(names) - 1)])
    return [k in chosen for k in range(len(names))]


def part_of(paths: Sequence[Path], root: Path, share: float, seed: int, wanted: bool) -> list[Path]:
    """Those of the images below a folder that are `held_out` (wanted), or the others."""
    chosen = held_out([path.relative_to(root).as_posix() for path in paths], share, seed)
    return [path for path, out in zip(paths, chosen, strict=True) if out == wanted]


def _hash(name: str, seed: int) -> bytes:
    return blake2b(f"{seed}:{unicodedata.normalize('NFC', name)}".encode(errors="replace"), digest_size=8).digest()
