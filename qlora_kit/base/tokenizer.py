"""Reading the tokenizer of a folder that nobody has vouched for."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_kit.base.files import has_tokenizer, text_faults
from qlora_kit.errors import ModelError

_MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
"""What transformers raises over files that describe no tokenizer."""


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model or adapter; None where its folder has none.

    Args:
        folder: with tokenizer.json or the like.
        trust_remote_code: run code that the folder brings. Where this is left to transformers, it asks on the terminal.

    Raises:
        ModelError: it cannot be read, needs code that may not run, or a file of it lies elsewhere.
    """
    if not has_tokenizer(folder):
        return None
    for fault in text_faults(folder):
        raise ModelError(fault)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Where tokenizer.json is JSON and still no tokenizer, such as one of a newer version, the library that reads it
        # raises an `Exception` and none of its kinds.
        if type(error) is not Exception and not isinstance(error, _MALFORMED):
            raise
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"{folder} has no tokenizer that can be read: {why}") from error
    held = tokenizer.chat_template
    sources = held.values() if isinstance(held, dict) else () if held is None else (held,)
    if not all(isinstance(source, str) for source in sources):
        raise ModelError(f"{folder} has a tokenizer whose chat_template is no text; mend it, or take it out")
    return tokenizer
