"""Data: from files to batches, and every row on the way accounted for.

load_rows  ->  split_eval  ->  encode_rows  ->  Sampler, arrange, collate_packs
(files)        (held out)      (token ids)      (batches)
"""

from qlora_kit.data.cache import cache_key, cached
from qlora_kit.data.chat_template import (
    FALLBACK,
    add_tokens,
    check_turn_tokens,
    end_token_id,
    find_template,
    fix_tokenizer,
    fixed_templates,
    template_tokens,
)
from qlora_kit.data.classes import Classes, classes_of
from qlora_kit.data.collate import (
    Batch,
    Deck,
    Sampler,
    as_stepped,
    collate,
    collate_packs,
    collate_pairs,
    collate_rows,
    collate_texts,
    swap_answers,
)
from qlora_kit.data.columns import ReadAs, formats_of, read_row
from qlora_kit.data.encode import check_lengths, encode_rows
from qlora_kit.data.encoded import Encoded
from qlora_kit.data.encoded_set import Counts, EncodedSet, Part
from qlora_kit.data.examples import Chat, Classified, Completion, Example, Labelled, Preference, Text, is_chat
from qlora_kit.data.faults import Faults
from qlora_kit.data.formats import FORMATS
from qlora_kit.data.information import bits_to_learn
from qlora_kit.data.load import Scan, held_out, load_rows, scan, split_eval
from qlora_kit.data.pack import (
    Packing,
    Room,
    arrange,
    best_fit,
    efficiency,
    full_packs,
    lay_out,
    longest_pack,
    side_by_side,
)
from qlora_kit.data.preview import Filling, Piece, Preview, count_classes, fill, measure_lengths, show_rows
from qlora_kit.data.prompts import Prompt, ask, content_of, read_prompts
from qlora_kit.data.remarks import Remark, remarks_on
from qlora_kit.data.sources import Reader, Source, open_sources
from qlora_kit.data.table import RowTable, lengths_of
from qlora_kit.data.template import encode, encode_turns
from qlora_kit.data.texts import Unlabelled, read_texts, unlabelled

__all__ = [
    "FALLBACK",
    "FORMATS",
    "Batch",
    "Chat",
    "Classes",
    "Classified",
    "Completion",
    "Counts",
    "Deck",
    "Encoded",
    "EncodedSet",
    "Example",
    "Faults",
    "Filling",
    "Labelled",
    "Packing",
    "Part",
    "Piece",
    "Preference",
    "Preview",
    "Prompt",
    "ReadAs",
    "Reader",
    "Remark",
    "Room",
    "RowTable",
    "Sampler",
    "Scan",
    "Source",
    "Text",
    "Unlabelled",
    "add_tokens",
    "arrange",
    "as_stepped",
    "ask",
    "best_fit",
    "bits_to_learn",
    "cache_key",
    "cached",
    "check_lengths",
    "check_turn_tokens",
    "classes_of",
    "collate",
    "collate_packs",
    "collate_pairs",
    "collate_rows",
    "collate_texts",
    "content_of",
    "count_classes",
    "efficiency",
    "encode",
    "encode_rows",
    "encode_turns",
    "end_token_id",
    "fill",
    "find_template",
    "fix_tokenizer",
    "fixed_templates",
    "formats_of",
    "full_packs",
    "held_out",
    "is_chat",
    "lay_out",
    "lengths_of",
    "load_rows",
    "longest_pack",
    "measure_lengths",
    "open_sources",
    "read_prompts",
    "read_row",
    "read_texts",
    "remarks_on",
    "scan",
    "show_rows",
    "side_by_side",
    "split_eval",
    "swap_answers",
    "template_tokens",
    "unlabelled",
]
