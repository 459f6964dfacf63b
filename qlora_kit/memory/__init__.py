"""What memory holds: the ledger of live tensors, and the process's or the card's own counter beside it."""

from qlora_kit.memory.counter import PeakCounter
from qlora_kit.memory.history import History, whole
from qlora_kit.memory.host import from_host, to_host
from qlora_kit.memory.ledger import CATEGORIES, PHASES, Ledger
from qlora_kit.memory.limit import Limit

__all__ = [
    "CATEGORIES",
    "PHASES",
    "History",
    "Ledger",
    "Limit",
    "PeakCounter",
    "from_host",
    "to_host",
    "whole",
]
