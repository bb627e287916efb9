"""Files that run code if they are believed, shown to every command that reads such files.

Each pickle is first loaded by Python itself, which has to run what it asks for: a payload that harms nobody proves
nothing. What runs makes a directory.
"""

import contextlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo

from benchmarks.reliability.jobs import CONSOLE
from benchmarks.reliability.pickles import calls, calls_in_2, word
from benchmarks.reliability.tiny import DATA, DISTILL, MODEL, PRETRAIN, PRUNE, SIZES, TRAIN, Tiny

EVIL, RESULT, HIT = "evil", "evil-result", "hit"
Command = list[str | Path]
RUNS = [*DATA, *TRAIN, "--train-iters", "4"]
MEGATRON: dict[str, Command] = {
    "verify": [CONSOLE, "verify", EVIL],
    "convert": [CONSOLE, "convert", "--from", "megatron", "--to", "hf", EVIL, RESULT],
    "estimate": [CONSOLE, "estimate", "--preset", EVIL, *DATA, *SIZES],
    "compare": [CONSOLE, "compare", EVIL, "--out", RESULT],
    "pretrain --load": [PRETRAIN, *RUNS, "--load", EVIL, "--save", EVIL],
    "pretrain --ckpt-step": [PRETRAIN, *RUNS, "--load", EVIL, "--ckpt-step", "3", "--save", RESULT],
    "pretrain --pretrained-checkpoint": [PRETRAIN, *RUNS, "--pretrained-checkpoint", EVIL, "--save", RESULT],
    "prune": [PRUNE, *DATA, *SIZES, "--load", EVIL, "--save", RESULT, "--prune-hidden-size", "16"],
    "distill": [DISTILL, *MODEL, *RUNS, "--distill-teacher", EVIL, "--save", RESULT],
}
HUGGING_FACE: dict[str, Command] = {
    "convert": [CONSOLE, "convert", "--from", "hf", "--to", "megatron", EVIL, RESULT],
    "convert --verify": [CONSOLE, "convert", "--from", "hf", "--to", "megatron", EVIL, RESULT, "--verify"],
}
TOKENIZER: dict[str, Command] = {
    "pretrain": [PRETRAIN, *MODEL, *RUNS, "--tokenizer-model", EVIL, "--save", RESULT],
    "data": [CONSOLE, "data", "--out", RESULT, "--tokenizer", EVIL, "--input", "texts"],
}
DATASET: dict[str, Command] = {
    "pretrain": [PRETRAIN, *MODEL, *RUNS, "--data-path", f"{EVIL}/text_document", "--save", RESULT],
    "verify": [CONSOLE, "verify", EVIL],
}
RUN_DIRECTORY: dict[str, Command] = {
    "pretrain --load": [PRETRAIN, *RUNS, "--load", EVIL, "--save", EVIL],
    "report": [CONSOLE, "report", EVIL],
    "compare": [CONSOLE, "compare", EVIL, "--out", RESULT],
}


def _code(hit: str) -> str:
    return f"__import__('os').mkdir({hit!r})"


def _through_builtins(hit: str) -> bytes:
    """`eval`, out of the namespace of a function that tensors are rebuilt with."""
    namespace = word("torch._utils") + word("_rebuild_tensor_v2.__globals__.get") + b"\x93"
    builtins = namespace + word("__builtins__") + b"\x85R"
    get = word("builtins") + word("dict.get") + b"\x93"
    return b"\x80\x04" + get + builtins + word("eval") + b"\x86R" + word(_code(hit)) + b"\x85R."


PICKLES: dict[str, Callable[[str], bytes]] = {
    "posix.mkdir": lambda hit: calls_in_2("posix", "mkdir", hit),
    "posix.mkdir, protocol 4": lambda hit: calls("posix", "mkdir", hit),
    "os.system": lambda hit: calls_in_2("os", "system", f"mkdir {hit}"),
    "subprocess.getoutput": lambda hit: calls_in_2("subprocess", "getoutput", f"mkdir {hit}"),
    "builtins.eval": lambda hit: calls_in_2("builtins", "eval", _code(hit)),
    "builtins.exec": lambda hit: calls_in_2("builtins", "exec", _code(hit)),
    "cProfile.run": lambda hit: calls_in_2("cProfile", "run", _code(hit)),
    "timeit.timeit": lambda hit: calls_in_2("timeit", "timeit", f"import os; os.makedirs({hit!r}, exist_ok=True)"),
    "os of pathlib": lambda hit: calls("pathlib", "os.mkdir", hit),
    "os of shutil": lambda hit: calls("shutil", "os.mkdir", hit),
    "os of torch's checkpoints": lambda hit: calls("torch.distributed.checkpoint.filesystem", "os.mkdir", hit),
    "os of torch.serialization": lambda hit: calls("torch", "serialization.os.mkdir", hit),
    "os of tempfile": lambda hit: calls("tempfile", "_os.mkdir", hit),
    "eval of a function's namespace": _through_builtins,
    "an instance": lambda hit: b"(S'" + hit.encode() + b"'\niposix\nmkdir\n.",
    "an object": lambda hit: b"(cposix\nmkdir\nS'" + hit.encode() + b"'\no.",
}  # fmt: skip
FEW = ("posix.mkdir", "os.system", "builtins.eval", "eval of a function's namespace")
Place = Callable[[Tiny, bytes], None]


def _archive(content: bytes) -> bytes:
    """A file as of `torch.save`, with this pickle in it."""
    before, after = io.BytesIO(), io.BytesIO()
    torch.save({"iteration": 1}, before)
    with zipfile.ZipFile(before) as source, zipfile.ZipFile(after, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return after.getvalue()


def _step(tiny: Tiny) -> Path:
    return tiny.copy("teacher", EVIL) / "iter_0000003"


def _index(tiny: Tiny, content: bytes) -> None:
    (_step(tiny) / ".metadata").write_bytes(content)


def _common(tiny: Tiny, content: bytes) -> None:
    (_step(tiny) / "common.pt").write_bytes(_archive(content))


def _common_before_archives(tiny: Tiny, content: bytes) -> None:
    (_step(tiny) / "common.pt").write_bytes(content)


def _entry(key: str) -> Place:
    """In the place of what an index calls so; without checksums, as whoever means harm would."""

    def put(tiny: Tiny, content: bytes) -> None:
        step, data = _step(tiny), _archive(content)
        (step / "evil.distcp").write_bytes(data)
        index = pickle.loads((step / ".metadata").read_bytes())
        for each in index.storage_data:
            if each.fqn.startswith(key):
                index.storage_data[each] = _StorageInfo("evil.distcp", 0, len(data))
        (step / ".metadata").write_bytes(pickle.dumps(index))
        (step / "checksums.json").unlink()

    return put


def _weights(write: Callable[[bytes], bytes]) -> Place:
    def put(tiny: Tiny, content: bytes) -> None:
        folder = tiny.copy("llama-hf", EVIL)
        for name in ("model.safetensors", "checksums.json"):
            (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(write(content))

    return put


def _index_cache(write: Callable[[bytes], bytes]) -> Place:
    """What Megatron keeps beside a data set and takes from there, once a run has written it."""

    def put(tiny: Tiny, content: bytes) -> None:
        tiny.copy("data", EVIL)
        tiny.server.check(DATASET["pretrain"], tiny.path)
        shutil.rmtree(tiny.path / RESULT)
        caches = list((tiny.path / EVIL).rglob("*.npy"))
        assert caches
        for cache in caches:
            cache.write_bytes(write(content))

    return put


def _object_array(content: bytes) -> bytes:
    """A file of numpy's whose values are pickled."""
    buffer = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return buffer.getvalue() + content


def _plain(content: bytes) -> bytes:
    return content


def _code_beside(name: str, settings: str, entry: dict[str, Any]) -> Place:
    """Python code in a Hugging Face directory, and settings that name it."""

    def put(tiny: Tiny, content: bytes) -> None:
        folder = tiny.copy("llama-hf", EVIL)
        (folder / "checksums.json").unlink()
        (folder / name).write_text(content.decode())
        path = folder / settings
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))

    return put


def _settings_of_a_run(tiny: Tiny, content: bytes) -> None:
    (tiny.copy("teacher", EVIL) / "config.yaml").write_bytes(content)


def _yaml(hit: str) -> bytes:
    return f"job: !!python/object/apply:os.mkdir [{hit}]\n".encode()


def _python(hit: str) -> bytes:
    return f"{_code(hit)}\n".encode()


def _payloads() -> Iterator[tuple[str, Place, Callable[[str], bytes], dict[str, Command]]]:
    """Name, where it is put, what is put there, and who reads it."""
    for name, write in PICKLES.items():
        yield f".metadata: {name}", _index, write, MEGATRON
    places = {"common.pt": _common, "arguments": _entry("common_state"), "a tensor": _entry("embedding")}
    for place, put in places.items():
        for name in FEW:
            yield f"{place}: {name}", put, PICKLES[name], MEGATRON
    yield "common.pt before archives: os.system", _common_before_archives, PICKLES["os.system"], MEGATRON
    for name in FEW:
        yield f"pytorch_model.bin: {name}", _weights(_archive), PICKLES[name], HUGGING_FACE
    yield "pytorch_model.bin before archives: os.system", _weights(_plain), PICKLES["os.system"], HUGGING_FACE
    model = {"architectures": ["Evil"], "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    yield "code of a model", _code_beside("modeling_evil.py", "config.json", model), _python, HUGGING_FACE
    words = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    code = _code_beside("tokenization_evil.py", "tokenizer_config.json", words)
    yield "code of a tokenizer", code, _python, HUGGING_FACE
    yield "code of a tokenizer, in a run", code, _python, TOKENIZER
    yield "a data set's index cache", _index_cache(_plain), PICKLES["os.system"], DATASET
    yield "an index cache of objects", _index_cache(_object_array), PICKLES["os.system"], DATASET
    yield "config.yaml", _settings_of_a_run, _yaml, RUN_DIRECTORY


PAYLOADS = {name: (put, write, readers) for name, put, write, readers in _payloads()}
NAMES = list(PAYLOADS)


def run(tiny: Tiny, names: list[str]) -> dict[str, Any]:
    """Show some payloads to their readers; how often one ran."""
    rows = {}
    for name in names:
        put, write, readers = PAYLOADS[name]
        hit = tiny.path / HIT
        content = write(str(hit))
        executed, failed = [], []
        for reader, command in readers.items():
            shutil.rmtree(tiny.path / RESULT, ignore_errors=True)
            put(tiny, content)
            done = tiny.server.run(command, tiny.path)
            if hit.exists():
                executed.append(reader)
                hit.rmdir()
            if "Traceback" in done.said:
                failed.append(f"{reader}: {done.said[-600:]}")
        rows[name] = {
            "harmful": _is_harmful(write, hit),
            "readers": len(readers),
            "executed": executed,
            "traceback": failed,
        }
    return {"payloads": rows}


def _is_harmful(write: Callable[[str], bytes], hit: Path) -> bool:
    """Whether a payload does what it is made for when it is believed."""
    content = write(str(hit))
    with contextlib.suppress(Exception):  # after the harm is done, an instance of nothing remains
        if write is _python:
            exec(content.decode())
        elif write is _yaml:
            yaml.unsafe_load(content)
        else:
            pickle.loads(content)
    if harmful := hit.exists():
        hit.rmdir()
    return harmful
