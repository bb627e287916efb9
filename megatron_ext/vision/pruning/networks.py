"""Image networks to the pruning job (`pruning.pruned_family`)."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.pruning.checks import source_step
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, Scan
from megatron_ext.pruning.leave_out import ShapleySampling
from megatron_ext.pruning.pruned_family import Loss, Measured, PrunedFamily, Round
from megatron_ext.pruning.scores import Scores
from megatron_ext.reports.progress import Progress
from megatron_ext.training.job import RunConfig
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.checkpoint import read_evaluation
from megatron_ext.vision.options import AverageOptions, ImageOptions
from megatron_ext.vision.pruning import report
from megatron_ext.vision.pruning.magnitude import magnitudes
from megatron_ext.vision.pruning.options import CalibrationImages
from megatron_ext.vision.pruning.plan import ImagePlan
from megatron_ext.vision.pruning.scores import ImageScores
from megatron_ext.vision.pruning.targets import make_plan
from megatron_ext.vision.task import classification


def calibration(run: RunConfig) -> Any:
    """The task: the images of `--images-train` as the checkpoint's validation looked at them, and with its classes."""
    images: CalibrationImages = run.options["images"]
    looks = read_evaluation(source_step(run.args).path)
    plain = ImageOptions(valid=images.train, crop=looks.crop, interpolation=looks.interpolation)  # type: ignore[arg-type]
    args = Namespace(**vars(run.args) | {"ext_classes": looks.classes})
    return classification(replace(run, args=args, options={"images": plain, "average": AverageOptions()}))


class ImageNetworks(PrunedFamily):
    """MambaVision; a model is a `MambaVision`."""

    plan, scores = ImagePlan, ImageScores
    split, per = "valid", "image"

    def make_plan(self, run: RunConfig, round: Round, scores: Scores, path: str) -> ImagePlan:
        """See `targets.make_plan`."""
        return make_plan(scores, round.model, round.targets, path)

    def calibrate(self, run: RunConfig, chunks: list[Any], round: Round, request: Any) -> Measured:
        """One pass over the images, and one for whatever is left out."""
        from megatron.core.utils import unwrap_model

        from megatron_ext.pruning.leave_out import measure
        from megatron_ext.training.forward import forward_all, micro_batches
        from megatron_ext.vision.pruning.activations import ImageActivations
        from megatron_ext.vision.pruning.depth import BlockChanges, Blocks, ImageAblation

        options, args, model = run.options["prune"], run.args, round.model
        networks: list[Any] = unwrap_model(chunks)
        batches = micro_batches(run, chunks, "valid", options.samples)
        steps = options.samples // args.global_batch_size

        def loss() -> float:
            return forward_all(run, chunks, [iter(own) for own in batches], steps)["loss"]

        hooks: list[Any] = [BlockChanges(networks)]
        if options.width_metric == "activation":
            hooks.append(ImageActivations(networks, model, options.width))
        whole = loss()
        for hook in hooks:
            hook.remove()
        parts = [hook.gather() for hook in hooks]
        asked = DEPTH_METRICS[options.depth_metric]
        if options.blocks is not None and not isinstance(asked, Change):
            ablation = ImageAblation(networks, model, loss)
            blocks = Blocks(model.pattern.replace("/", ""))
            try:
                with Progress("evaluation") as shown:
                    parts.append(
                        measure(
                            ablation, blocks, options.depth_metric, blocks=False,
                            run=len(blocks.pattern) - options.blocks, sampling=ShapleySampling(seed=args.seed),
                            progress=lambda line: shown.update(shown.done + 1, note=line),
                        )
                    )  # fmt: skip
            finally:
                ablation.remove()
        values = {name: value for part in parts for name, value in (part or {}).items()}
        return Measured(None if args.rank else values, whole)

    def magnitudes(self, reader: CheckpointReader, model: MambaVision) -> dict[str, Tensor]:
        """See `magnitude`."""
        return magnitudes(reader, model)

    def settings(self, run: RunConfig, round: Round) -> dict[str, Any]:
        """What calibration sees, and how depth is measured."""
        args, options = run.args, run.options["prune"]
        settings: dict[str, Any] = {
            "samples": options.samples, "seed": args.seed, "data": self.data(run), "type": str(args.params_dtype),
        }  # fmt: skip
        if options.blocks is not None:
            settings["depth_metric"] = options.depth_metric
            if isinstance(DEPTH_METRICS[options.depth_metric], Scan):
                settings["blocks"] = options.blocks
        return settings

    def data(self, run: RunConfig) -> list[str]:
        """The folder of the images."""
        train = run.options["images"].train
        return [] if train is None else [train]

    def check_layout(self, run: RunConfig, model: MambaVision) -> None:
        """What tensor parallelism does not divide."""
        model.check_layout(run.args.tensor_model_parallel_size)

    def page(
        self, run: RunConfig, plan: ImagePlan, scores: Sequence[Scores], losses: Sequence[Loss], remark: str = ""
    ) -> str:  # fmt: skip
        """With operations of an image."""
        return report.markdown(plan, losses, remark)

    def plot(self, scores: Scores, plan: ImagePlan, path: Path) -> None:
        """One panel for each axis of a block."""
        report.plot_scores(scores, plan, path)


IMAGE_NETWORKS = ImageNetworks()
