"""Programs that start at once: they are forks of one process that has imported torch, Megatron and the rest already.

`run([script, *flags], ranks=2)` is `torchrun --nproc-per-node 2 script *flags` in all that program and test can see:
environment, working directory, output, exit status, and that the rank that fails ends the others. Five things differ,
and for their sake some tests start each program for real: the order of imports, the seed of string hashes (one order of
sets for all ranks here), pictures, which are blank unless `DRAWS` is in the environment, the interpreter's last
moments, and torchrun itself.
"""

import argparse
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
# What the programs import, once; nothing that starts a thread, a process group or a random number.
IMPORTED = (
    "PIL.Image", "matplotlib.pyplot", "matplotlib.backends.backend_agg",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.blended_megatron_dataset_builder", "megatron.core.models.hybrid.hybrid_model",
    "megatron.core.models.mimo", "megatron.core.tokenizers.text.text_tokenizer", "megatron.training.training",
    "megatron.training.checkpointing", "megatron_ext.cli", "megatron_ext.distillation.job",
    "megatron_ext.distillation.setup", "megatron_ext.evaluation.generation", "megatron_ext.training.forward",
    "megatron_ext.models.builder", "megatron_ext.pretraining.job", "megatron_ext.pruning.job",
    "megatron_ext.training.loop", "megatron_ext.training.step", "megatron_ext.vision.images", "pytest", "timm",
    "torch.utils.tensorboard", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.mistral.modeling_mistral",
    "transformers.models.nemotron_h.modeling_nemotron_h", "yaml",
)  # fmt: skip

DRAWS = "DRAWS"
"""In a program's environment: its pictures are drawn."""


def run(
    command: Sequence[str | Path], ranks: int = 1, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python script on so many ranks and wait for it.

    Args:
        command: The script's path and its arguments.
        ranks: One is a plain start, as with `python`; more get what torchrun puts into the environment.
        cwd: Its working directory.
        environment: Variables beside those of the server.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        outputs = [str(Path(directory) / name) for name in ("stdout", "stderr")]
        request = {"command": [str(word) for word in command], "outputs": outputs, "cwd": str(cwd or Path.cwd())}
        request |= {"environments": environments(ranks, environment or {})}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        texts = [Path(output).read_text() for output in outputs]
    return subprocess.CompletedProcess(request["command"], status, *texts)


def run_code(code: str, *arguments: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The same with a script's text, as `python -c` has it."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "program.py"
        script.write_text(code)
        return run([script, *arguments], ranks)


def environments(ranks: int, given: Mapping[str, str]) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each rank, and what was given."""
    if ranks == 1:
        return [dict(given)]
    port = str(_free_port())
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **size, **given} for rank in range(ranks)]


def _free_port() -> int:
    """Below those that outgoing connections take, as another test's would before this one's program listens."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def servers_environment() -> dict[str, str]:
    """One process on a CPU, with one thread."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return environment | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MEGATRON_EXT_DEVICE": "cpu"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    """This process's server, which ends with it."""
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=servers_environment()
    )
    atexit.register(server.communicate)  # closes its input
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return server


def _serve() -> None:
    """Answer each request, a line of JSON, with its exit status; forks run their program and end in here."""
    sys.path[0] = str(ROOT)
    get_ready()
    for line in sys.stdin:
        request = json.loads(line)
        pids = set()
        for environment in request["environments"]:
            pid = os.fork()
            if pid == 0:
                become(request, environment, ROOT, SUPPORT)
            pids.add(pid)
        print(_wait(pids), flush=True)


def get_ready() -> None:
    """Import what the programs import, and say so."""
    from megatron_ext.models.bootstrap import prepare

    prepare()
    for name in IMPORTED:
        importlib.import_module(name)
    _make_flags_once()
    _draw_less()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the threads that an import has started"
    gc.collect()
    gc.freeze()  # the collector of a fork need not look at, and so copy, what was imported
    print("ready", flush=True)


def _make_flags_once() -> None:
    """Read once what Megatron makes flags of, the source of its configurations: it takes a tenth of a short program."""
    from megatron.training import argument_utils, arguments

    factory = argument_utils.ArgumentGroupFactory
    read = factory._get_field_docstrings
    told = functools.cache(lambda configuration: read(SimpleNamespace(_get_field_docstrings=told), configuration))
    factory._get_field_docstrings = lambda self, configuration: told(configuration)
    arguments.add_megatron_arguments(argparse.ArgumentParser())


def _draw_less() -> None:
    """Put a blank picture where matplotlib would draw one, which takes a tenth of a short program."""
    from matplotlib.figure import Figure
    from PIL import Image

    draw = Figure.savefig

    def save(figure: Figure, file: Path, **options: Any) -> None:
        if DRAWS in os.environ:
            draw(figure, file, **options)
        else:
            Image.new("RGB", (1, 1)).save(file, "PNG")

    Figure.savefig = save


def become(request: dict[str, Any], environment: dict[str, str], *folders: Path) -> None:
    """Let this fork look like a fresh process of the request's command, and run it.

    Args:
        request: `command`, `cwd` and the two files of `outputs`.
        environment: Variables beside those of the server.
        *folders: Where it finds modules, beside the script's own folder.
    """
    for descriptor, name in enumerate((os.devnull, *request["outputs"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = os.fdopen(0)
    torch.default_generator.seed()  # anew, from the system, as at a start; Python's own generator sees to itself
    numpy.random.seed()
    os.chdir(request["cwd"])
    os.environ.update(environment)
    script = request["command"][0]
    sys.argv = request["command"]
    paths = environment["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in environment else []
    sys.path[:1] = [str(Path(script).parent), *paths, *map(str, folders)]
    _run_and_exit(script)


def _run_and_exit(script: str) -> None:
    """Run it and end as an interpreter does, without clearing away what was imported.

    To clear it is to touch, and so to copy, all of the server's memory: a quarter of a short program.
    """
    status: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status & 0xFF)


def _wait(pids: set[int]) -> int:
    """The status of the first that fails, which ends the others; 0 if none does."""
    failed = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in pids:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    _serve()
