"""Forward passes over calibration data with Megatron's own schedules, on whatever layout the flags say."""

from typing import Any

import torch

from megatron_ext.pruning.importance import Importance
from megatron_ext.training.launch import Launch


def calibrate(launch: Launch, samples: int) -> tuple[dict[str, torch.Tensor] | None, float]:
    """Score the model of `--load` on the first `samples` sequences of the training split.

    Args:
        launch: The validated command line.
        samples: Sequences; a multiple of `--global-batch-size`.

    Returns:
        The scores on rank 0 (None elsewhere), and the model's mean loss on the samples (rank 0 of the last stage).
    """
    from megatron.core.enums import ModelType
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import unwrap_model
    from megatron.training import initialize_megatron
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import setup_model_and_optimizer

    from megatron_ext.models.builder import model_config
    from megatron_ext.training.step import forward_step

    args = launch.args
    initialize_megatron()
    config = model_config(args, launch.architecture)
    container = pretrain_cfg_container_from_args(args, config)
    from megatron.core.process_groups_config import ProcessGroupCollection

    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.eval()
    importance = Importance(unwrap_model(model), launch.architecture)
    run = get_forward_backward_func()
    iterators = [_samples(samples, stage) for stage in range(len(model))]
    total = torch.zeros(2, dtype=torch.float64)
    steps = samples // args.global_batch_size
    with torch.no_grad():
        for step in range(steps):
            losses: list[dict[str, Any]] = run(
                forward_step_func=forward_step,
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
            )
            for loss in losses:
                total += loss["lm loss"].double().cpu()
            if args.rank == 0:
                print(f"scored {(step + 1) * args.global_batch_size} of {samples} sequences", flush=True)
    torch.distributed.all_reduce(device_total := total.to(torch.cuda.current_device()))
    importance.remove()
    return importance.gather(), float(device_total[0] / device_total[1])


def _samples(count: int, stage: int) -> Any:
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader

    from megatron_ext.training.data import build_datasets

    train, _, _ = build_datasets((count, 0, 0), vp_stage=stage)
    loader = build_pretraining_data_loader(train, 0)
    return iter(loader) if loader is not None else None
