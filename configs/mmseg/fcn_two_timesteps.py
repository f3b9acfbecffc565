# FCNHead on the blocks at two timesteps, resized to one size and joined.
_base_ = ["_base_/frozen.py", "_base_/folder.py", "_base_/schedule_frozen.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(timesteps=[50, 250]),
    decode_head=dict(
        type="FCNHead",
        in_index="all",
        input_transform="resize_concat",
        channels=64,
        num_convs=1,
        concat_input=False,
        kernel_size=1,
        dropout_ratio=0.1,
        num_classes=7,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
)
