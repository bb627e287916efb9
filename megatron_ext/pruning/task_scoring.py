"""The task of a pruning job: a model's score at it, on any layout, as it is or with sub-layers left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation import questions
from megatron_ext.inference.loglikelihood import LoglikelihoodRequest
from megatron_ext.inference.prompts import TextCodec, stop_tokens
from megatron_ext.inference.tokenizer import tokenizer_of, vocab_size_of
from megatron_ext.training.job import RunConfig

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

HARNESS = "lm_eval:"
Judge = Callable[[], float]


@dataclass(frozen=True)
class Judged:
    """A task that exists, and is ready to be asked.

    Attributes:
        name: As it was asked for.
        metric: Which of its numbers counts; higher is better.
        judge: Makes of a model on this rank what measures its score, a collective of all ranks. To be called once
            Megatron has started.
    """

    name: str
    metric: str
    judge: Callable[["ShardedModel"], Judge]


def find(run: RunConfig, name: str, metric: str, limit: int | None = None, folders: Sequence[str] = ()) -> Judged:
    """The task of a name, before anything is started.

    Args:
        run: The command line, whose tokenizer the task is asked with.
        name: `package.module:function`, or `lm_eval:NAME`.
        metric: Which number counts.
        limit: Questions at most; by default all.
        folders: Where else tasks of the harness are described.

    Raises:
        ConfigError: There is no such task, or it has no such metric.
        DataError: The harness cannot load its data.
    """
    if limit is not None and limit < 1:
        raise ConfigError("--prune-task-samples", got=limit, legal="at least 1")
    if name.startswith(HARNESS):
        return Judged(name, metric, _of_harness(run, name.removeprefix(HARNESS), metric, limit, folders))
    if folders:
        raise ConfigError("--prune-task-folder has tasks of the harness", got=name, legal=f"--prune-task {HARNESS}NAME")
    if metric not in questions.METRICS:
        raise ConfigError("--prune-task-metric", got=metric, legal=", ".join(questions.METRICS))
    return Judged(name, metric, _of_questions(run, questions.load_task(name), metric, limit))


def _of_questions(
    run: RunConfig, task: questions.Task, metric: str, limit: int | None
) -> Callable[["ShardedModel"], Judge]:
    args = run.args

    def judge(model: "ShardedModel") -> Judge:
        from megatron.training import get_tokenizer

        from megatron_ext.inference.score import score

        asked = list(task(get_tokenizer(), args.seq_length, args.seed))[:limit]
        texts = questions.texts(asked, args.seq_length)
        passages = [LoglikelihoodRequest([*text.prompt, *text.answer], len(text.prompt)) for text in texts]

        def measure() -> float:
            found = dict(score(model, passages, args.micro_batch_size * args.seq_length))
            scores = [(found[i].total, found[i].all_greedy) for i in range(len(passages))]
            return questions.accuracy(asked, scores)[metric]

        return measure

    return judge


def _of_harness(
    run: RunConfig, name: str, metric: str, limit: int | None, folders: Sequence[str]
) -> Callable[["ShardedModel"], Judge]:
    try:
        from megatron_ext.evaluation.harness import Limits, MegatronLM
        from megatron_ext.evaluation.tasks import Tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not installed: {error}", legal="pip install 'megatron-ext[eval]'"
        ) from error
    args = run.args
    tokenizer = _tokenizer(run)
    asked = Tasks([name], [Path(folder) for folder in folders], limit=limit)
    loaded = asked.load()
    _check_metric(name, metric, loaded["tasks"].values())
    limits = Limits(args.seq_length, args.micro_batch_size * args.seq_length, args.micro_batch_size)
    writer = TextCodec(tokenizer, stop_tokens(Path(args.load), tokenizer))

    def judge(model: "ShardedModel") -> Judge:
        def measure() -> float:
            results = {own: numbers for own, numbers, _ in asked.run(MegatronLM(model, writer, limits), loaded)}
            found = results[name]
            if metric not in found:
                numbers = [key for key, value in found.items() if isinstance(value, float) and "_stderr" not in key]
                raise ConfigError(f"{name} has no such metric", got=metric, legal=", ".join(numbers))
            return float(found[metric])

        return measure

    return judge


def _check_metric(name: str, metric: str, loaded: Any) -> None:
    """Refuse a metric that a task does not have, or of which less is better."""
    better: dict[str, bool] = {}
    for task in loaded:
        better |= task.higher_is_better()
    base = metric.split(" ")[0]
    if not better.get(base, False):
        legal = ", ".join(own for own, higher in better.items() if higher)
        raise ConfigError(f"--prune-task-metric of {name}, of which more is better", got=metric, legal=legal or "none")


def _tokenizer(run: RunConfig) -> Any:
    """transformers' own, which the harness works with."""
    args = run.args
    given = Path(args.tokenizer_model) if args.tokenizer_type == "HuggingFaceTokenizer" else None
    return tokenizer_of(Path(args.load), given)


def vocab_size(run: RunConfig) -> int:
    """Entries of the vocabulary that are the model's and the tokenizer's, without padding."""
    return min(vocab_size_of(Path(run.args.load), None), run.vocab_size)
