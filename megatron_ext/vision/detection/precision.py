"""COCO's average precision, by faster-coco-eval, over the detections of all ranks."""

from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.vision.detection.coco import CocoImages

KINDS: dict[str, Any] = {"box": "bbox", "mask": "segm"}
# Places in faster-coco-eval's list: over all overlaps, at .5 and .75, of small, middle and large objects.
PLACES = {"ap": 0, "ap_50": 1, "ap_75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}


def check_installed() -> None:
    """Find whether there is what measures.

    Raises:
        ConfigError: There is not.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        legal = "pip install megatron-ext[vision]"
        raise ConfigError("average precision is measured by faster-coco-eval", got=error, legal=legal) from None


class Detections:
    """What was found on each image, in COCO's format.

    Args:
        source: The images.
    """

    def __init__(self, source: CocoImages) -> None:
        self._source = source
        self._found: dict[int, list[dict[str, Any]]] = {}

    def add(self, image: int, found: dict[str, Tensor]) -> None:
        """Take in the detections on an image of the source, as `rcnn.detect` gives them."""
        from faster_coco_eval.core import mask

        boxes = found["boxes"].cpu().double()
        sizes = boxes[:, 2:] - boxes[:, :2]
        own: list[dict[str, Any]] = []
        for index, (corner, size) in enumerate(zip(boxes[:, :2].tolist(), sizes.tolist(), strict=True)):
            own.append(
                {
                    "image_id": self._source.images[image]["id"], "bbox": [*corner, *size],
                    "category_id": self._source.categories[int(found["labels"][index]) - 1],
                    "score": float(found["scores"][index]),
                }
            )  # fmt: skip
            if "masks" in found:
                pixels = np.asfortranarray(found["masks"][index].cpu().numpy().astype(np.uint8))
                own[-1]["segmentation"] = mask.encode(pixels)
        self._found[image] = own

    def scores(self, kinds: tuple[str, ...], group: Any = None) -> dict[str, float]:
        """Average precision of `box`, `mask` or both, over the images that were measured on any rank; begins again.

        A collective of the group, whose first rank computes.
        """
        own, self._found = self._found, {}
        everywhere = [own]
        if group is not None and dist.get_world_size(group) > 1:
            everywhere = [{} for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(everywhere, own, group=group)
        result: list[Any] = [None]
        if group is None or dist.get_rank(group) == 0:
            found = {image: each for part in everywhere for image, each in part.items()}
            result = [average_precision(self._source, found, kinds)]
        if group is not None and dist.get_world_size(group) > 1:
            dist.broadcast_object_list(result, dist.get_global_rank(group, 0), group=group)
        return result[0]


def _unsaid(*words: Any) -> None:
    """Its table, whose numbers are metrics."""


def average_precision(
    source: CocoImages, found: dict[int, list[dict[str, Any]]], kinds: tuple[str, ...]
) -> dict[str, float]:
    """Of the images that were looked at: `box_ap`, the mean over overlaps of .50 to .95, and others; NaN of nothing."""
    from faster_coco_eval.core import COCO, COCOeval_faster

    images = [source.images[index] for index in sorted(found)]
    annotations = []
    for image in images:
        for own in source.objects[image["id"]]:
            area = own.get("area", own["bbox"][2] * own["bbox"][3])
            annotations.append({**own, "id": len(annotations) + 1, "area": area, "iscrowd": own.get("iscrowd", 0)})
    results = [dict(each) for index in sorted(found) for each in found[index]]
    names = [f"{kind}_{name}" for kind in kinds for name in PLACES]
    if not annotations:
        return dict.fromkeys(names, float("nan"))
    if not results:
        return dict.fromkeys(names, 0.0)
    said = {"images": images, "annotations": annotations}
    said["categories"] = [{"id": number, "name": source.names[number]} for number in source.categories]
    truth = COCO(said)
    measured = {}
    for kind in kinds:
        evaluation = COCOeval_faster(
            truth, truth.loadRes([dict(each) for each in results]), KINDS[kind], print_function=_unsaid
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, place in PLACES.items():
            value = float(evaluation.stats[place])
            measured[f"{kind}_{name}"] = float("nan") if value < 0 else value  # -1: no such objects
    return measured
