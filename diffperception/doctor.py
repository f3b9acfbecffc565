"""What of this machine, and of its packages, results and speed depend on, and what is missing."""

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util

from packaging.requirements import Requirement

import diffperception
from diffperception.memory import about_memory

FOR_DEVELOPERS = ("dev", "neighbours")  # extras
# Programs that have plug-ins here, by the module that they are imported as; users have installed them by themselves.
NEIGHBOURS = ("diffusers", "mmseg", "detectron2")
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")


@dataclass
class Need:
    """A package that is needed.

    Args:
        package: with the versions that will do.
        extra: the option of installation that brings it, such as `heif`; empty for what everybody needs.
        installed: the version that is there; None without it.
    """

    package: Requirement
    extra: str
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is there in one of the versions that will do."""
        return self.installed is not None and self.package.specifier.contains(self.installed, prereleases=True)

    @property
    def remedy(self) -> str:
        """The command that brings it."""
        return f"pip install '{self.package.name}{self.package.specifier}'"


def needs() -> list[Need]:
    """What the package needs, as its metadata say, those of users' extras too."""
    name = diffperception.__name__
    found = []
    for requirement in map(Requirement, metadata.requires(name) or []):
        extra = match[1] if (match := _EXTRA.search(str(requirement.marker))) else ""
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if applies and extra not in FOR_DEVELOPERS:
            found.append(Need(requirement, extra, version(requirement.name)))
    return found


def version(package: str) -> str | None:
    """Of a package that is installed; None for another."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require_installed(module: str, needed_for: str, command: str) -> None:
    """ModuleNotFoundError, one sentence with the command that installs it, if an optional package is not there.

    Args:
        module: what is imported, such as `mmseg`.
        needed_for: what cannot be done without it.
        command: what installs it.
    """
    if util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{needed_for} needs {module}, which is not installed: `{command}`", name=module)


def about_machine() -> Iterator[tuple[str, str]]:
    """Properties of the machine by name."""
    import torch

    yield diffperception.__name__, diffperception.__version__
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vectors = torch.backends.cpu.get_cpu_capability()
    yield "CPU", f"{cores} cores for this process, {torch.get_num_threads()} threads of torch, {vectors}"
    yield "memory", about_memory()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        yield "accelerator", f"none that torch {torch.__version__} can use: all runs on the CPU"
        return
    for number in range(torch.accelerator.device_count()):
        about = torch.get_device_module(kind).get_device_properties(number)
        yield f"{kind.type}:{number}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"


def neighbours() -> Iterator[tuple[str, bool]]:
    """Whether each program that has a plug-in here can be imported."""
    for module in NEIGHBOURS:
        yield module, util.find_spec(module) is not None
