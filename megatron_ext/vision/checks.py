"""What can be wrong with images and flags of `megatron-ext vision`, found before any process group."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError, ConfigError, DataError
from megatron_ext.training.job import RunConfig
from megatron_ext.vision.beginning import check_weights
from megatron_ext.vision.checkpoint import Evaluation, read_evaluation
from megatron_ext.vision.images import Variations
from megatron_ext.vision.options import ImageOptions, MesaOptions
from megatron_ext.vision.task import sources


def check(run: RunConfig) -> dict[str, int]:
    """Find what is wrong with the images and the flags; what the flags leave open is as in the checkpoint.

    Returns:
        The number of images by split.

    Raises:
        ConfigError, DataError: Says what.
    """
    before = Evaluation() if run.start is None else read_evaluation(run.start.step.path)
    options = run.options["images"] = _settled(run.options["images"], before)
    run.args.images_crop, run.args.images_interpolation = options.crop, options.interpolation
    _check_images(run, options)
    _check_layers(run)
    begins = _begins_from(run)
    _check_average(run, begins is not None)
    Variations(options, run.model)  # type: ignore[arg-type]
    found = _check_classes(run, options, before)
    _begin(run, begins, before)
    return found


def _settled(options: ImageOptions, before: Evaluation) -> ImageOptions:
    crop = before.crop if options.crop is None else options.crop
    return replace(options, crop=crop, interpolation=options.interpolation or before.interpolation)


def _check_images(run: RunConfig, options: ImageOptions) -> None:
    args = run.args
    for name in ("flip", "erasing", "smoothing"):
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"--images-{name} is a share", got=getattr(options, name), legal="0 to less than 1")
    for name in ("crop", "smallest"):
        if not 0 < getattr(options, name) <= 1:
            raise ConfigError(f"--images-{name} is a share", got=getattr(options, name), legal="more than 0, at most 1")
    if min(options.mixup, options.cutmix) < 0:
        raise ConfigError("alphas are not negative", got=min(options.mixup, options.cutmix), legal="--images-mixup 0")
    if options.mixes and args.micro_batch_size % 2 and not args.skip_train:
        legal = "an even --micro-batch-size, or --images-mixup 0 --images-cutmix 0"
        raise ConfigError("images are mixed in pairs", got=f"--micro-batch-size {args.micro_batch_size}", legal=legal)
    if options.train is None and not args.skip_train:
        raise DataError("no images to train on", legal="--images-train DIR")
    if options.valid is None and (args.skip_train or args.eval_iters > 0):
        raise DataError("no images to measure on", legal="--images-valid DIR, or --eval-iters 0")


def _check_layers(run: RunConfig) -> None:
    """Learning rates by depth, and what is frozen."""
    decay, args = run.options["layer"].decay, run.args
    if not 0 < decay <= 1:
        raise ConfigError("--layer-decay is a share", got=decay, legal="more than 0, at most 1")
    if decay != 1 and args.lr_warmup_init:
        what = "all layers would begin with one learning rate"
        raise ConfigError(what, got=f"--layer-decay and --lr-warmup-init {args.lr_warmup_init}", legal="one of them")
    frozen, goes_on = run.options["freeze"].stages, run.start is not None and run.start.continues
    if not 0 <= frozen <= 4:
        raise ConfigError("--freeze-stages counts stages", got=frozen, legal="0 to 4")
    if frozen and run.start is None and run.options["pretrained"].weights is None and not args.skip_train:
        legal = "--pretrained-checkpoint DIR or --pretrained-weights FILE with it"
        raise ConfigError("what is frozen would stay as it is drawn", got=f"--freeze-stages {frozen}", legal=legal)
    if goes_on and run.start is not None and not (args.finetune or args.no_load_optim or args.skip_train):
        saved = layout.common(run.start.step.path)["args"]
        for name, default in (("layer_decay", 1.0), ("freeze_stages", 0)):
            before, now = getattr(saved, name, default), getattr(args, name)
            if before != now:
                flag = f"--{name.replace('_', '-')}"
                what = f"the optimizer's state is in groups of layers, which another {flag} changes"
                raise ConfigError(what, got=now, legal=f"{flag} {before}, or a new optimizer: --no-load-optim")


def _begins_from(run: RunConfig) -> Path | None:
    """The step or file whose weights a new run begins with; None if they are random, or Megatron loads them."""
    given, start, args = run.options["pretrained"], run.start, run.args
    own = args.save is not None and start is not None and Path(args.save).resolve() == start.directory.resolve()
    if start is not None and own and not args.skip_train:
        return None  # the same command goes on
    if given.weights is not None:
        if start is not None:
            what = "a run begins from one of the two"
            raise ConfigError(what, got=f"--pretrained-weights and {start.flag} {start.directory}", legal="one of them")
        if not Path(given.weights).is_file():
            raise CheckpointError("no such file of weights", got=given.weights, legal="--pretrained-weights FILE")
        if given.averaged:
            what = "a file of weights has no average of them"
            raise ConfigError(what, got="--pretrained-averaged", legal="--pretrained-checkpoint DIR with it")
        return Path(given.weights)
    new = start is not None and (start.flag == "--pretrained-checkpoint" or args.finetune) and not args.skip_train
    if given.averaged and not new:
        what = "no run begins here whose weights could be a checkpoint's average"
        legal = "--pretrained-checkpoint DIR with it; --skip-train --average-decay D measures the average"
        raise ConfigError(what, got="--pretrained-averaged", legal=legal)
    return start.step.path if new and start is not None else None


def _begin(run: RunConfig, begins: Path | None, before: Evaluation) -> None:
    """Check the weights that a run begins or goes on with, and say how the first are read: not by Megatron."""
    args, model = run.args, run.model
    args.ext_begins_from, args.ext_new_classifier = None, False
    path = begins or (run.start.step.path if run.start is not None else None)
    if path is None:
        return
    classes = check_weights(path, model, run.options["pretrained"].averaged)  # type: ignore[arg-type]
    if begins is None:
        if classes != model.classes:  # type: ignore[attr-defined]
            what = "the checkpoint's classifier knows another number of classes"
            legal = "--pretrained-checkpoint DIR, which begins a new run with a new classifier"
            raise CheckpointError(what, got=f"{classes} in {path}", legal=legal)
        return
    others = before.classes is not None and list(before.classes) != args.ext_classes
    args.ext_begins_from, args.ext_new_classifier = str(begins), classes != model.classes or others  # type: ignore[attr-defined]
    args.load = args.pretrained_checkpoint = args.ckpt_step = None
    if args.rank == 0:
        kept = f"its classifier of {classes} classes, too"
        new = f"the classifier is new: {model.classes} classes, where there were {classes}"  # type: ignore[attr-defined]
        print(f"begins with the weights of {begins}; {new if args.ext_new_classifier else kept}", flush=True)


def _check_average(run: RunConfig, begins: bool) -> None:
    """The moving average of the weights, and agreement with it."""
    decay, mesa = run.options["average"].decay, run.options["mesa"]
    if not 0 <= decay < 1:
        raise ConfigError("--average-decay is a share", got=decay, legal="0 to less than 1")
    if not 0 <= mesa.start <= 1:
        raise ConfigError("--mesa-start is a share", got=mesa.start, legal="0 to 1")
    if mesa.start != MesaOptions.start and not mesa.weight:
        what = "there is no agreement with the average that could begin"
        raise ConfigError(what, got=f"--mesa-start {mesa.start}", legal="--mesa-weight .5 with it")
    if mesa.weight and not decay:
        what = "there is no average of the weights to agree with"
        raise ConfigError(what, got=f"--mesa-weight {mesa.weight}", legal="--average-decay .9998 with it")
    if decay and run.args.overlap_param_gather:
        what = "the average takes in a step's weights before --overlap-param-gather brings them"
        raise ConfigError(what, got=f"--average-decay {decay}", legal="no --overlap-param-gather")
    if (
        decay
        and run.start is not None
        and not begins
        and "average.step" not in CheckpointReader(run.start.step.path).shapes
    ):
        what = "the checkpoint has no average of its weights, which is kept from a run's first step"
        raise ConfigError(what, got=f"--average-decay {decay}", legal="--average-decay 0")


def _check_classes(run: RunConfig, options: ImageOptions, before: Evaluation) -> dict[str, int]:
    """Find the images' classes, and note their names for checkpoints."""
    model: Any = run.model
    goes_on = run.start is not None and (run.start.continues or run.args.skip_train)
    train, valid = sources(options, before.classes if goes_on else None)
    found = next(source.classes for source in (train, valid) if source is not None)
    run.args.ext_classes = list(found)
    if len(found) > model.classes:
        what = "there are more classes than the classifier knows"
        raise ConfigError(what, got=len(found), legal=f"--mambavision-classes {len(found)}")
    return {name: len(s) for name, s in (("training", train), ("validation", valid)) if s is not None}
