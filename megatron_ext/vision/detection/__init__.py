"""Boxes, and masks in them: torchvision's R-CNN on a MambaVision backbone, with a cascade of box heads.

rcnn.py        backbone, feature pyramid, proposals, heads; cascade.py the cascade
coco.py        images and annotations in COCO's format
variations.py  scaled and cropped squares for training, whole images for validation
precision.py   COCO's average precision over all ranks' detections
task.py        losses, and what is measured
options.py     flags `--detect-*`; job.py is megatron-ext vision-detect
pictures.py    detections on images
"""
