"""Claims about the tokenizer inside a GGUF: what it is, and that what runtimes do not do is refused."""

import json
import re
from itertools import pairwise

import pytest
from test_gguf import CORPUS, byte_level
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from qlora_kit.errors import RunError
from qlora_kit.export.gguf.vocabulary import name_for, vocabulary_keys

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {
    "gpt-2": (None, False),
    "llama-bpe": (LLAMA3, True),
    "smaug-bpe": (LLAMA3, False),
    "qwen2": (QWEN2, False),
    "tekken": (TEKKEN, True),
    "gpt-4o": (GPT4O, False),
}


def keys(tokenizer, rows=400, ends=()):
    return {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in vocabulary_keys(tokenizer, rows, list(ends)).items()
    }


def named(name):
    """A byte-level tokenizer that cuts words as runtimes do under that name."""
    pattern, keeps_words = WORDS[name]
    return byte_level(pattern, ignore_merges=keeps_words)


def smollm():
    made = byte_level()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def sentencepiece(*, prefix=True, gemma=False, scheme=None):
    """BPE as SentencePiece makes it and transformers converts it: each token's merges are all the ways to cut it."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    trained.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    vocab = trained.get_vocab()
    order = sorted(vocab, key=vocab.get)
    merges = [(token[:cut], token[cut:]) for token in order if token not in special for cut in range(1, len(token))]
    merges = [(left, right) for left, right in merges if left in vocab and right in vocab]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if prefix else []
    bpe.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    if scheme is not None:
        bpe.normalizer, bpe.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if gemma:
        bpe.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_tokens([AddedToken("<|user|>", special=True, normalized=False), AddedToken("<call>", normalized=False)])
    return made


@pytest.mark.parametrize("name", WORDS)
def test_the_published_patterns_are_known_by_the_names_of_runtimes(name):
    found = keys(named(name))
    assert (found["model"], found["pre"]) == ("gpt2", name)


def test_digits_on_their_own_are_smollm():
    assert keys(smollm())["pre"] == "smollm"


def test_tokens_types_and_merges_are_those_of_the_tokenizer_and_spare_rows_are_unused():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<call>", normalized=False)])
    found = keys(tokenizer, rows=300)
    count = len(tokenizer)
    assert found["tokens"][:count] == tokenizer.convert_ids_to_tokens(list(range(count)))
    assert len(found["tokens"]) == len(found["token_type"]) == 300 > count
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["the"], kinds["<s>"], kinds["<call>"], kinds["[PAD299]"]) == (1, 3, 4, 5)
    assert "t h" in found["merges"]
    assert [found["bos_token_id"], found["eos_token_id"]] == tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert not found["add_bos_token"]


def test_a_sentencepiece_tokenizer_has_scores_bytes_and_a_space_before():
    tokenizer = sentencepiece()
    found = keys(tokenizer)
    assert (found["model"], found["pre"], found["add_space_prefix"], found["add_bos_token"]) == (
        "llama",
        "default",
        True,
        True,
    )
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["<|user|>"], kinds["<call>"]) == (2, 3, 6, 3, 4)
    joined = [score for text, score in zip(found["tokens"], found["scores"], strict=True)
              if kinds[text] == 1 and len(text) > 1]  # fmt: skip
    assert len(joined) > 20
    assert joined == sorted(set(joined), reverse=True)
    assert not keys(sentencepiece(prefix=False, gemma=True))["add_space_prefix"]


def test_spaces_in_added_tokens_that_users_see_are_spaces_and_no_marks_of_sentencepiece():
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁end", normalized=False, special=True)])
    found = keys(tokenizer)
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["  "], kinds["▁end"]) == (4, 3)
    assert not {"▁▁", " end"} & kinds.keys()


def test_a_space_before_a_text_alone_is_left_out_for_chats_which_begin_with_a_special_token():
    for scheme, of_texts, of_chats in (("always", True, True), ("first", True, False), ("never", False, False)):
        tokenizer = sentencepiece(scheme=scheme)
        assert keys(tokenizer)["add_space_prefix"] == of_texts
        tokenizer.chat_template = "{{ messages[0].content }}"
        assert keys(tokenizer)["add_space_prefix"] == of_chats


@pytest.mark.parametrize(
    ("template", "adds"),
    [
        (None, True),
        ("{{ bos_token }}{{ messages[0].content }}", True),
        ("{{ messages[0].content }}", False),
        ("{{ raise_exception('no questions') }}", True),
    ],
)
def test_the_first_token_of_texts_is_left_out_for_chats_that_begin_without_it(template, adds):
    tokenizer = sentencepiece()
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = template
    assert keys(tokenizer)["add_bos_token"] == adds


def test_the_scores_join_tokens_in_the_order_of_the_merges():
    """An independent reading of how runtimes join: always the neighbours that make the token with the highest score."""
    tokenizer = sentencepiece()
    found = keys(tokenizer)
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    for text in (text for text in CORPUS if text.isascii()):
        parts = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [(scores.get("".join(pair), float("-inf")), -at) for at, pair in enumerate(pairwise(parts))]
            best, at = max(pairs, default=(float("-inf"), 0))
            if best == float("-inf"):
                break
            parts[-at : -at + 2] = ["".join(parts[-at : -at + 2])]
        spelt = [part if part in scores else f"<0x{ord(part):02X}>" for part in parts]
        assert spelt == tokenizer.tokenize(text)


def test_a_second_token_that_ends_answers_and_the_chat_template_are_kept():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0].content }}"
    for ends in ([7, tokenizer.eos_token_id], [tokenizer.eos_token_id, 7]):
        found = keys(tokenizer, ends=ends)
        assert (found["eos_token_id"], found["eot_token_id"]) == (tokenizer.eos_token_id, 7)
    assert "eot_token_id" not in keys(tokenizer, ends=[tokenizer.eos_token_id])
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def edited(change):
    tokenizer = byte_level()
    change(tokenizer.backend_tokenizer)
    return tokenizer


def merged_otherwise(*merges):
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}
    pairs = [tuple(merge.split("+")) for merge in merges]
    bpe = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="<unk>")


def word_level():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    )


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: None, "no tokenizer"),
        (word_level, "WordLevel"),
        (lambda: byte_level(r"\w+|\s+"), r"cuts text by \\w\+"),
        (lambda: byte_level(LLAMA3.replace("1,3", "1,2")), "no name for"),
        (lambda: byte_level(QWEN2, ignore_merges=True), "whole words"),
        (lambda: edited(lambda t: setattr(t, "normalizer", normalizers.Lowercase())), "Lowercase"),
        (lambda: edited(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
         "prefix"),
        (lambda: edited(lambda t: setattr(t, "post_processor", processors.TemplateProcessing(
            single="$A <s> </s>", special_tokens=[("<s>", 290), ("</s>", 291)]))), "around"),
        (lambda: merged_otherwise("a+b", "b+c", "ab+c"), "no merge of 'a' and 'bc'"),
        (lambda: merged_otherwise("b+c", "a+bc", "a+b", "ab+c"), "'abc' are not adjacent"),
    ],
)  # fmt: skip
def test_what_runtimes_do_not_do_is_refused_in_one_line(made, said):
    with pytest.raises(RunError, match=said) as caught:
        keys(made())
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(RunError, match="tokens but the embedding has 200 rows"):
        keys(byte_level(), rows=200)
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["model"]["vocab"]["say"] += 400  # ids need not follow one another
    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    assert len(gapped) < 400
    with pytest.raises(RunError, match="has 661 tokens but the embedding has 660 rows"):
        keys(gapped, rows=660)
    assert keys(gapped, rows=661)["tokens"][-1] == "say"


def test_a_model_whose_tokens_take_the_space_behind_them_is_called_by_the_name_that_runtimes_know_for_it():
    """llama.cpp strips white space behind the tokens of models called phi-3 or phi3, and of no others."""
    tokenizer = sentencepiece()
    assert name_for(tokenizer, "mine") == "mine"
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)])
    plain, spaced = (tokenizer(f"the<|end|>{gap}cat").input_ids for gap in ("", "\n "))
    assert plain == spaced
    assert name_for(tokenizer, "mine") == "phi-3 mine"
    assert name_for(tokenizer, "Phi-3.5-mini-instruct") == "Phi-3.5-mini-instruct"


@pytest.mark.parametrize(("text", "side"), [("<mask>", "lstrip"), ("<|endoftext|>", "rstrip")])
def test_tokens_that_take_spaces_where_no_runtime_lets_them_are_refused(text, side):
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False, **{side: True})])
    with pytest.raises(RunError, match=rf"the token {re.escape(text)} takes white space beside it"):
        name_for(tokenizer, "Phi-3-mini")


def test_nfc_is_let_through():
    assert keys(edited(lambda t: setattr(t, "normalizer", normalizers.NFC())))["pre"] == "gpt-2"
