"""A teacher on ranks of its own: the last of a torchrun teach, the others know nothing of them but what they hand over.

The student's ranks are a world of their own to Megatron; so are the teacher's. Both meet in one process group more.
"""

import argparse
import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class RankSplit:
    """This rank among all of student and teacher.

    Attributes:
        rank: Its number.
        size: How many there are.
        students: How many are the student's; they come first.
    """

    rank: int
    size: int
    students: int

    @property
    def is_teacher(self) -> bool:
        """Whether it is one of the teacher's."""
        return self.rank >= self.students

    def bridge(self, args: argparse.Namespace) -> Any:
        """All ranks as one `exchange.BridgeGroup`; every rank must call it once its own world has formed."""
        from megatron_ext.distillation.teachers.exchange import BridgeGroup
        from megatron_ext.platform.process_groups import form_group

        group = form_group("bridge", _store(args), self.rank, self.size, args.distributed_backend, _timeout(args))
        return BridgeGroup(group, self.rank, self.size)


def split_ranks(early: argparse.Namespace) -> RankSplit | None:
    """Part the ranks if `--distill-teacher-ranks` asks for it: the environment then says what the student's world is.

    The teacher's ranks see it so, too, and validate the command line as the student's last rank does.

    Args:
        early: The early flags, the job's options among them.

    Raises:
        ConfigError: No rank would be left for the student.
    """
    if early.distill_teacher_ranks is None or early.dry_run:
        return None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    apart = RankSplit(int(os.environ.get("RANK", "0")), size, size - early.distill_teacher_ranks)
    if not 0 < apart.students < size:
        raise ConfigError(
            "--distill-teacher-ranks must leave ranks for both", got=f"{early.distill_teacher_ranks} of {size}",
            legal=f"1 to {size - 1}" if size > 1 else "more ranks: torchrun --nproc-per-node N",
        )  # fmt: skip
    os.environ["WORLD_SIZE"] = str(apart.students)
    if apart.is_teacher:
        os.environ["RANK"] = str(apart.students - 1)
    return apart


def serve_teacher(run: Any, teacher: Any, apart: RankSplit) -> None:
    """What a rank of the teacher does until the student ends.

    Args:
        run: The student's validated command line.
        teacher: The teacher.
        apart: This rank.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_ext.distillation.options import pairs, teacher_sizes
    from megatron_ext.distillation.teachers.forward import TeacherForward, empty
    from megatron_ext.distillation.teachers.remote import serve
    from megatron_ext.platform.process_groups import prefix_store

    args, options = run.args, run.options["distill"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the student hears it, and says when it has ended
    rank, size = apart.rank - apart.students, apart.size - apart.students
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    torch.cuda.set_device(args.local_rank)
    world = prefix_store("teacher", _store(args))
    dist.init_process_group(args.distributed_backend, store=world, rank=rank, world_size=size, timeout=_timeout(args))
    grid = teacher_sizes(run, options)
    assert grid is not None
    mpu.initialize_model_parallel(grid.tp, grid.pp)
    model_parallel_cuda_manual_seed(args.seed)
    points = sorted({pair.teacher for pair in pairs(run, options, teacher)})
    forward = TeacherForward(teacher, grid, args, points, run.architecture)
    serve(apart.bridge(args), forward, args.seq_length, empty(args.params_dtype, 0, 0), args.context_parallel_size)
    dist.destroy_process_group()


def _store(args: argparse.Namespace) -> Any:
    from megatron_ext.platform.process_groups import rendezvous

    return rendezvous(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), _timeout(args))


def _timeout(args: argparse.Namespace) -> timedelta:
    return timedelta(minutes=args.distributed_timeout_minutes)
