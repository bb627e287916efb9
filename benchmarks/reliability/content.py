"""What an artefact says, read without the code that is being tried: by pickle, zip and JSON alone.

Two artefacts with the same content are the same to whoever reads them; times and names of directories are left out.
"""

import hashlib
import io
import json
import pickle
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open

PARTIAL, LOCK = ".partial", ".lock"
TIMES = ("seconds", "tokens_per_second")
Content = dict[str, str]
"""By place in the artefact, a digest of what is there."""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _of_tensor(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat.numpy().tobytes())


def step(path: Path) -> Content:
    """Every tensor of a checkpoint's step, the optimizer's among them, bit for bit.

    Only of checkpoints that were made here: this unpickles them.
    """
    place = pickle.loads((path / ".metadata").read_bytes())
    found: Content = {}
    for index, info in place.storage_data.items():
        with (path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            value = torch.load(io.BytesIO(file.read(info.length)), weights_only=False)
        if isinstance(value, torch.Tensor):
            # Not by file: which rank has written a tensor, or a part of it, does not matter.
            found[f"{index.fqn} {tuple(index.offset or ())}"] = _of_tensor(value)
    assert found, f"no tensors in {path}"
    return found


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, without times; a line that is no JSON raises."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def run(path: Path) -> Content:
    """A run directory: its steps, those of a corrected teacher, and its metrics."""
    found = {str(each.relative_to(path)): _digest(repr(sorted(step(each).items())).encode()) for each in steps(path)}
    return found | {"metrics.jsonl": _digest(repr(metrics(path / "metrics.jsonl")).encode())}


def steps(path: Path) -> list[Path]:
    """Complete or not, those of a corrected teacher among them."""
    return sorted(each for each in (*path.glob("iter_*"), *path.glob("teacher/iter_*")) if each.is_dir())


def directory(path: Path) -> Content:
    """Any other directory: tensors of steps and scores by value, all other files byte by byte but for its name."""
    found: Content = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_dir() or file.parent.name == "release" or file.suffix == ".lock":
            continue
        if file.name == "checksums.json":
            found[name] = _checksums(file)
        elif file.suffix == ".safetensors":
            found[name] = _digest(repr(sorted(_tensors(file).items())).encode())
        else:
            found[name] = _digest(file.read_bytes().replace(path.name.encode(), b"NAME"))
    if (path / "release").is_dir():
        found |= step(path / "release")
    return found


def cache(path: Path) -> Content:
    """A teacher's cache by sample, in whatever shard it lies; a sample twice must be the same twice."""
    found: Content = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        identities = tensors.pop("sample_id")
        for row, identity in enumerate(identities):
            key = str(identity.tolist())
            value = _digest(" ".join(_of_tensor(tensors[name][row]) for name in sorted(tensors)).encode())
            assert found.setdefault(key, value) == value, f"{file}: a sample with two contents"
    return found


def _tensors(file: Path) -> Content:
    with safe_open(file, framework="pt") as opened:
        return {name: _of_tensor(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118


def _checksums(file: Path) -> str:
    """Whether all of them are right, and of which files: those of a file that holds its directory's name differ."""
    told = json.loads(file.read_text())["files"]
    wrong = [
        name
        for name, parts in told.items()
        for first, length, expected in parts
        if xxhash.xxh3_64_hexdigest((file.parent / name).read_bytes()[first : first + length]) != expected
    ]
    return f"wrong for {wrong}" if wrong else f"right for {sorted(told)}"


def left_over(path: Path) -> list[str]:
    """Unfinished files and directories of an artefact, in it and beside it, and scores that are kept until its end."""
    return [str(each.relative_to(path.parent)) for each in (*beside(path), *path.rglob(f"*{PARTIAL}"))]


def beside(path: Path) -> list[Path]:
    """What a job keeps hidden beside its output while it works, but for its lock."""
    names = [each for each in path.parent.iterdir() if each.name[0] == "." and f".{path.name}." in each.name]
    return [each for each in names if each.suffix != LOCK]
