"""Memory in a process of the command line: kept when it is freed, in large pages, unless the user says otherwise."""

import json
import os
import subprocess
import sys

import pytest

from diffperception.memory import HUGE_PAGES, about_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")

# Many blocks that are freed together lie at the end of the heap, and glibc by itself gives that back.
FILLS = """
import json, os, resource
{first}
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(20_000) for _ in range(1250)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([[faults() for _ in range(5)], os.environ.get("THP_MEM_ALLOC_ENABLE")]))
"""
OURS = "from diffperception.memory import keep_freed_memory; keep_freed_memory()"


def fill(first: str, **variables: str) -> tuple[list[int], str | None]:
    """Pages that are new in each round, and the variable that torch reads, in a process of its own."""
    command = [sys.executable, "-c", FILLS.format(first=first)]
    environment = {**os.environ, HUGE_PAGES: "0", "OMP_NUM_THREADS": "1", **variables}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def test_freed_memory_is_used_again_without_new_pages() -> None:
    (first, *_, last), pages = fill(OURS)
    assert first > 10_000 > 1000 > last
    assert pages == "0"  # as the user said


def test_the_users_setting_wins() -> None:
    assert fill(OURS, MALLOC_MMAP_THRESHOLD_="65536")[0][-1] > 10_000  # every block is taken from outside the heap


def test_the_doctor_says_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES", HUGE_PAGES):
        monkeypatch.delenv(name, raising=False)
    assert about_memory() == "what was freed is kept for reuse, large pages"
    monkeypatch.setenv(HUGE_PAGES, "0")
    assert about_memory() == "what was freed is kept for reuse, no large pages (THP_MEM_ALLOC_ENABLE)"
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert about_memory() == "as GLIBC_TUNABLES and LD_PRELOAD of the environment says"
