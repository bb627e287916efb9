"""`megatron-ext evaluate`: what a checkpoint is worth, measured on any layout, into `results.json`.

A measure (`measure`) is asked for its results piece by piece: a file, a task, a length at a time. Each piece is on disk
before the next one begins, so that whatever ends the program ends it with what was measured.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ext.checkpoint.ranks import gather, rank
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.measure import Evaluation, Measure, kinds
from megatron_ext.inference import session
from megatron_ext.inference.interrupt import Interrupted, interruptible
from megatron_ext.inference.tokenizer import identity, tokenizer_of, vocab_size_of
from megatron_ext.reports.results import Results

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel


def main(args: argparse.Namespace) -> None:
    """Validate everything, then measure what was asked for, one thing after the other."""
    asked = [kind for kind in kinds() if kind.asked(args)]
    if not asked:
        raise ConfigError("nothing to measure", legal="--text FILE, --tasks NAME, --synthetic NAME or --speed N")
    results = Results(args.checkpoint, args.save)
    tokenizer = tokenizer_of(args.checkpoint, args.tokenizer)
    started = session.prepare(args.checkpoint, args.dtype, args.megatron_flags)
    settings = {"dtype": str(started.args.params_dtype).removeprefix("torch."), "tokenizer": identity(tokenizer)}
    longest = started.architecture.max_position_embeddings
    evaluation = Evaluation(args, results, tokenizer, longest, settings)
    measures = [kind.build(evaluation) for kind in asked if kind.build is not None]
    with session.open_checkpoint(started, vocab_size_of(args.checkpoint, tokenizer)) as model:
        stopped = _measure(measures, model, results)
        if rank() == 0:
            for measure in measures:  # now that all of it is on disk
                measure.finish(results)
            how = f"{stopped}: not everything was measured; " if stopped else ""
            print(f"{how}wrote {results.directory / 'results.json'}", flush=True)
        gather(None)  # a rank that ends with a status ends the others
    if stopped:
        sys.exit(stopped.status)


def _measure(measures: Sequence[Measure], model: "ShardedModel", results: Results) -> Interrupted | None:
    """Measure one thing after the other; what ended it before its end."""
    try:
        with interruptible():
            for measure in measures:
                for part in measure(model):
                    if rank() == 0:
                        results.add(**{measure.name: part})
                        print(measure.say(part), flush=True)
    except Interrupted as stopped:
        return stopped
    return None
