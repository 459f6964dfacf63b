"""Claims about the Modelfile: its template writes chats as the tokenizer's own does, or none is given."""

import re
from dataclasses import replace

import pytest
from chat_templates import FAMILIES, tokenizer_of
from tokenizers import processors

from qlora_kit.export.gguf.ollama import chat_shape, modelfile
from qlora_kit.export.gguf.vocabulary import _special_keys

CHATS = [
    [("user", "Where is the key?")],
    [("system", "Be brief."), ("user", "Where?")],
    [("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."), ("user", "E?")],
    [("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?")],
]


def run_go(template, chat):
    """The few actions of Go's templates that a Modelfile of ours has."""
    tokens = re.split(r"{{ (.*?) }}", template)

    def walk(at, message, is_on):
        """Text from a token on to the end of its block, and where that is."""
        text, was_on = "", is_on
        while at < len(tokens):
            if at % 2 == 0:
                text += tokens[at] if is_on else ""
            elif tokens[at] == "end":
                return text, at
            elif tokens[at].startswith("else if eq .Role"):
                is_on = not was_on and message[0] == tokens[at].split('"')[1]
                was_on = was_on or is_on
            elif tokens[at] == ".Content":
                text += message[1] if is_on else ""
            elif tokens[at] == "range .Messages":
                parts = [walk(at + 1, each, True) for each in chat]
                text, at = text + "".join(part for part, _ in parts), parts[0][1]
            else:
                is_true = {"if not .System": chat[0][0] != "system"}.get(tokens[at])
                is_true = message[0] == tokens[at].split('"')[1] if is_true is None else is_true
                part, at = walk(at + 1, message, is_true)
                text += part
            at += 1
        return text, at

    return walk(0, None, True)[0]


def prompt_ids(tokenizer, chat):
    """What the model was trained to go on from."""
    messages = [{"role": role, "content": content} for role, content in chat]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def putting_bos(tokenizer):
    """The tokenizer, which puts its first token before every text from now on, if it has one."""
    if tokenizer.bos_token is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    return tokenizer


def template_in(text):
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)


def test_some_families_have_a_template_and_some_do_more_than_put_words_around_messages():
    found = {name for name in FAMILIES if chat_shape(tokenizer_of(FAMILIES[name])) is not None}
    # Mistral's and Gemma's write the system's words into a question.
    assert found == set(FAMILIES) - {"mistral", "gemma"}


BARE = replace(FAMILIES["phi3"], bos="<s>")
"""A template that writes no first token, of a tokenizer that has one."""


@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "bare"])
def test_a_chat_becomes_the_tokens_that_it_was_in_training_or_is_left_to_ollama(name, puts):
    """Ollama writes a chat by the template and tokenises it, with a first token before it where the file says so."""
    tokenizer = tokenizer_of(FAMILIES.get(name, BARE))
    tokenizer = putting_bos(tokenizer) if puts else tokenizer
    if puts and tokenizer.bos_token is not None:
        assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id
    text = modelfile("model.gguf", tokenizer, [tokenizer.eos_token_id])
    assert text.startswith("FROM ./model.gguf\n")
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text
    found = template_in(text)
    if found is None:
        assert "# The chat template is more than" in text
        return
    first = [tokenizer.bos_token_id] if _special_keys(tokenizer, [])["tokenizer.ggml.add_bos_token"] else []
    for chat in CHATS:
        written = tokenizer(run_go(found[1], chat), add_special_tokens=False).input_ids
        assert first + written == prompt_ids(tokenizer, chat)


def test_a_token_that_a_modelfile_cannot_quote_is_left_out_of_what_stops_an_answer():
    tokenizer = tokenizer_of(FAMILIES["phi3"])
    tokenizer.add_tokens(['<"end">'], special_tokens=True)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids('<"end">')]
    lines = modelfile("model.gguf", tokenizer, ends).splitlines()
    assert [line for line in lines if line.startswith("PARAMETER")] == [f'PARAMETER stop "{tokenizer.eos_token}"']


def test_a_model_of_texts_is_given_the_prompt_alone():
    tokenizer = tokenizer_of(FAMILIES["phi3"])
    tokenizer.chat_template = None
    assert template_in(modelfile("model.gguf", tokenizer, []))[1] == "{{ .Prompt }}"
