"""`--skip-train`: the metrics of a checkpoint on the whole validation split, into `results.json`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.outputs import alone
from megatron_ext.checkpoint.resume import has_checkpoint
from megatron_ext.reports.progress import Progress
from megatron_ext.reports.results import FILE, SETTINGS, VALIDATION, WHOLE, Results, read_results, write_results
from megatron_ext.training import signals
from megatron_ext.training.forward import load_model, mean_metrics
from megatron_ext.training.job import RunConfig, task_of
from megatron_ext.training.run_directory import create_run_directory


def validate(run: RunConfig) -> None:
    """`--skip-train`: the metrics of a checkpoint on the whole validation split, into `results.json`."""
    args = run.args
    args.full_validation = False  # that sampler has batches of its own
    signals.end_at_once(args)  # nothing is saved before the end
    results = _results(args)
    model, task, text = load_model(run), task_of(run), run.job.family.reads_text
    with Progress("validation") as shown:
        metrics, samples = mean_metrics(run, model, "valid", progress=shown.update)
    if args.rank == 0:
        what = f"{samples:,} sequences of {args.seq_length} tokens" if text else f"{samples:,} samples"
        for name, value in metrics.items():
            print(f"validation {name.replace('_', ' ')} {value:.6f} {task.units[name]} over {what}")
        if args.save:
            create_run_directory(run)
            size = {"sequences": samples, "tokens": samples * args.seq_length} if text else {"samples": samples}
            settings: dict[str, Any] = {"tokens": samples * args.seq_length} if text else {"samples": samples}
            settings |= {"source": WHOLE, "data": args.valid_data_path or args.data_path, "split": args.split}
            settings |= {"dtype": str(args.params_dtype).removeprefix("torch.")}
            if not text:
                settings["units"] = dict(task.units)
            found = {**metrics, **size, SETTINGS: settings}
            whole = {f"val_{name}": value for name, value in metrics.items()} | {VALIDATION: found}
            if results is None:  # of random weights
                save = Path(args.save)
                with alone(save / FILE):
                    write_results(save, read_results(save) | whole)
            else:
                results.add(**whole)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _results(args: Namespace) -> Results | None:
    """Where the loss goes, with the checkpoint that it is of; None if there is neither."""
    sources = [source for source in (args.load, args.pretrained_checkpoint) if source and has_checkpoint(Path(source))]
    if not args.save or not sources:
        return None
    step = "" if args.ckpt_step is None else f"iter_{args.ckpt_step:07d}"
    return Results(layout.find(Path(sources[0]) / step).path, Path(args.save), claimed=True)
