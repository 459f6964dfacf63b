"""Chat templates in the shapes of the well-known families, written for these tests, and a tokenizer for each.

What they share with the published ones is what makes trouble: what is folded into which turn, what is dropped from
earlier turns, what a generation prompt adds, what stands behind the last answer, who writes the first token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from json import dumps

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SPLIT_SYSTEM = """{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content -%}{%- set turns = messages[1:] -%}
{%- else -%}
    {%- set rules = '' -%}{%- set turns = messages -%}
{%- endif -%}
"""

LLAMA3 = (
    _SPLIT_SYSTEM
    + """{{- bos_token -}}
{%- if date_string is not defined -%}
    {%- if strftime_now is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}
    {%- else -%}{%- set date_string = '01 Jan 2024' -%}{%- endif -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' + rules | trim -}}
{%- for tool in tools or [] -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- for m in turns -%}
    {%- set who = 'ipython' if m.role == 'tool' else m.role -%}
    {{- '<|start_header_id|>' + who + '<|end_header_id|>\\n\\n' -}}
    {%- if m.tool_calls -%}
        {%- if m.tool_calls | length > 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
        {%- set call = m.tool_calls[0].function -%}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
    {%- else -%}
        {{- m.content | trim -}}
    {%- endif -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
)

# The system's words and the tools stand before the last question, wherever that is.
MISTRAL = (
    _SPLIT_SYSTEM
    + """{{- bos_token -}}
{%- set last = namespace(question=-1) -%}
{%- for m in turns -%}{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {%- if tools and loop.index0 == last.question -%}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST] ' -}}
        {%- if rules and loop.index0 == last.question -%}{{- rules + '\\n\\n' -}}{%- endif -%}
        {{- m.content + '[/INST]' -}}
    {%- elif m.role == 'tool' -%}
        {{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}
    {%- elif m.tool_calls -%}
        {{- '[TOOL_CALLS] [' -}}
        {%- for call in m.tool_calls -%}
            {{- call.function | tojson -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
        {%- endfor -%}
        {{- ']' + eos_token -}}
    {%- else -%}
        {{- ' ' + m.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_QWEN_SYSTEM = """{%- if tools -%}
    {{- '<|im_start|>system\\n' + (rules or DEFAULT) + '\\n\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif rules or DEFAULT -%}
    {{- '<|im_start|>system\\n' + (rules or DEFAULT) + '<|im_end|>\\n' -}}
{%- endif -%}
"""
_QWEN_CALLS = """{%- for call in m.tool_calls or [] -%}
    {%- if not loop.first or m.content -%}{{- '\\n' -}}{%- endif -%}
    {{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' -}}
{%- endfor -%}
"""
# Results of tools that follow each other share a turn of the user.
_QWEN_RESULT = """{%- if loop.first or turns[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{%- if loop.last or turns[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
"""

QWEN25 = _SPLIT_SYSTEM + _QWEN_SYSTEM.replace("DEFAULT", "'You help.'") + """{%- for m in turns -%}
    {%- if m.role == 'tool' -%}
""" + _QWEN_RESULT + """{%- else -%}
        {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') -}}
""" + _QWEN_CALLS + """{{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""  # fmt: skip

# Turns before the last question lose their thoughts; the last answer has a block of thought, be it empty; the prompt
# has an empty one where thinking is off.
QWEN3 = _SPLIT_SYSTEM + _QWEN_SYSTEM.replace("DEFAULT", "''") + """{%- set last = namespace(question=-1) -%}
{%- for m in turns -%}{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in turns -%}
    {%- if m.role == 'tool' -%}
""" + _QWEN_RESULT + """{%- elif m.role == 'assistant' -%}
        {%- set said = m.content or '' -%}{%- set thought = m.reasoning_content or '' -%}
        {%- if not m.reasoning_content and '</think>' in said -%}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > last.question and (loop.last or thought) -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') -}}
        {%- else -%}
            {{- said -}}
        {%- endif -%}
""" + _QWEN_CALLS + """{{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""  # fmt: skip

GEMMA = (
    _SPLIT_SYSTEM
    + """{{- bos_token -}}
{%- for m in turns -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('turns must alternate') -}}{%- endif -%}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' -}}
    {%- if loop.first and rules -%}{{- rules + '\\n\\n' -}}{%- endif -%}
    {{- m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
)

# The end of text stands behind the last turn, unless an answer is asked for.
PHI3 = """{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
PHI4 = """{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
"""

# The prompt opens a thought, and no turn that is written down has one.
DEEPSEEK = (
    _SPLIT_SYSTEM
    + """{{- bos_token + rules -}}
{%- for m in turns -%}
    {%- if m.role == 'user' -%}{{- '<|User|>' + m.content -}}
    {%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1].lstrip('\\n') + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""
)

MARKED = """{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\\n' -}}
    {%- if m.role == 'assistant' -%}
        {%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _plain(content: str) -> str:
    return content


def _as_json(call: dict) -> str:
    return dumps(call["function"], ensure_ascii=False)


@dataclass(frozen=True)
class Family:
    """A template, the tokens that it is written in, and what it makes of an answer."""

    source: str
    specials: tuple[str, ...]
    end: str
    bos: str | None = None
    eos: str = "<|endoftext|>"
    said: Callable[[str], str] = _plain
    """What an answer becomes between its prompt and its end token."""
    called: Callable[[dict], str] | None = None
    """The same of a call of a tool; None where the template has no form for it."""
    is_stable: bool = True
    """Whether a chat of plain turns is one row."""


_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama3": Family(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "<|begin_of_text|>",
        "<|end_of_text|>", str.strip,
        lambda call: '{"name": "clock", "parameters": ' + dumps(call["function"]["arguments"]) + "}",
    ),
    "mistral": Family(
        MISTRAL, ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                  "[/TOOL_RESULTS]"), "</s>", "<s>", "</s>", lambda said: " " + said,
        lambda call: f"[TOOL_CALLS] [{_as_json(call)}]",
    ),
    "qwen2.5": Family(QWEN25, _IM, "<|im_end|>",
                      called=lambda call: f"<tool_call>\n{_as_json(call)}\n</tool_call>"),
    "qwen3": Family(QWEN3, _IM, "<|im_end|>", said=lambda said: "<think>\n\n</think>\n\n" + said.lstrip("\n"),
                    called=lambda call: f"<think>\n\n</think>\n\n<tool_call>\n{_as_json(call)}\n</tool_call>",
                    is_stable=False),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<bos>", "<eos>", str.strip),
    "phi3": Family(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "phi4": Family(PHI4, (*_IM, "<|im_sep|>"), "<|im_end|>"),
    "deepseek": Family(DEEPSEEK, ("<|User|>", "<|Assistant|>"), "<|end_of_sentence|>", "<|begin_of_sentence|>",
                       "<|end_of_sentence|>", lambda said: "\n</think>\n\n" + said.lstrip("\n"), is_stable=False),
    "marked": Family(MARKED, _IM, "<|im_end|>", "<s>", "</s>"),
}  # fmt: skip


# Where line breaks end a word, as in Llama 3's and later vocabularies; and where the last of them begins one.
_WORDS = r" ?\w+| ?[^\s\w]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS_OF_GPT2 = r" ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+"


@cache
def _bytes_and_words(specials: tuple[str, ...], breaks_join: bool) -> str:
    """A byte-level vocabulary that joins words with the space before them, and line breaks with each other."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS if breaks_join else _WORDS_OF_GPT2), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials) + 40, special_tokens=list(specials), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(["on the mat\n\n\nthe cat\n\n", "user assistant system"] * 9, trainer)
    return bpe.to_str()


@cache
def _pieces(specials: tuple[str, ...], prepends: str) -> str:
    """A vocabulary in the manner of SentencePiece, where a space is part of the word behind it."""
    pieces = Tokenizer(models.BPE(unk_token=specials[0]))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepends)
    pieces.decoder = decoders.Metaspace(prepend_scheme=prepends)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=list(specials), show_progress=False)
    pieces.train_from_iterator(["on the mat\n\n the cat\nwhere? and then?"] * 9, trainer)
    return pieces.to_str()


def tokenizer_of(
    family: Family, *, pad: str | None = None, breaks_join: bool = True, prepends: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's tokens and template, and no pad token unless one is given.

    `breaks_join`: line breaks end a word; `prepends`: a vocabulary of pieces, and where it puts a space of its own.
    """
    ends = tuple(token for token in (family.bos, family.eos) if token is not None)
    specials = (*ends, *(token for token in family.specials if token not in ends))
    made = _bytes_and_words(specials, breaks_join) if prepends is None else _pieces(specials, prepends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made), bos_token=family.bos, eos_token=family.eos, pad_token=pad,
        chat_template=family.source, extra_special_tokens=[token for token in specials if token not in ends],
    )  # fmt: skip
    tokenizer.add_tokens(["<think>", "</think>"])  # as Qwen3 has them: tokens of their own, not special
    return tokenizer
