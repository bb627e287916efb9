"""What segmentation and detection share.

backbone.py   the network that gives four features; its weights from a checkpoint or a published file
family.py     a backbone with heads as a model family: flags of both, and the module split over ranks
samples.py    the order of samples in training and in a validation that counts each image once
colours.py    images as tensors on the device
shapes.py     coloured shapes with class maps, boxes and outlines, for tests and examples
"""
