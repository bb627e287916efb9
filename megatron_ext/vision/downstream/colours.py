"""Images as tensors on the device: bytes until then, because they travel."""

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours


def normalised(image: Tensor) -> Tensor:
    """Bytes (b, c, h, w) of one or three channels as float32, each channel by ImageNet's mean and deviation."""
    colour = image.shape[1] == 3
    mean = torch.tensor(MEAN if colour else (0.5,), device=image.device)[:, None, None]
    std = torch.tensor(STD if colour else (0.5,), device=image.device)[:, None, None]
    return (image.float() / 255 - mean) / std
