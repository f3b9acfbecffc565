"""How a process of the command line takes memory from Linux: what was freed is kept, and large blocks have large pages.

A network allocates and frees blocks of megabytes by the thousand. What lies free at the end of its heap glibc gives
back to the system, which fills new pages of 4 kB with zeros the next time: none to 80,000 in a forward pass of a UNet,
depending on where blocks happened to lie when the process began.
"""

import ctypes
import os
import sys

# mallopt(3): M_TRIM_THRESHOLD, no end of the heap is given back; M_MMAP_THRESHOLD, up to 32 MB, the most, come from
# the heap from the beginning on. Larger blocks stay outside it: of those kept, glibc would find too few that fit.
KEEP = {-1: -1, -3: 32 * 2**20}
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # read by torch as it allocates for the first time
_OF_GLIBC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> None:
    """Keep freed memory for reuse, and ask for large pages, unless the environment says otherwise; call it first.

    Sizes of pages are read when torch first allocates; the rest is of use at any time, and of processes forked later.
    On other systems than Linux with glibc nothing changes.
    """
    if set_by_user():
        return
    os.environ.setdefault(HUGE_PAGES, "1")
    if libc := _glibc():
        for parameter, value in KEEP.items():
            libc.mallopt(parameter, value)


def set_by_user() -> list[str]:
    """The variables of the environment that say how memory is taken: they win."""
    own = {"GLIBC_TUNABLES": "glibc.malloc", "LD_PRELOAD": "malloc"} | dict.fromkeys(_OF_GLIBC, "")
    return [name for name, part in own.items() if name in os.environ and part in os.environ[name]]


def about_memory() -> str:
    """What the commands do, in words."""
    if names := set_by_user():
        return f"as {' and '.join(names)} of the environment says"
    if not _glibc():
        return "as the system gives it"
    pages = "large pages" if os.environ.get(HUGE_PAGES, "1") == "1" else f"no large pages ({HUGE_PAGES})"
    return f"what was freed is kept for reuse, {pages}"


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
