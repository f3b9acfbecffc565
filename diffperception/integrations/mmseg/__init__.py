"""mmsegmentation: our features under its decode heads, our ensemble as one of them, its data sets in our training.

Importing this registers its classes, and the feature extractors, in ``mmseg.registry.MODELS``.
"""

from diffperception.doctor import require_installed

FORK = "pip install onedl-mmcv==2.3.6 onedl-mmengine==0.10.12 onedl-mmsegmentation==1.4.2"
for name in ("mmengine", "mmcv", "mmseg"):
    require_installed(name, "diffperception.integrations.mmseg", FORK)
try:
    from diffperception.integrations.mmseg.backbones import DiffusionBackbone, DiffusionPyramid, FrozenBackbone
    from diffperception.integrations.mmseg.data import LabelledDataset, labelled
    from diffperception.integrations.mmseg.heads import PixelEnsembleHead
    from diffperception.integrations.mmseg.segmentors import DiffusionSegmentor, FittedSegmentor
except ModuleNotFoundError as error:
    if error.name == "mmcv._ext":
        raise ImportError(
            "this mmsegmentation needs mmcv with its compiled operators, which mmcv-lite does not have: install an mmcv"
            f" that was built for your torch, or the fork that needs none, in a fresh environment: `{FORK}`"
        ) from error
    raise
