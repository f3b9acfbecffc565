# UPerHead on three blocks of a frozen generator.
_base_ = ["_base_/frozen.py", "_base_/folder.py", "_base_/schedule_frozen.py", "_base_/runtime.py"]
model = dict(
    decode_head=dict(
        type="UPerHead",
        in_index="all",
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=7,
        norm_cfg=dict(type="BN"),  # SyncBN on several GPUs
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
)
