"""Data: from files to batches, and every row on the way accounted for.

load_rows  ->  split_eval  ->  encode_rows  ->  Sampler, arrange, collate_packs
(files)        (held out)      (token ids)      (batches)
"""

from qlora_kit.data.classes import Classes, classes_of
from qlora_kit.data.collate import (
    Batch,
    Sampler,
    collate,
    collate_packs,
    collate_pairs,
    collate_rows,
    collate_texts,
    swap_answers,
)
from qlora_kit.data.encode import Counts, EncodedSet, check_lengths, encode_rows
from qlora_kit.data.faults import Faults
from qlora_kit.data.formats import (
    FORMATS,
    Chat,
    Classified,
    Completion,
    Example,
    Labelled,
    Preference,
    Text,
    formats_of,
    read_row,
)
from qlora_kit.data.load import Source, load_rows, split_eval
from qlora_kit.data.pack import arrange, best_fit, efficiency, full_packs, longest_pack
from qlora_kit.data.template import Encoded, check_turn_tokens, encode, find_template

__all__ = [
    "FORMATS",
    "Batch",
    "Chat",
    "Classes",
    "Classified",
    "Completion",
    "Counts",
    "Encoded",
    "EncodedSet",
    "Example",
    "Faults",
    "Labelled",
    "Preference",
    "Sampler",
    "Source",
    "Text",
    "arrange",
    "best_fit",
    "check_lengths",
    "check_turn_tokens",
    "classes_of",
    "collate",
    "collate_packs",
    "collate_pairs",
    "collate_rows",
    "collate_texts",
    "efficiency",
    "encode",
    "encode_rows",
    "find_template",
    "formats_of",
    "full_packs",
    "load_rows",
    "longest_pack",
    "read_row",
    "split_eval",
    "swap_answers",
]
