"""Procedural scenes whose labels are relations of two things that lie far apart, drawn in batches on any device.

A scene has two red objects in opposite halves of the image, of which one is marked with blue, and up to four green dots
anywhere. Four questions are asked of each: do the two have the same shape, is the left one larger, is the marked one
left of the other, how many dots are there. What either object is by itself says nothing about the first three.
"""

import torch
from torch import Tensor

QUESTIONS = {"same": 2, "larger": 2, "left": 2, "count": 5, "shapes": 4}
ANSWERS = sum(QUESTIONS.values())
NOISE = 0.3


def draw(batch: int, side: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Scenes and the answers to their questions.

    Args:
        batch: How many.
        side: Of the images, pixels; the objects' middles lie more than half of it apart.
        generator: Whose device they are drawn on.

    Returns:
        Images (batch, 3, side, side) of -1 and 1 with noise, and (batch,) numbers of the answers by question.
    """
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def coins(*shape: int) -> Tensor:
        return (uniform(*shape) < 0.5).long()

    angle, radius = (uniform(batch) - 0.5) * 2, side * (0.27 + 0.06 * uniform(batch))  # at most 57 degrees
    offset = torch.stack([angle.cos(), angle.sin()], -1) * radius[:, None]
    middle = side / 2 + side * 0.08 * (2 * uniform(batch, 2) - 1)
    places = torch.stack([middle - offset, middle + offset], 1)  # (batch, left and right, x and y)
    shape, larger, left = coins(batch, 2), coins(batch), coins(batch)
    # The larger one's radius is an eighth of the side to a sixth; the other's is at most seven eighths of it.
    large, ratio = side * (0.125 + 0.04 * uniform(batch)), 0.72 + 0.16 * uniform(batch)
    sizes = torch.stack([torch.where(larger == 1, 1, ratio), torch.where(larger == 1, ratio, 1)], 1) * large[:, None]

    grid = torch.arange(side, device=device) + 0.5
    dx = grid[None, None, None, :] - places[:, :, 0, None, None]
    dy = grid[None, None, :, None] - places[:, :, 1, None, None]
    r, far, near = sizes[:, :, None, None], torch.maximum(dx.abs(), dy.abs()), torch.minimum(dx.abs(), dy.abs())
    square, cross = far < 0.85 * r, (far < 1.1 * r) & (near < 0.4 * r)
    objects = torch.where(shape[:, :, None, None] == 1, square, cross)
    marked = objects & (torch.stack([left, 1 - left], 1)[:, :, None, None] == 1)

    count = torch.randint(QUESTIONS["count"], (batch,), generator=generator, device=device)
    dots = torch.zeros(batch, side, side, dtype=torch.bool, device=device)
    for number in range(QUESTIONS["count"] - 1):
        x, y = (side * (0.06 + 0.88 * uniform(batch)) for _ in range(2))
        inside = (grid[None, None, :] - x[:, None, None]).abs().maximum((grid[None, :, None] - y[:, None, None]).abs())
        dots |= (inside < side / 32) & (count > number)[:, None, None]
    images = torch.stack([objects.any(1), dots, marked.any(1)], 1).float() * 2 - 1
    noise = torch.randn(images.shape, generator=generator, device=device)
    return images + NOISE * noise, {
        "same": (shape[:, 0] == shape[:, 1]).long(),
        "larger": larger,
        "left": left,
        "count": count,
        "shapes": 2 * shape[:, 0] + shape[:, 1],
    }
