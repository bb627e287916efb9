import pytest

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.inference.chat import check_template, conversation, render
from tests.unit.inference.test_prompts import characters

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and forbidden %}{{ raise_exception('no system role') }}{% endif %}"
    "<turn>{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


def test_a_question_is_a_conversation_in_the_words_of_the_template() -> None:
    tokenizer = characters(chat_template=TEMPLATE)
    check_template(tokenizer)
    assert render(tokenizer, conversation("hi", None)) == "<turn>user:hi<turn>assistant:"
    assert render(tokenizer, conversation("hi", "be")) == "<turn>system:be<turn>user:hi<turn>assistant:"
    begun = [*conversation("hi", None), {"role": "assistant", "content": "yo"}]
    assert render(tokenizer, begun, answer=False) == "<turn>user:hi<turn>assistant:yo"


def test_what_a_template_refuses_is_said() -> None:
    tokenizer = characters(chat_template=TEMPLATE.replace("and forbidden", ""))
    with pytest.raises(DataError, match=r"(?s)no system role.*system, user"):
        render(tokenizer, conversation("hi", "be"))
    with pytest.raises(ConfigError, match="no chat template"):
        check_template(characters())
