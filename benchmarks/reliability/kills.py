"""SIGKILL to every kind of job that writes, at random moments, most of them just after its output has changed.

A start of a job is killed, and the next one, and so on for some starts; then one is left alone. After each kill the
artefact is absent or what an uninterrupted job left, so far as it claims to be complete, and no older than before.
The start that is left alone ends well, and leaves what an uninterrupted job does, `metrics.jsonl` included.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability import content, tree
from benchmarks.reliability.content import Content
from benchmarks.reliability.jobs import CONSOLE, Ended
from benchmarks.reliability.tiny import CUT, DATA, DISTILL, MODEL, PRETRAIN, PRUNE, SIZES, TRAIN, Tiny
from megatron_ext.checkpoint import layout
from megatron_ext.errors import MegatronExtError

METRICS = "metrics.jsonl"
ROUND = 25  # kills after which a category's result is written down
CHAIN = 8  # kills of one job, one after another, at most
IN_WRITES = 0.8  # of the kills come just after a change of the output; the others at any time
AFTER = ("blocked", "different", "left over")
"""What may be wrong once a start was left alone: it fails; it leaves something else, or unfinished files."""
BAD = ("lost", "wrong", *AFTER)
COUNTED = ("kills", "inside a write", "ends", *BAD)
CLOSE = 0.03  # seconds after a change, at most
STEPS = ["--train-iters", "4"]


@dataclass(frozen=True)
class Category:
    """A kind of job.

    Attributes:
        what: It in words.
        command: Its command line without what comes of the output's name.
        output: The flags that name the output.
        read: The content of its output.
        accepted: What of a directory the product takes for complete; empty for nothing.
        ranks: On how many it runs.
        continues: Whether its output is a run directory, in which it goes on.
    """

    what: str
    command: list[str | Path]
    output: Callable[[str], list[str]]
    read: Callable[[Path], Content]
    accepted: Callable[[Path], Content]
    ranks: int = 1
    continues: bool = False

    @property
    def whole(self) -> bool:
        """Whether its output is there as a whole or not at all; a cache may be there in part, and says so."""
        return not self.continues and self.read is not content.cache

    def line(self, name: str) -> list[str | Path]:
        """The command line that writes `name`."""
        return [*self.command, *self.output(name)]


def _accepted_steps(path: Path) -> Content:
    """The newest step that loads, and of a corrected teacher the one of the same number, tensor by tensor."""
    try:
        newest = layout.find(path).path
    except MegatronExtError:
        return {}
    found = {f"{newest.name} {key}": value for key, value in content.step(newest).items()}
    if (path / "teacher").is_dir():
        own = path / "teacher" / newest.name
        found |= {f"teacher/{newest.name} {key}": value for key, value in content.step(own).items()}
    return found


def _accepted_whole(read: Callable[[Path], Content]) -> Callable[[Path], Content]:
    return lambda path: read(path) if path.exists() else {}


def _accepted_cache(path: Path) -> Content:
    """What of a cache is stored, whether it says that it is whole or not."""
    return content.cache(path) if path.is_dir() else {}


def _save(name: str) -> list[str]:
    return ["--save", name]


def _train(name: str) -> list[str]:
    return ["--load", name, "--save", name]


TRAINING: dict[str, Any] = {
    "output": _train,
    "read": content.run,
    "accepted": _accepted_steps,
    "continues": True,
}
NEW: dict[str, Any] = {"read": content.directory, "accepted": _accepted_whole(content.directory)}
CATEGORIES = {
    "train": Category("training, one rank", [PRETRAIN, *MODEL, *DATA, *TRAIN, *STEPS], **TRAINING),
    "train-2": Category("training, two ranks", [PRETRAIN, *MODEL, *DATA, *TRAIN, *STEPS], ranks=2, **TRAINING),
    "correct": Category(
        "distilling while the teacher is corrected",
        [
            DISTILL, *MODEL, "--distill-teacher", "teacher", "--distill-correct-teacher", "together", *DATA, *TRAIN,
            "--train-iters", "3",
        ],
        **TRAINING,
    ),
    "cache": Category(
        "writing a cache",
        [DISTILL, "--distill-teacher", "teacher", *DATA, "--data-path", "little/text_document", "--seq-length", "32",
         "--micro-batch-size", "4", "--distill-top-k", "4"],
        lambda name: ["--distill-cache-write", name], content.cache, _accepted_cache,
    ),
    "apply": Category(
        "pruning, from a plan", [PRUNE, "--load", "teacher", "--prune-plan", "pruned/plan.json"], _save, **NEW
    ),
    "prune-2": Category(
        "pruning in two rounds",
        [PRUNE, "--load", "teacher", *DATA, *SIZES, *CUT, "--prune-iterations", "2"], _save, **NEW,
    ),
    "to-hf": Category(
        "converting to Hugging Face",
        [CONSOLE, "convert", "--from", "megatron", "--to", "hf", "llama"], lambda name: [name], **NEW,
    ),
    "from-hf": Category(
        "converting from Hugging Face",
        [CONSOLE, "convert", "--from", "hf", "--to", "megatron", "llama-hf"], lambda name: [name], **NEW,
    ),
    "data": Category(
        "making data", [CONSOLE, "data", "--vocab-size", "300", "--input", "texts"], lambda name: ["--out", name], **NEW
    ),
}  # fmt: skip


class Trial:
    """The kills of one category.

    Args:
        tiny: The folder.
        category: What is killed.
        random_: Draws the moments.
    """

    def __init__(self, tiny: Tiny, category: Category, name: str, random_: random.Random) -> None:
        self.tiny, self.category, self.random = tiny, category, random_
        # Names of one length: a header that holds one is as long as the other.
        self.straight, self.killed = tiny.path / f"straight-{name}", tiny.path / f"repeated-{name}"
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._clear(self.straight)
        job = tiny.server.start(category.line(self.straight.name), tiny.path, category.ranks)
        self.changes = tree.changes(job, [self.straight])
        done = job.wait()
        if done.status:
            raise SystemExit(f"{category.what}: status {done.status}\n{done.said[-4000:]}")
        self.seconds = done.seconds
        self.expected = category.read(self.straight)
        self.accepted = self._steps_accepted()

    def run(self, kills: int) -> dict[str, Any]:
        """So many kills; what came of them."""
        while self.counts["kills"] < kills:
            self._clear(self.killed)
            newest = ""
            for _ in range(min(self.random.randint(1, CHAIN), kills - self.counts["kills"])):
                if not self._kill():
                    break
                newest = self._examine(newest)
            self._finish()
        self._clear(self.killed)
        found: dict[str, Any] = {name: self.counts[name] for name in COUNTED}
        return {"what": self.category.what, **found, "messages": self.wrong[:20]}

    def _kill(self) -> bool:
        """Start the job, and kill it; whether it was still there to be killed."""
        job = self.tiny.server.start(self.category.line(self.killed.name), self.tiny.path, self.category.ranks)
        if self.random.random() < IN_WRITES:
            # A start that goes on has less to write, so the first changes are the more frequent ones.
            most = self.random.randint(1, len(self.changes)) if self.category.continues else len(self.changes)
            tree.wait_for_change(job, [self.killed], self.random.randint(1, most))
            time.sleep(self.random.uniform(0, CLOSE))
        else:
            end = job.begun + self.random.uniform(0, self.seconds)
            while job.lives and time.perf_counter() < end:
                time.sleep(0.002)
        alive = job.lives
        job.kill()
        done = job.wait()
        if alive and done.status == -9:
            self.counts["kills"] += 1
            self.counts["inside a write"] += bool(_torn(self.killed))
            return True
        if done.status and not self._is_whole(done):
            self._say("blocked", done)
        return False

    def _examine(self, before: str) -> str:
        """Compare what claims to be complete; the newest step there is, by name."""
        try:
            accepted = self.category.accepted(self.killed)
        except Exception as error:  # whatever is wrong with it, it was accepted
            self._say("wrong", f"{type(error).__name__}: {error}")
            return before
        if any(self.accepted.get(key) != value for key, value in accepted.items()):
            self._say("wrong", "what is accepted is not what an uninterrupted job leaves")
        elif self.category.whole and accepted and accepted != self.expected:
            self._say("wrong", "a part is accepted")
        newest = max((key.split()[0] for key in accepted if key.startswith("iter_")), default="")
        tracked = layout.tracked(self.killed) or ""
        if newest < before or (tracked.isdigit() and newest < f"iter_{int(tracked):07d}"):
            self._say("lost", f"{before or tracked} was complete, and {newest or 'nothing'} is taken")
        return newest

    def _finish(self) -> None:
        """Let the job end, and compare."""
        done = self.tiny.server.run(self.category.line(self.killed.name), self.tiny.path, self.category.ranks)
        self.counts["ends"] += 1
        if done.status and not self._is_whole(done):
            self._say("blocked", done)
            return
        try:
            found = self.category.read(self.killed)
        except Exception as error:
            self._say("different", f"{type(error).__name__}: {error}")
            return
        if found != self.expected:
            keys = [key for key in found.keys() | self.expected.keys() if found.get(key) != self.expected.get(key)]
            lines = [content.metrics(run / METRICS) for run in (self.straight, self.killed)] if METRICS in keys else ""
            self._say("different", f"not as uninterrupted: {sorted(keys)[:5]} {lines}")
        if not self.category.continues and (left := content.left_over(self.killed)):
            self._say("left over", str(left))

    def _is_whole(self, done: Ended) -> bool:
        """Whether a start was refused because an earlier one, killed at its very end, had left all."""
        whole = self.category.whole and done.status == 2 and self.killed.exists()
        return whole and "Traceback" not in done.said and self.category.read(self.killed) == self.expected

    def _steps_accepted(self) -> Content:
        """All that may be accepted, by step."""
        if not self.category.continues:
            return self.expected
        found: Content = {}
        for step in content.steps(self.straight):
            name = str(step.relative_to(self.straight))
            found |= {f"{name} {key}": value for key, value in content.step(step).items()}
        return found

    def _say(self, what: str, message: Ended | str) -> None:
        self.counts[what] += 1
        text = message if isinstance(message, str) else f"status {message.status}: {message.said[-1500:]}"
        self.wrong.append(f"{what}: {text}")

    def _clear(self, path: Path) -> None:
        for each in (path, *content.beside(path)):
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink(missing_ok=True)


def _torn(path: Path) -> bool:
    """Whether a kill has left something unfinished: a temporary file, a step without its last file, an old tracker."""
    if any("scores-" not in name or name.endswith(content.PARTIAL) for name in content.left_over(path)):
        return True
    complete = [each for each in content.steps(path) if (each / "checksums.json").is_file()]
    if len(complete) < len(content.steps(path)):
        return True
    own = [each.name for each in complete if each.parent == path]
    tracked = layout.tracked(path) or ""
    return bool(own) and (not tracked.isdigit() or max(own) != f"iter_{int(tracked):07d}")


def run(tiny: Tiny, name: str, count: int, seed: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """So many kills of a category, added to what earlier ones have come to."""
    already = before["kills"] if before else 0
    found = Trial(tiny, CATEGORIES[name], name, random.Random(f"{seed} {name} {already}")).run(count)
    return found | {key: before[key] + found[key] for key in (*COUNTED, "messages")} if before else found
