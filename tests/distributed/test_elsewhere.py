"""A step of a teacher on another layout: each rank gets the tokens that it runs and the states that it needs."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.distillation.teachers.exchange import BridgeGroup, RankCoordinates, split_batch

LENGTH, PER_REPLICA = 6, 3
TOKENS = torch.arange(2 * PER_REPLICA * LENGTH).view(-1, LENGTH)
# Two replicas of two tensor ranks learn; two replicas of two stages teach.
STUDENTS = [RankCoordinates(replica, 0, shard, 0) for replica in range(2) for shard in range(2)]
TEACHERS = [RankCoordinates(replica, 0, 0, stage) for stage in range(2) for replica in range(2)]


@dataclass
class Echo:
    """A model whose states are its tokens; its stages tell each other nothing, so the last one reads its share."""

    place: RankCoordinates
    read: Tensor | None = None

    def share(self, samples: int) -> range:
        return split_batch(samples, 2)[self.place.replica]

    def run(self, tokens: Tensor, size: int) -> list[Tensor]:
        self.read = tokens
        run = self.share(len(TOKENS))
        assert tokens.shape == (len(run), LENGTH)
        return [TOKENS[i].float().unsqueeze(-1) for i in run] if self.place.stage else []


def stepped() -> tuple[Tensor | None, dict[int, Tensor], int]:
    """What this rank's part of the teacher read, the states that arrived, and how many numbers of tokens it has."""
    from megatron_ext.models.bootstrap import prepare

    prepare()
    from megatron_ext.distillation.teachers import remote

    rank = dist.get_rank()
    bridge, forward = BridgeGroup(None, rank, 4), Echo(TEACHERS[rank])
    places = bridge.places(STUDENTS[rank], TEACHERS[rank])
    received = []
    real = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: (received.append(args[1].numel()), real(*args, **kwargs))[1]
    replica = STUDENTS[rank].replica
    own = TOKENS[replica * PER_REPLICA :][:PER_REPLICA] if STUDENTS[rank].shard == 0 else None
    sizes = remote.Sizes(PER_REPLICA, LENGTH, 2)
    arrived = remote.step(bridge, places, forward, own, sizes, torch.empty(LENGTH, 1), 1)  # type: ignore[arg-type]
    return forward.read, arrived, sum(received)


def test_nobody_gets_the_whole_step() -> None:
    for rank, (read, arrived, gathered) in enumerate(run_ranks(stepped, 4)):
        assert gathered == 0
        run = split_batch(len(TOKENS), 2)[TEACHERS[rank].replica]
        assert read is not None
        if TEACHERS[rank].stage == 0:
            assert read.equal(TOKENS[run.start : run.stop])
        assert sorted(arrived) == [STUDENTS[rank].replica * PER_REPLICA + i for i in range(PER_REPLICA)]
        for i, states in arrived.items():
            assert states.squeeze(-1).equal(TOKENS[i].float())
