"""Two processes over gloo, on the CPU platform."""

import json

import fork_server
import pytest
from workspace import HAS_GPU

PROGRAM = """
import json
from types import SimpleNamespace
from megatron_ext.models.bootstrap import prepare
prepare()
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
seen = {"rank": rank}
own = torch.tensor([1.0, 10.0]) * (rank + 1)  # rank 0: 1 10, rank 1: 2 20

average = own.clone()
dist.all_reduce(average, op=dist.ReduceOp.AVG)
seen["average"] = average.tolist()
total = own.clone()
dist.all_reduce(total)
seen["sum"] = total.tolist()
largest = own.clone()
dist.all_reduce(largest, op=dist.ReduceOp.MAX)
seen["max"] = largest.tolist()
later = own.clone()
work = dist.all_reduce(later, op=dist.ReduceOp.AVG, async_op=True)
work.wait()
work.wait()  # waiting twice must not divide twice
seen["later"] = later.tolist()
shard = torch.empty(1)
dist.reduce_scatter_tensor(shard, own.clone(), op=dist.ReduceOp.AVG)
seen["shard"] = shard.tolist()
gathered = torch.empty(2)
dist.all_gather_into_tensor(gathered, torch.tensor(float(rank)))
seen["gathered"] = gathered.tolist()

# Attention under context parallelism: rank r holds the r-th and the (3-r)-th quarter of the sequence.
from megatron_ext.platform.transformer_engine import TorchDotProductAttention

torch.manual_seed(0)
q, k, v = (torch.randn(8, 2, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
make = lambda size: TorchDotProductAttention(
    SimpleNamespace(attention_dropout=0.0, num_attention_heads=4, tensor_model_parallel_size=1,
                    context_parallel_size=size),
    1, SimpleNamespace(name="causal"), "self", pg_collection=SimpleNamespace(cp=dist.group.WORLD),
)
mine = torch.tensor([0, 1, 6, 7] if rank == 0 else [2, 3, 4, 5])
whole = make(1)(q, k, v, None)
grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
parts = [t.detach()[mine].requires_grad_() for t in (q, k, v)]
part = make(2)(*parts, None)
part_grads = torch.autograd.grad(part.square().sum(), parts)
seen["attention"] = (part - whole[mine]).abs().max().item()
seen["gradients"] = max((a - b[mine]).abs().max().item() for a, b in zip(part_grads, grads))
print(json.dumps(seen) + "\\n", end="")  # one write, which another rank cannot interrupt
"""


@pytest.mark.skipif(HAS_GPU, reason="the replaced collectives are those of a CPU")
def test_collectives_that_gloo_lacks():
    done = fork_server.run_code(PROGRAM, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = sorted(
        (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), key=lambda seen: seen["rank"]
    )
    assert len(found) == 2
    for rank, seen in enumerate(found):
        assert seen["average"] == [1.5, 15.0]
        assert seen["sum"] == [3.0, 30.0]
        assert seen["max"] == [2.0, 20.0]
        assert seen["later"] == [1.5, 15.0]
        assert seen["shard"] == [[1.5], [15.0]][rank]
        assert seen["gathered"] == [0.0, 1.0]
        assert seen["attention"] < 1e-12
        assert seen["gradients"] < 1e-12
