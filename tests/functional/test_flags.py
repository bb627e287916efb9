"""Flags that are said to change the result do, and those that are about speed, memory and messages do not.

Two steps with and without. Which flags those are was found by such steps with each of Megatron's; flags that do nothing
though they should are refused (`options/unsupported.py`), those of the model are `models/megatron_args.py`' matter.
"""

import json
from pathlib import Path

import fork_server
import numpy as np
import pytest
from workspace import MODEL, Workspace

# Records what two steps come to, and leaves no run directory behind.
PROGRAM = """
import json, sys
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.job import Job
from megatron_ext.program import main
found = []
def run():
    started = parse_command_line(Job("pretrain"))
    import megatron.training.training as training
    from megatron_ext.training.loop import train
    step = training.train_step
    def recorded(*args, **kwargs):
        result = step(*args, **kwargs)
        found.append([{name: float(value) for name, value in result[0].items()}, float(result[5])])
        found.append(sum(float(p.detach().double().abs().sum()) for chunk in args[2] for p in chunk.parameters()))
        return result
    training.train_step = recorded
    train(started)
status = main(run)
print("found", json.dumps(found))
sys.exit(status)
"""
CHANGE = (
    "--eod-mask-loss", "--seed 7", "--split 50,50,0", "--dataloader-type cyclic", "--init-method-std 0.1",
    "--hidden-dropout 0.3", "--weight-decay 0.9", "--adam-eps 0.1", "--optimizer sgd",
)  # fmt: skip

WITHOUT_EFFECT = {
    "the order of transfers, and kernels that a CPU does not have": """
        --no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs
        --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag --no-tp-comm-split-rs --no-overlap-p2p-communication
        --no-align-grad-reduce --no-align-param-gather --use-tp-pp-dp-mapping --ddp-num-buckets 2 --disable-jit-fuser
        --high-priority-a2a-comm-stream --no-masked-softmax-fusion --no-bias-gelu-fusion
        --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
        --use-fused-weighted-squared-relu --fused-residual-rmsnorm --cp-comm-type a2a --overlap-grad-reduce
    """,
    "memory": """
        --recompute-activations --no-clone-scatter-output-in-embedding --empty-unused-memory-level 1 --manual-gc
        --manual-gc-interval 1 --no-manual-gc-eval
    """,
    "messages": """
        --log-params-norm --log-throughput --timing-log-level 1 --timing-log-option max --log-timers-to-tensorboard
        --no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard
        --log-num-zeros-in-grad --no-barrier-with-level-1-timing --log-world-size-to-tensorboard --logging-level 30
    """,
    "checks": """
        --check-for-large-grads --check-for-spiky-loss --rerun-mode disabled --train-sync-interval 2
        --check-weight-hash-across-dp-replicas-interval 2
    """,
    "how data are read": """
        --no-mmap-bin-files --num-dataset-builder-threads 3 --mid-level-dataset-surplus 0.11
        --no-create-attention-mask-in-dataloader
    """,
    "how checkpoints are read and written": """
        --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load --ckpt-assume-constant-structure
        --dist-ckpt-strictness log_unexpected --dist-ckpt-workers 3 --verify-integrity --no-save-rng --no-load-rng
    """,
    "float32 already": "--attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --initial-loss-scale 4096",
}


@pytest.fixture(scope="module")
def two_steps(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory):
    program = tmp_path_factory.mktemp("flags") / "program.py"
    program.write_text(PROGRAM)
    common = [*MODEL, *workspace.data, "--lr", "1e-2", "--train-iters", "2", "--eval-iters", "0"]

    def run(*flags: str) -> list:
        done = fork_server.run([Path(program), *common, *flags], 1, workspace.path)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rpartition("found ")[2])

    return run


def test_flags_that_are_accepted_have_an_effect(two_steps, workspace: Workspace) -> None:
    # Every document in the corpus is longer than a row, so the token that is masked is a frequent one.
    tokens = np.fromfile(workspace.path / "data/text_document.bin", dtype=np.uint16)
    masked = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "511"]
    masked += ["--null-tokenizer-eod-id", str(np.bincount(tokens).argmax())]
    plain = two_steps(*masked)
    assert len(plain) == 4
    same = [flag for flag in CHANGE if two_steps(*masked, *flag.split()) == plain]
    assert same == []


def test_flags_about_speed_memory_and_messages_change_nothing(two_steps) -> None:
    everything = [word for flags in WITHOUT_EFFECT.values() for word in flags.split()]
    assert two_steps(*everything) == two_steps()
