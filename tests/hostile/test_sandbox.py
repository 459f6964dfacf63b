"""Chat templates from anywhere: they run in Jinja's sandbox, and what they may not do there is a fault of the row."""

import pytest
from test_data import make_tokenizer

from qlora_kit.data import Chat, encode_rows
from qlora_kit.data.chat_template import Renderer, end_token_id, template_tokens
from qlora_kit.errors import DataError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

REFUSED = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals of a function": "{{ lipsum.__globals__['os'].getcwd() }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "code of a function": "{{ raise_exception.__code__.co_filename }}",
    "another file": "{% include '/etc/passwd' %}",
    "a change of the chat": "{{ messages.append(1) }}",
    "a field of a format": "{{ '{0.__class__.__mro__}'.format(messages) }}{{ ''.__class__ }}",
    "a range without end": "{% for _ in range(10**12) %}{% endfor %}",
    "a call of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no Jinja": "{% for %}",
    "a division by zero": "{{ 1 / 0 }}",
    "no such item": "{{ 'abc'.encode('zz') }}",
    "no such attribute": "{{ 3 | dictsort }}",
    "no such form": "{{ '%q' % 1 }}",
    "a sum of a number and a text": "{{ 1 + 'a' }}",
    "a power of ten": "{{ (10 ** 5000) ~ '' }}",
    "a text of more than there is": "{{ 'a' * 10**17 }}",
    "lines of its own": "{{ raise_exception('one\ntwo\x1b[2J') }}",
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_template_may_not_or_cannot_do_is_a_line(what, tokenizer):
    with pytest.raises(DataError, match="the chat template rejects the chat") as caught:
        Renderer(tokenizer, REFUSED[what])(CHAT)
    assert "\n" not in str(caught.value)


def test_such_a_template_is_a_fault_of_the_row_and_names_no_token(tokenizer):
    for source in REFUSED.values():
        tokenizer.chat_template = source
        assert (end_token_id(tokenizer), template_tokens(tokenizer)) == (None, [])
        with pytest.raises(DataError, match=r"^a.jsonl:7: the chat template rejects the chat"):
            encode_rows([Chat(CHAT, where="a.jsonl:7")], tokenizer)
