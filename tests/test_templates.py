"""Templates: whatever a family's template does to a chat, what is trained is what inference sees and would have to say.

The oracle is transformers' own `apply_chat_template` on the turns before an answer.
"""

import pytest
from chat_templates import FAMILIES, tokenizer_of

from qlora_kit.data import Chat, collate, encode_turns

SYSTEM = {"role": "system", "content": "Be a cat."}
ASKED = {"role": "user", "content": "where?"}
SAID = {"role": "assistant", "content": "on the mat"}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]

CHATS = {
    "single": [ASKED, SAID],
    "multi": [ASKED, SAID, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "the cat 🙂"}],
    "system": [SYSTEM, ASKED, SAID, ASKED, {"role": "assistant", "content": "the cat"}],
    "quoted": [{"role": "user", "content": "</s> <|im_end|> <|end|> <end_of_turn> <|eot_id|>"}, SAID],
    "empty": [ASKED, {"role": "assistant", "content": ""}, ASKED, SAID],
    "spaced": [ASKED, {"role": "assistant", "content": "  on the mat \n"}, ASKED, SAID],
    "broken": [ASKED, {"role": "assistant", "content": "\n\non the mat\n\n"}, ASKED, SAID],
    "tools": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "noon"}, SAID],
}
CASES = [
    (name, chat) for name, family in FAMILIES.items() for chat in CHATS if chat != "tools" or family.called is not None
]


def encoded(name, chat, **options):
    """The tokenizer of a family and the rows that a chat makes."""
    tokenizer = tokenizer_of(FAMILIES[name])
    tools = TOOLS if chat == "tools" else None
    return tokenizer, encode_turns(Chat(CHATS[chat], tools), tokenizer, **options)


def answers_of(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def prompts(tokenizer, chat):
    """Token ids that inference gives before each answer."""
    tools = TOOLS if chat == "tools" else None
    return [
        tokenizer.apply_chat_template(CHATS[chat][:i], tools=tools, add_generation_prompt=True)["input_ids"]
        for i in answers_of(CHATS[chat])
    ]


def stretches(row, tokenizer):
    """The trained parts of a row as text."""
    parts, was_trained = [], False
    for token, is_trained in zip(row.input_ids, row.trained, strict=True):
        if is_trained and not was_trained:
            parts.append([])
        if is_trained:
            parts[-1].append(token)
        was_trained = is_trained
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_trained_is_the_answer_and_its_end_token_and_nothing_else(name, chat):
    family = FAMILIES[name]
    tokenizer, rows = encoded(name, chat)
    assert all(0 < row.trained_tokens < len(row.input_ids) for row in rows)
    found = [text for row in rows for text in stretches(row, tokenizer)]
    wanted = [
        (family.called(CALL) if "tool_calls" in message else family.said(message["content"])) + family.end
        for message in CHATS[chat]
        if message["role"] == "assistant"
    ]
    assert found == wanted


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_every_answer_stands_behind_the_tokens_that_inference_gives(name, chat):
    tokenizer, rows = encoded(name, chat)
    given = prompts(tokenizer, chat)
    assert len(set(map(len, given))) == len(given), "each prompt is longer than the one before"
    assert len(rows) in (1, len(given))
    for number, prompt in enumerate(given):
        row = rows[0 if len(rows) == 1 else number]
        assert row.input_ids[: len(prompt)] == prompt
        assert row.trained[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    assert rows[-1].prompt == (given[-1] if len(rows) == len(given) else None)


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_tokens_decode_to_what_the_template_renders_with_one_first_token(name, chat):
    family, messages = FAMILIES[name], CHATS[chat]
    tokenizer, rows = encoded(name, chat)
    tools = TOOLS if chat == "tools" else None
    turns = [len(messages) - 1] if len(rows) == 1 else answers_of(messages)
    for row, i in zip(rows, turns, strict=True):
        text = tokenizer.apply_chat_template(messages[: i + 1], tools=tools, tokenize=False)
        found = tokenizer.decode(row.input_ids)
        if name == "deepseek":  # its turns leave out the thought that its prompts open
            assert found.endswith("<think>\n" + family.said(messages[i]["content"]) + family.end)
            found = "".join(found.rsplit("<think>\n\n</think>\n\n", 1))
            text = text.replace("<｜Assistant｜>\n", "<｜Assistant｜>")
        assert text.startswith(found)
        assert text[len(found) :] in ("", "\n", "\n<|endoftext|>"), "what a template adds behind an end token"
        assert row.input_ids.count(tokenizer.bos_token_id) == (family.bos is not None)
        assert family.bos is None or row.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_stable_chats_are_one_row_and_others_one_an_answer(name):
    rows = len(encoded(name, "multi")[1])
    assert rows == (1 if FAMILIES[name].is_stable else 2)
    assert len(encoded(name, "multi", loss_on="last")[1]) == len(encoded(name, "multi", loss_on="all")[1]) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_last_answer_alone_is_trained_as_its_own_row_would_be(name):
    tokenizer, rows = encoded(name, "multi")
    (last,) = encoded(name, "multi", loss_on="last")[1]
    assert stretches(last, tokenizer) == stretches(rows[-1], tokenizer)[-1:]
    assert last.prompt == rows[-1].prompt or len(rows) == 1


def test_an_answer_that_joins_the_line_break_of_its_prompt_is_a_row_of_its_own():
    """One token for both breaks would be in no prompt that inference gives."""
    tokenizer, rows = encoded("phi3", "broken")
    whole = tokenizer(tokenizer.apply_chat_template(CHATS["broken"], tokenize=False), add_special_tokens=False)
    first = prompts(tokenizer, "broken")[0]
    assert whole["input_ids"][: len(first)] != first
    assert len(rows) == 2
    assert len(encoded("phi3", "multi")[1]) == 1


def test_words_that_take_the_last_line_break_of_a_prompt_are_rows_of_their_own():
    """GPT-2's words split two line breaks before a letter, and join them at the end of a prompt."""
    tokenizer = tokenizer_of(FAMILIES["llama3"], breaks_join=False)
    rows = encode_turns(Chat(CHATS["multi"]), tokenizer)
    assert len(encoded("llama3", "multi")[1]) == 1
    assert [row.input_ids[: len(row.prompt)] for row in rows] == prompts(tokenizer, "multi")
    assert [stretches(row, tokenizer) for row in rows] == [["on the mat<|eot_id|>"], ["the cat 🙂<|eot_id|>"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_with_the_end_token_changes_no_label(name):
    family = FAMILIES[name]
    tokenizer, rows = encoded(name, "multi")
    rows = rows + encoded(name, "single")[1]
    end = tokenizer.convert_tokens_to_ids(family.end)
    ours, other = (collate(rows, pad_id=pad) for pad in (end, 5))
    assert min(ours.lengths) < max(ours.lengths)
    assert not (ours.input_ids == other.input_ids).all()
    assert (ours.labels == other.labels).all()
    assert all((labels == end).any() for labels in ours.labels)
