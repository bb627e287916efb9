"""`--skip-train`: the loss of a checkpoint on the whole validation split, into `results.json`."""

from argparse import Namespace
from pathlib import Path

import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.outputs import alone
from megatron_ext.checkpoint.resume import has_checkpoint
from megatron_ext.evaluation.measured_run import VALIDATION, WHOLE
from megatron_ext.evaluation.results import FILE, SETTINGS, Results, read_results, write_results
from megatron_ext.reports.progress import progress
from megatron_ext.training import signals
from megatron_ext.training.forward import load_model, mean_loss
from megatron_ext.training.job import RunConfig
from megatron_ext.training.run_directory import claim


def validate(run: RunConfig) -> None:
    """`--skip-train`: the loss of a checkpoint on the whole validation split, into `results.json`."""
    args = run.args
    args.full_validation = False  # that sampler has batches of its own
    signals.end_at_once(args)  # nothing is saved before the end
    results = _results(args)
    model = load_model(run)
    with progress("validation", 100) as advance:
        shown = 0

        def percent(done: int, total: int) -> None:
            nonlocal shown
            advance(100 * done // total - shown)
            shown = 100 * done // total

        loss, sequences = mean_loss(run, model, "valid", progress=percent)
    if args.rank == 0:
        tokens = sequences * args.seq_length
        print(f"validation loss {loss:.6f} nats per token over {sequences:,} sequences of {args.seq_length} tokens")
        if args.save:
            claim(run)
            settings = {"tokens": tokens, "source": WHOLE, "data": args.valid_data_path or args.data_path}
            settings |= {"split": args.split, "dtype": str(args.params_dtype).removeprefix("torch.")}
            found = {"loss": loss, "sequences": sequences, "tokens": tokens, SETTINGS: settings}
            if results is None:  # of random weights
                save = Path(args.save)
                with alone(save / FILE):
                    write_results(save, read_results(save) | {"val_loss": loss, VALIDATION: found})
            else:
                results.add(**{"val_loss": loss, VALIDATION: found})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _results(args: Namespace) -> Results | None:
    """Where the loss goes, with the checkpoint that it is of; None if there is neither."""
    sources = [source for source in (args.load, args.pretrained_checkpoint) if source and has_checkpoint(Path(source))]
    if not args.save or not sources:
        return None
    step = "" if args.ckpt_step is None else f"iter_{args.ckpt_step:07d}"
    return Results(layout.find(Path(sources[0]) / step).path, Path(args.save), claimed=True)
