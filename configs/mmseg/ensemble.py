# Ten pixel classifiers on the blocks at two timesteps, of arXiv 2112.03126. Each learns from pixels of its own.
_base_ = ["_base_/frozen.py", "_base_/folder.py", "_base_/schedule_frozen.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(timesteps=[50, 150]),
    decode_head=dict(type="PixelEnsembleHead", in_index="all", num_classes=7, members=10, pixels=64),
)
