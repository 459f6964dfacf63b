"""The tokenizer inside a GGUF file, which has no other: two kinds of it, each recognised by what it does.

    gpt2     byte-level BPE: merges, and the name of the pattern that cuts text into words before them
    llama    SentencePiece's BPE: a score for each token, the highest joined first; bytes for what has none

A runtime implements each pattern under a name, so a pattern without one is refused: it would tokenise otherwise, and
nothing would say so.

Sources: docs/gguf.md of github.com/ggml-org/ggml (keys and types of tokens), src/llama-vocab.cpp of
github.com/ggml-org/llama.cpp (names of patterns).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_kit.data.chat_template import Renderer
from qlora_kit.errors import DataError, RunError
from qlora_kit.export.gguf.families import Value

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # Llama 3 keeps up to three digits together, Qwen none

PATTERNS = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (_WORDS % r"\p{N}{1,3}", "whole words"): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}",): "smaug-bpe",
    (_WORDS % r"\p{N}",): "qwen2",
    (_CASED % ("", "", r"\p{N}"), "whole words"): "tekken",
    (_CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?", r"\p{N}{1,3}"),): "gpt-4o",
}
"""How text is cut into words, step by step, and what runtimes call it. `whole words`: a word that is a token is not
merged up to it (`ignore_merges`)."""

_SPACE = "▁"

_TAKING = ("phi-3", "phi3")
"""Names of models (`general.name`) whose added tokens take the white space behind them in runtimes, but for `_LEAVING`:
nothing else in a file says so."""
_LEAVING = ("<unk>", "<s>", "<|endoftext|>")


def vocabulary_keys(tokenizer: PreTrainedTokenizerBase | None, rows: int, ends: list[int]) -> dict[str, Value]:
    """What a GGUF file says of a tokenizer.

    Args:
        tokenizer: of the model.
        rows: of its embedding; those above the last token are held as unused.
        ends: tokens that end an answer.

    Raises:
        RunError: it is none that runtimes have, or it does what they do not.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise RunError(f"the model has {kind}, and a GGUF file holds its tokenizer; a fast one is needed")
    count = 1 + max(tokenizer.get_vocab().values())
    if count > rows:
        raise RunError(f"the tokenizer has {count} tokens but the embedding has {rows} rows")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**_keys_of(state, rows, tokenizer.chat_template is not None), **_special_keys(tokenizer, ends)}


def _keys_of(state: Mapping[str, Any], rows: int, has_chats: bool) -> dict[str, Value]:
    model = state["model"]
    steps = [step["type"] for step in _steps(state["pre_tokenizer"], "pretokenizers")]
    if model["type"] != "BPE" or not ("ByteLevel" in steps or model["byte_fallback"]):
        raise RunError(
            f"a tokenizer of the kind {model['type']} with {', '.join(steps) or 'no words'} has no place in GGUF; "
            "byte-level BPE and SentencePiece's BPE have"
        )
    tokens, kinds = map(list, zip(*_tokens(state, rows), strict=True))
    own: dict[str, Any]
    if "ByteLevel" in steps:
        own = {"model": "gpt2", "pre": _pattern(state), "merges": [" ".join(_pair(merge)) for merge in model["merges"]]}
    else:
        own = {"model": "llama", "pre": "default", "scores": _scores(model, tokens)}
        own["add_space_prefix"] = _adds_space(state, has_chats)
    return {_key(name): value for name, value in {**own, "tokens": tokens, "token_type": kinds}.items()}


def name_for(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The name of a model by which runtimes treat white space beside its added tokens as its tokenizer does.

    Raises:
        RunError: they do so under no name.
    """
    added = tokenizer.added_tokens_decoder.values()
    odd = [token.content for token in added if token.lstrip or (token.rstrip and token.content in _LEAVING)]
    if odd:
        raise RunError(f"the token {odd[0]} takes white space beside it, which it does not in GGUF's runtimes")
    is_known = any(taking in name.lower() for taking in _TAKING)
    return f"{_TAKING[0]} {name}" if not is_known and any(token.rstrip for token in added) else name


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _tokens(state: Mapping[str, Any], rows: int) -> list[tuple[str, int]]:
    """Text and type of every row of the embedding."""
    model = state["model"]
    found = [(f"[PAD{row}]", TokenType.UNUSED) for row in range(rows)]
    for text, row in model["vocab"].items():
        is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = TokenType.UNKNOWN if text == model.get("unk_token") else TokenType.BYTE if is_byte else TokenType.NORMAL
        found[row] = text, kind
    for added in state["added_tokens"]:
        is_unknown = added["content"] == model.get("unk_token")
        marked = TokenType.UNKNOWN if is_unknown else TokenType.CONTROL
        # Spaces in tokens that users see are spaces here, not the character that SentencePiece writes for them.
        shown = added["content"].replace(_SPACE, " "), TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], marked) if added["special"] else shown
    return [(text, int(kind)) for text, kind in found]


def _special_keys(tokenizer: PreTrainedTokenizerFast, ends: list[int]) -> dict[str, Value]:
    """Which tokens begin, end and pad, whether a text gets them, and the chat template."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = "a"
    plain, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    adds_bos, adds_eos = puts_bos(tokenizer), len(whole) > 1 and whole[-1:] == [eos]
    if whole != [bos] * adds_bos + plain + [eos] * adds_eos:
        raise RunError(f"the tokenizer puts {whole} around {plain}; GGUF's runtimes put one bos and one eos token")
    found = {
        "bos_token_id": bos,
        "eos_token_id": eos if eos is not None else next(iter(ends), None),
        "eot_token_id": next((end for end in ends if end != eos), None),
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    keys: dict[str, Value] = {_key(name): token for name, token in found.items() if token is not None}
    keys |= {_key("add_bos_token"): adds_bos and not _chats_do_without(tokenizer), _key("add_eos_token"): adds_eos}
    template = tokenizer.chat_template
    return keys | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _chats_do_without(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether chats begin without the token that is put before texts: runtimes would put it before them, too.

    As with the space before a text, a file is either right for chats or for texts.
    """
    if not isinstance(tokenizer.chat_template, str):
        return False
    try:
        text = Renderer(tokenizer, tokenizer.chat_template)([{"role": "user", "content": "a"}])
    except DataError:
        return False
    return not text.startswith(tokenizer.bos_token or "")


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its first token before a text, as runtimes do then."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _steps(step: Mapping[str, Any] | None, several: str) -> Iterator[Mapping[str, Any]]:
    """One normaliser or pre-tokenizer after the other."""
    if step is not None:
        yield from (step[several] if step["type"] == "Sequence" else [step])


def _pattern(state: Mapping[str, Any]) -> str:
    """What runtimes call the way in which a byte-level tokenizer cuts text into words."""
    found: list[str] = []
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": is_used}:
                found += ["gpt2"] if is_used else []
            case {"type": "Digits", "individual_digits": True}:
                found.append("digits")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case _:
                found.append(json.dumps(step))
    normalizers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    # Runtimes do not normalise. NFC alone is let through: it leaves composed text, which is nearly all text, as it is.
    found += [name for name in normalizers if name != "NFC"] + ["whole words"] * state["model"]["ignore_merges"]
    if tuple(found) not in PATTERNS:
        known = ", ".join(PATTERNS.values())
        raise RunError(
            f"the tokenizer cuts text by {' then '.join(found) or 'nothing'}, which GGUF's runtimes have no name for; "
            f"known: {known}"
        )
    return PATTERNS[tuple(found)]


def _adds_space(state: Mapping[str, Any], has_chats: bool) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text, and, as runtimes do then, behind special tokens.

    A tokenizer that does the first alone has no twin among runtimes. Its chats begin with a special token, so those are
    right without a space, and plain texts with it.
    """
    adds = False
    odd: list[str] = []
    for step in (*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                adds = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
                adds = scheme == "always" or (scheme == "first" and not has_chats)
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                pass  # Gemma's; its normaliser has left no space
            case _:
                odd.append(step["type"])
    if odd:
        raise RunError(
            f"the tokenizer prepares text by {', '.join(odd)}, which GGUF's runtimes do not do for SentencePiece"
        )
    return adds


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Scores that make runtimes join tokens in the order of the merges.

    Runtimes join the neighbours that make the token with the highest score, whatever the two are. That is the same as
    the merges where a token's merges follow one another and are all the pairs of tokens that it can be cut into:
    as SentencePiece's are when they are converted, and those of other trainers are not.
    """
    vocab = model["vocab"]
    ranks: dict[str, int] = {}
    pairs = set()
    previous = ""
    for left, right in map(_pair, model["merges"]):
        made = left + right
        if made != previous and made in ranks:
            raise RunError(
                f"the merges of the token {made!r} are not adjacent, as SentencePiece's are: no GGUF is made"
            )
        ranks.setdefault(made, len(ranks))
        pairs.add((left, right))
        previous = made
    for token in ranks:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and (left, right) not in pairs:
                raise RunError(
                    f"the tokenizer has no merge of {left!r} and {right!r} though it has {token!r}, and GGUF's "
                    "runtimes would join them: these are not SentencePiece merges"
                )
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
