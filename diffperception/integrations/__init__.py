"""Plug-ins for the libraries that users of diffusion models live in; each is imported only when asked for."""

import importlib.util


def require_installed(module: str, needed_for: str, command: str) -> None:
    """ModuleNotFoundError, one sentence with the command that installs it, if a neighbour's module is not there.

    Args:
        module: what is imported, such as `mmseg`.
        needed_for: what cannot be done without it.
        command: what installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{needed_for} needs {module}, which is not installed: `{command}`", name=module)
