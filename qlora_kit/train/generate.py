"""Answers: prompts continued by a model, many at once or one that is told as it comes.

Generation changes nothing: no gradient, the mode is put back, and so is the random state, from which sampled tokens are
not drawn: they have a seed of their own. Nor does it follow the model's own generation config in anything but its end
tokens: a penalty or a nucleus that a base's authors recommend would make answers before and after training those of
other rules.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from qlora_kit.data import end_token_id
from qlora_kit.errors import ModelError
from qlora_kit.train.forward import evaluation_mode

TOKENS_AT_ONCE = 2048
"""Tokens, of prompts and answers, that are generated together: their keys and values stand beside the model, up to
0.5 MiB a token in a 7B model without shared heads."""
UNFINISHED = "\ufffd"
"""What tokenizers show for the first bytes of a character whose last are yet to come."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn, and the next three narrow what from.
        top_p: the likeliest tokens that have this share together; 1 for all.
        top_k: as many of the likeliest tokens; 0 for all.
        min_p: tokens with at least this share of the likeliest one's probability; 0 for all.
        repetition_penalty: by which the logits of tokens that were there already are pushed down; 1 for none. It works
            on the likeliest token as well.
        stop: texts, any of which ends an answer and is not part of it.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


GREEDY = Sampling()


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_at_once: int = TOKENS_AT_ONCE,
    sampling: Sampling = GREEDY,
    positions: int | None = None,
    tell: Callable[[Mapping[int, str]], None] = lambda texts: None,
) -> list[str]:
    """Continue prompts until an end token.

    Args:
        model: a causal language model that `generate` works on.
        tokenizer: of the model.
        prompts: token ids, one sequence a row.
        max_new_tokens: most tokens to add to each.
        tokens_at_once: of all rows that are generated together, at most, unless a row alone has more; shorter prompts
            are padded on the left.
        sampling: how tokens are chosen. Draws depend on which rows are generated together.
        positions: that no row may exceed; None for no limit. Prompts that leave no room for `max_new_tokens` are
            continued alone, each as far as there is room; those that leave none are not.
        tell: is given the new texts of each batch as they come, by the numbers of their rows.

    Returns:
        The new text of each row, without special tokens.
    """
    texts: list[str] = [""] * len(prompts)
    with_room = (row for row, prompt in enumerate(prompts) if positions is None or len(prompt) < positions)
    by_length = sorted(with_room, key=lambda row: len(prompts[row]), reverse=True)
    with evaluation_mode(model), _drawing(sampling, model.device):
        while by_length:
            longest = len(prompts[by_length[0]])
            room = max_new_tokens if positions is None else min(max_new_tokens, positions - longest)
            most = 1 if room < max_new_tokens else max(1, tokens_at_once // (longest + room))
            rows, by_length = by_length[:most], by_length[most:]
            output = _generate(model, tokenizer, [prompts[row] for row in rows], room, sampling)
            new = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            told = {row: _before(text, sampling.stop) for row, text in zip(rows, new, strict=True)}
            for row, text in told.items():
                texts[row] = text
            tell(told)
    return texts


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    tell: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Continue one prompt, telling the text as it comes.

    Args:
        model: a causal language model that `generate` works on.
        tokenizer: of the model.
        prompt: token ids.
        max_new_tokens: most tokens to add.
        sampling: how tokens are chosen, its `stop` aside.
        tell: is given each new piece of text, of whole characters; together they are the answer.
        stopped: asked after every token; a true answer ends the generation with what there is.

    Returns:
        The answer, without special tokens.
    """
    streamer = _Streamer(tokenizer, tell)
    with evaluation_mode(model), _drawing(sampling, model.device):
        _generate(model, tokenizer, [prompt], max_new_tokens, sampling, streamer=streamer, ends=[_Asked(stopped)])
    return streamer.text


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Every token that ends an answer: the tokenizer's, its chat template's, and those of the model's generation
    config, ascending.

    Raises:
        ModelError: those of the generation config are no tokens of the model.
    """
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = known if isinstance(known, list) else [] if known is None else [known]
    tokens = model.config.get_text_config().vocab_size
    for token in listed:
        if type(token) is not int or not 0 <= token < tokens:
            raise ModelError(
                f"the base's generation_config.json, or its config.json, has {token!r:.40} for an eos_token_id, wanted "
                f"whole numbers from 0 to {tokens - 1}; correct it there"
            )
    own = [] if tokenizer is None else [tokenizer.eos_token_id, end_token_id(tokenizer)]
    return sorted({*listed, *(token for token in own if token is not None)})


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: "_Streamer | None" = None,
    ends: Sequence[StoppingCriteria] = (),
) -> Tensor:
    """Prompts, padded on the left, and what follows them, (rows, tokens)."""
    config = _generation_config(model, tokenizer, max_new_tokens, sampling)
    ids, mask = _pad_left(prompts, config.pad_token_id, model.device)
    stops = [_StopTexts(tokenizer, sampling.stop, ids.shape[1])] if sampling.stop else []
    with _without_its_config(model):
        output: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer,
            stopping_criteria=[*stops, *ends],
        )  # fmt: skip
    return output


@contextmanager
def _without_its_config(model: PreTrainedModel) -> Iterator[None]:
    """A block in which a model has no generation config of its own: from it transformers takes whatever is not said,
    and of its hundred settings, which come with a base's files, some ask for other methods and some for no end."""
    its = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = its


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, sampling: Sampling
) -> GenerationConfig:
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        }
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        repetition_penalty=sampling.repetition_penalty,
        **drawn,
    )


def _pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@contextmanager
def _drawing(sampling: Sampling, device: torch.device) -> Iterator[None]:
    """A block whose random numbers are those of the seed, and after which all is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=sampling.temperature > 0):
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
        yield


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class _StopTexts(StoppingCriteria):
    """Ends the rows whose new text has a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._stops, self._from = tokenizer, stops, prompt_tokens
        # Every token holds a byte at least, so a stop that the last token completed begins in as many.
        self._tail = max(len(stop.encode()) for stop in stops) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tail = input_ids[:, max(self._from, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class _Asked(StoppingCriteria):
    """Ends all rows when it is told to."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self._stopped(), device=input_ids.device)


class _Streamer(BaseStreamer):
    """Tells text in whole characters: a piece is what the tokens since the last one add to the piece before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] | None = None
        self._start = self._read = 0
        self.text = ""

    def put(self, value: Tensor) -> None:
        """A token; the prompt comes first, and is not told."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._add(is_end=False)

    def end(self) -> None:
        """No more tokens come."""
        self._add(is_end=True)

    def _add(self, is_end: bool) -> None:
        ids = self._ids or []
        before, after = (self._decoded(ids[self._start : end]) for end in (self._read, len(ids)))
        if len(after) <= len(before) or (after.endswith(UNFINISHED) and not is_end):
            return
        self._start, self._read = self._read, len(ids)
        self.text += after[len(before) :]
        self._tell(after[len(before) :])

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
