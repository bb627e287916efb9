"""Each pixel's class: UPerNet on a MambaVision backbone.

upernet.py     the heads: pyramid pooling, feature pyramid, an auxiliary head
folders.py     images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, as ADE20K has them
variations.py  scaled, cropped, mirrored, recoloured images for training; whole ones for validation
confusion.py   mean intersection over union
task.py        losses, and what is measured
options.py     flags `--segment-*`; job.py is megatron-ext vision-segment
pictures.py    predictions beside annotations
"""
