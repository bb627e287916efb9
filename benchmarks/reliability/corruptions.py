"""Damage to every file of every artefact: `megatron-ext verify` finds it and names the file, and so does the next job.

A job may also do without the file: then it has to leave what it leaves with the whole artefact, bit for bit.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability import content
from benchmarks.reliability.content import Content
from benchmarks.reliability.jobs import CONSOLE, Ended
from benchmarks.reliability.tiny import DATA, DISTILL, MODEL, PRETRAIN, PRUNE, SIZES, TRAIN, Tiny

DAMAGED, RESULT = "damaged", "damaged-result"
ONE_STEP = [*TRAIN, "--train-iters", "1", "--save", RESULT]
CUT = ["--prune-hidden-size", "16", "--prune-ffn-hidden-size", "24"]


@dataclass(frozen=True)
class Artefact:
    """What is damaged.

    Attributes:
        what: In words.
        made: Where a whole one lies, in the folder.
        other: Where one of the same kind and other content lies, to swap files with.
        job: Reads the one at `damaged`, and writes `damaged-result`.
        result: The content of what it writes.
        before: Command lines that make what is not in the folder yet, by the name of what they make.
        files: Which files are damaged, by pattern.
        verified: The directory below `damaged` that `megatron-ext verify` is shown.
        left_out: Files that no job reads.
    """

    what: str
    made: str
    other: str
    job: list[str | Path]
    result: Callable[[Path], Content]
    before: dict[str, list[str | Path]]
    files: str = "**/*"
    verified: str = "."
    left_out: tuple[str, ...] = ()


OTHER_CACHE, OTHER_PRUNED = "other-cache", "other-pruned"
CACHE: list[str | Path] = [
    DISTILL, *DATA, "--data-path", "little/text_document", "--split", "80,20,0", "--seq-length", "32",
    "--micro-batch-size", "4", "--distill-top-k", "8",
]  # fmt: skip
PRUNED: dict[str, list[str | Path]] = {
    OTHER_PRUNED: [PRUNE, "--load", "teacher", "--save", OTHER_PRUNED, *DATA, *SIZES, *CUT, "--prune-samples", "8",
                   "--prune-hidden-size", "24", "--seed", "5"],
}  # fmt: skip
ARTEFACTS = {
    "checkpoint": Artefact(
        "a checkpoint, one step", "one-step", "teacher/iter_0000002",
        [PRETRAIN, "--pretrained-checkpoint", DAMAGED, *DATA, *ONE_STEP], content.run, {},
        files="iter_*/*",
    ),
    "scores": Artefact(
        "scores", "pruned", OTHER_PRUNED,
        [PRUNE, "--load", "teacher", "--save", RESULT, "--prune-scores", f"{DAMAGED}/scores.safetensors", *CUT],
        content.directory, PRUNED, files="scores*.safetensors",
    ),
    "plan": Artefact(
        "a plan", "pruned", OTHER_PRUNED,
        [PRUNE, "--load", "teacher", "--save", RESULT, "--prune-plan", f"{DAMAGED}/plan.json"], content.directory,
        PRUNED, files="plan.json",
    ),
    "cache": Artefact(
        "a teacher's cache", "whole-cache", OTHER_CACHE,
        [DISTILL, *MODEL, "--distill-cache", DAMAGED, *DATA, "--data-path", "little/text_document", "--split",
         "80,20,0", *ONE_STEP], content.run,
        {"whole-cache": [*CACHE, "--distill-teacher", "teacher", "--distill-cache-write", "whole-cache"],
         OTHER_CACHE: [*CACHE, "--distill-teacher", "teacher/iter_0000001", "--distill-cache-write", OTHER_CACHE]},
    ),
    "export": Artefact(
        "an export for transformers", "llama-hf", "other-hf",
        [CONSOLE, "convert", "--from", "hf", "--to", "megatron", DAMAGED, RESULT], content.directory,
        {"other-hf": [CONSOLE, "convert", "--from", "megatron", "--to", "hf", "llama/iter_0000001", "other-hf"]},
        left_out=("README.md",),
    ),
    "data": Artefact(
        "a data set", "data", "little",
        [PRETRAIN, *MODEL, *DATA, "--data-path", f"{DAMAGED}/text_document", *ONE_STEP], content.run, {}, files="*.*",
    ),
    "tokenizer": Artefact(
        "the tokenizer of a data set", "data", "other-data",
        [PRETRAIN, *MODEL, *DATA, "--data-path", f"{DAMAGED}/text_document", "--tokenizer-model",
         f"{DAMAGED}/tokenizer", *ONE_STEP], content.run,
        {"other-data": [CONSOLE, "data", "--out", "other-data", "--vocab-size", "400", "--input", "texts"]},
        files="tokenizer/*",
    ),
}  # fmt: skip
NAMES = list(ARTEFACTS)
BAD = ("verified, unnamed", "unverified", "refused, unnamed", "WRONG")
OUTCOMES = ("damages", "verified", "verified, unnamed", "unverified", "refused", "refused, unnamed", "same", "WRONG")


def _flip(file: Path, random_: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
    file.write_bytes(data)


def _zeros(file: Path, random_: random.Random) -> None:
    """A block of a disk that was never written, or as much as there is from the middle on."""
    data = bytearray(file.read_bytes())
    block = min(4096, len(data) // 2)
    place = random_.randrange(len(data) - block)
    data[place : place + block] = bytes(block)
    file.write_bytes(data)


def _truncate(file: Path, random_: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: random_.randrange(1, len(data))])


FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "zero-fill": _zeros,
    "empty": lambda file, _: os.truncate(file, 0),
    "delete": lambda file, _: file.unlink(),
}
SWAP = "swap"


def run(tiny: Tiny, name: str, flips: int, seed: int, faults: tuple[str, ...] = (*FAULTS, SWAP)) -> dict[str, Any]:
    """Damage each file of an artefact in each way; flips at so many places."""
    artefact, random_ = ARTEFACTS[name], random.Random(f"{seed} {name}")
    _make(tiny, artefact)
    tiny.copy(artefact.made, DAMAGED)
    whole = _read(tiny, artefact)
    if isinstance(whole, Ended):
        raise SystemExit(f"{artefact.what}, undamaged: {whole.said[-3000:]}")
    verified = tiny.console("verify", f"{DAMAGED}/{artefact.verified}")
    counts: Counter[str] = Counter()
    messages = []
    files = sorted(path.relative_to(tiny.path / DAMAGED) for path in (tiny.path / DAMAGED).glob(artefact.files))
    for file in (each for each in files if (tiny.path / artefact.made / each).is_file()):
        if file.name in artefact.left_out:
            continue
        for fault in (each for each in faults for _ in range(flips if each == "flip" else 1)):
            if (file.name, fault) == ("checksums.json", "delete"):
                continue  # leaves an artefact as of others, which have none
            if not _damage(tiny, artefact, file, fault, random_):
                continue
            counts["damages"] += 1
            found = tiny.console("verify", f"{DAMAGED}/{artefact.verified}")
            outcome = "unverified"
            if found.status == 2 and found.status != verified.status:
                outcome = "verified" if _names(found, file) else "verified, unnamed"
            counts[outcome] += 1
            result = _read(tiny, artefact)
            if isinstance(result, Ended):
                told = "refused" if result.status == 2 and _names(result, file) else "refused, unnamed"
            else:
                told = "same" if result == whole else "WRONG"
            counts[told] += 1
            if outcome != "verified" or told not in ("refused", "same"):
                said = result.said[-700:] if isinstance(result, Ended) else ""
                messages.append(f"{fault} {file}: verify: {outcome}; job: {told} {said if told != 'WRONG' else ''}")
    return {
        "what": artefact.what,
        "verifiable": verified.status == 0,
        "files": len(files),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "messages": messages,
    }


def _make(tiny: Tiny, artefact: Artefact) -> None:
    if not (tiny.path / "one-step").exists():
        (tiny.path / "one-step").mkdir()
        shutil.copytree(tiny.path / "teacher" / "iter_0000003", tiny.path / "one-step" / "iter_0000003")
        (tiny.path / "one-step" / "latest_checkpointed_iteration.txt").write_text("3")
    for name, command in artefact.before.items():
        if not (tiny.path / name).exists():
            tiny.server.check(command, tiny.path)


def _damage(tiny: Tiny, artefact: Artefact, file: Path, fault: str, random_: random.Random) -> bool:
    """Damage one file of a fresh copy; whether it is another one now."""
    place = tiny.copy(artefact.made, DAMAGED) / file
    before = place.read_bytes()
    if fault != SWAP:
        if not before:
            return False
        FAULTS[fault](place, random_)
        return fault == "delete" or place.read_bytes() != before
    others = sorted((tiny.path / artefact.other).rglob(file.name))
    if file.suffix == ".safetensors":  # shards have names of their own
        others += sorted((tiny.path / artefact.other).rglob("*.safetensors"))
    for other in others:
        if other.read_bytes() != before:
            shutil.copy(other, place)
            return True
    return False


def _read(tiny: Tiny, artefact: Artefact) -> Content | Ended:
    """What the job makes of the artefact at `damaged`; or how it was refused."""
    shutil.rmtree(tiny.path / RESULT, ignore_errors=True)
    done = tiny.server.run(artefact.job, tiny.path)
    return done if done.status else artefact.result(tiny.path / RESULT)


def _names(done: Ended, file: Path) -> bool:
    """Whether a refusal names the file, without a stack trace; data sets go by what their two files share."""
    names = [file.name, str(file.with_suffix(""))] if file.suffix in (".bin", ".idx") else [file.name]
    return any(name in done.said for name in names) and "Traceback" not in done.said
