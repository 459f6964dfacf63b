"""Data: from files to batches, and every row on the way accounted for.

load_rows  ->  split_eval  ->  encode_rows  ->  Sampler, arrange, collate_packs
(files)        (held out)      (token ids)      (batches)
"""

from qlora_kit.data.collate import Batch, Sampler, collate, collate_packs, collate_texts
from qlora_kit.data.encode import Counts, EncodedSet, check_lengths, encode_rows
from qlora_kit.data.faults import Faults
from qlora_kit.data.formats import FORMATS, Chat, Completion, Example, Text, read_row
from qlora_kit.data.load import Source, load_rows, split_eval
from qlora_kit.data.pack import arrange, best_fit, efficiency, full_packs, longest_pack
from qlora_kit.data.prompts import Prompt, ask, read_prompts
from qlora_kit.data.template import Encoded, check_turn_tokens, encode, find_template

__all__ = [
    "FORMATS",
    "Batch",
    "Chat",
    "Completion",
    "Counts",
    "Encoded",
    "EncodedSet",
    "Example",
    "Faults",
    "Prompt",
    "Sampler",
    "Source",
    "Text",
    "arrange",
    "ask",
    "best_fit",
    "check_lengths",
    "check_turn_tokens",
    "collate",
    "collate_packs",
    "collate_texts",
    "efficiency",
    "encode",
    "encode_rows",
    "find_template",
    "full_packs",
    "load_rows",
    "longest_pack",
    "read_prompts",
    "read_row",
    "split_eval",
]
