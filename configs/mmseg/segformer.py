# SegformerHead on three blocks of a frozen generator.
_base_ = ["_base_/frozen.py", "_base_/folder.py", "_base_/schedule_frozen.py", "_base_/runtime.py"]
model = dict(
    decode_head=dict(
        type="SegformerHead",
        in_index="all",
        channels=64,
        dropout_ratio=0.1,
        num_classes=7,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
)
