# upernet.py in mmengine's pure Python: classes are imported, so an editor knows them.
from mmengine.config import read_base
from mmseg.models import CrossEntropyLoss, UPerHead

from diffperception.integrations.mmseg import DiffusionBackbone, DiffusionSegmentor

with read_base():
    from ._base_.folder import *
    from ._base_.frozen import *
    from ._base_.frozen import model
    from ._base_.runtime import *
    from ._base_.schedule_frozen import *

model.update(
    dict(
        type=DiffusionSegmentor,
        backbone=dict(type=DiffusionBackbone, blocks=[4, 3, 2]),
        decode_head=dict(
            type=UPerHead,
            in_index="all",
            pool_scales=(1, 2),
            channels=64,
            dropout_ratio=0.1,
            num_classes=7,
            norm_cfg=dict(type="BN"),
            align_corners=False,
            loss_decode=dict(type=CrossEntropyLoss, avg_non_ignore=True),
        ),
    )
)
