"""Makes detectron2 0.6 importable as pure Python, without its compiled part and beside a newer numpy and pillow."""

import builtins
import importlib.util
import sys
import types

import numpy as np
import PIL.Image

COMPILED = "detectron2._C"


class Uncompiled(types.ModuleType):
    """Stands for a compiled module: it can be imported, and says so where one of its functions is called."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            raise NotImplementedError(f"detectron2 is not compiled here: there is no {name}")

        return call


def pytest_configure(config) -> None:
    if importlib.util.find_spec("detectron2") is None or importlib.util.find_spec(COMPILED) is not None:
        return
    # Names that release 0.6 uses, and that newer versions of pillow and numpy no longer have.
    PIL.Image.LINEAR = PIL.Image.BILINEAR
    for name in ("bool", "float", "int", "object"):
        if name not in vars(np):
            setattr(np, name, getattr(builtins, name))
    import detectron2

    detectron2._C = sys.modules[COMPILED] = Uncompiled(COMPILED)
