"""Conversations: messages with roles, and the text that a tokenizer's template makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ext.errors import ConfigError, DataError


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that has no chat template.

    Raises:
        ConfigError: It has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template", got=getattr(tokenizer, "name_or_path", None),
            legal='no --chat, or --tokenizer DIR with a "chat_template"',
        )  # fmt: skip


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
    """A conversation as the tokenizer's template has it, special tokens spelled out.

    Args:
        tokenizer: transformers'.
        messages: Each with "role" and "content".
        answer: Whether an answer is to follow; otherwise the last message goes on.

    Raises:
        DataError: The template refuses the conversation, as some do with a system message.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer, continue_final_message=not answer
        )
    except Exception as error:  # whatever a template, which is a program, raises
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(f"the chat template refuses the conversation: {error}", got=f"roles {roles}") from error


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A user's question, and the system message before it."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]
