# A segmenter that `fit_segmenter` or `diffperception train` has made, scored by mmseg: python tools/test.py of mmseg
# wants a checkpoint, Runner.from_cfg(cfg).test() does not.
_base_ = ["_base_/folder.py", "_base_/schedule_frozen.py", "_base_/runtime.py"]
model = dict(
    type="FittedSegmentor",
    segmenter="runs/scenes_masks/model.safetensors",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True),
)
