"""Teacher correction: the teacher is fine-tuned on the data that it teaches with.

A teacher that has not seen the distillation data judges it badly: Minitron in practice (arXiv 2408.11796, section 2.1)
trains it on them, with a fifth of the peak learning rate and 120 steps of warm-up, before it teaches or while it does.
Its checkpoints are ordinary ones, in `--save`/teacher.
"""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron.training.global_vars import set_args

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.resume import own_resume_point
from megatron_ext.checkpoint.start import Start, tell_megatron
from megatron_ext.distillation.teachers import colocated
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.builder import with_architecture
from megatron_ext.platform.process_groups import new_meeting_place
from megatron_ext.training import loop
from megatron_ext.training.extra_models import ExtraModel
from megatron_ext.training.extra_optimizers import ShardedOptimizer
from megatron_ext.training.job import RunConfig
from megatron_ext.training.run_directory import create_run_directory

SHARE = 0.2  # of the student's learning rate
WARMUP = 120  # steps
FOLDER = "teacher"


def extra_model(run: RunConfig, teacher: Teacher) -> ExtraModel:
    """A teacher that is trained in the same job as its student; there is a checkpoint of it for each of the student's.

    Args:
        run: The student's command line.
        teacher: The teacher as it was given.
    """
    architecture = teacher.with_student_vocab(run.architecture)
    args = _own_args(run, architecture, run.args.train_iters)
    args.hidden_dropout = args.attention_dropout = 0.0  # it teaches
    build, load = partial(colocated.build, architecture), partial(colocated.read, teacher)
    return ExtraModel(FOLDER, build, load, ShardedOptimizer, args)


def correct(run: RunConfig, teacher: Teacher, steps: int) -> None:
    """Train the teacher alone, or go on with it; this process can do nothing else afterwards.

    Args:
        run: The student's command line.
        teacher: The teacher as it was given.
        steps: How long.
    """
    architecture = teacher.with_student_vocab(run.architecture)
    args = _own_args(run, architecture, steps)
    args.load = args.pretrained_checkpoint = args.ckpt_step = None
    args.finetune = args.no_load_optim = args.no_load_rng = False
    args.save = str(Path(run.args.save) / FOLDER)
    if (own := own_resume_point(Path(args.save))) is not None:
        args.load, start = args.save, Start("--load", Path(args.save), own)
    else:
        given = layout.find(teacher.step)
        args.pretrained_checkpoint = str(given.path.parent)
        start = Start("--pretrained-checkpoint", given.path.parent, given)
    tell_megatron(start, args)
    set_args(args)
    loop.train(replace(run, args=args, model=architecture, start=start))


def corrected_first(run: RunConfig, teacher: Teacher, steps: int) -> Teacher:
    """The corrected teacher; it is trained now, in a process of its own for each rank, unless that is done.

    Args:
        run: The student's command line; no process group may have been formed.
        teacher: The teacher as it was given.
        steps: How long it is to be trained.

    Raises:
        SystemExit: The correction failed, with its status; or it was asked to stop, and has saved, with 0.
    """
    folder = Path(run.args.save) / FOLDER
    if not _is_done(folder, steps):
        create_run_directory(run)
        minutes = run.args.distributed_timeout_minutes
        status = _run_again(minutes, "--distill-correct-teacher", "only", "--distill-teacher", str(teacher.step))
        if status or not _is_done(folder, steps):
            raise SystemExit(status)
    return Teacher.find(folder)


def _is_done(folder: Path, steps: int) -> bool:
    step = own_resume_point(folder)
    return step is not None and step.iteration >= steps


def _meeting_place(minutes: float) -> dict[str, str]:
    """The environment in which the new processes of all ranks meet: what they say must not meet what ours say."""
    port, rank = int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    if port == 0:  # one process
        return {}
    port = new_meeting_place("correction", os.environ["MASTER_ADDR"], port, rank, timedelta(minutes=minutes))
    return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def _run_again(minutes: float, *flags: str) -> int:
    """This rank's command once more, with other flags at its end, in a new process; its exit status."""
    environment = os.environ | _meeting_place(minutes)
    child = subprocess.Popen([sys.executable, *sys.argv, *flags], env=environment)
    # Ctrl-C on a terminal reaches the child by itself.
    handlers = {signal.SIGTERM: lambda number, _: child.send_signal(number), signal.SIGINT: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _own_args(run: RunConfig, architecture: Architecture, steps: int) -> Namespace:
    """Megatron's namespace for the teacher: its model, and its learning rate."""
    args = with_architecture(run.args, architecture)
    args.train_iters, args.lr_decay_iters = steps, None
    args.lr, args.min_lr = args.lr * SHARE, args.min_lr * SHARE
    args.lr_warmup_fraction, args.lr_warmup_samples = None, 0
    # Of a training that is shorter than the warm-up, half.
    args.lr_warmup_iters = min(WARMUP, steps // 2)
    return args
