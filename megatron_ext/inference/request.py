"""What is asked of a model that generates, and which of it is answered together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: How many to add at most.
        stop_tokens: The first of these ends the continuation, and is its last token.
        stop: Called with the new tokens so far after each; ends the continuation when it says so.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    stop: Callable[[list[int]], bool] | None = field(default=None, compare=False)

    def ended(self, new: list[int]) -> bool:
        """Whether nothing is to be added to these new tokens."""
        if len(new) >= self.max_new_tokens or (new and new[-1] in self.stop_tokens):
            return True
        return self.stop is not None and bool(new) and self.stop(new)


def plan(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Which requests are continued together, longest prompts first.

    A batch takes one step for each token that its prompts differ in length, and one for each new token: so a prompt
    that is shorter by more than it gets new tokens begins a batch of its own.
    """
    order = sorted((i for i in range(len(requests))), key=lambda i: (-len(requests[i].prompt), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(batches[-1]) < batch_size:
            longest = requests[batches[-1][0]]
            if len(longest.prompt) - len(requests[i].prompt) <= max(8, requests[i].max_new_tokens):
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches
