"""One run from end to end, a function an arrow:

    recipe -> prepare (files, tokenizer, rows) -> plan -> load and adapt -> train -> score -> report

and what a finished run is used for. What a person sees goes through `Watch`; what stays goes into the run folder.
"""

from qlora_kit.run.ask import Speaker, answer, load_speaker
from qlora_kit.run.classify import classify
from qlora_kit.run.export import Asked, compare_exports, export_run
from qlora_kit.run.pick_rate import PickedRate, Tried, pick_rate
from qlora_kit.run.plan import check_budget, plan_memory
from qlora_kit.run.prepare import Prepared
from qlora_kit.run.preview import preview
from qlora_kit.run.sweep import Outcome, sweep
from qlora_kit.run.talk import Conversation
from qlora_kit.run.train import Result, train
from qlora_kit.run.use import evaluate, load_run
from qlora_kit.run.verify import Verified, verify, verify_resume

__all__ = [
    "Asked",
    "Conversation",
    "Outcome",
    "PickedRate",
    "Prepared",
    "Result",
    "Speaker",
    "Tried",
    "Verified",
    "answer",
    "check_budget",
    "classify",
    "compare_exports",
    "evaluate",
    "export_run",
    "load_run",
    "load_speaker",
    "pick_rate",
    "plan_memory",
    "preview",
    "sweep",
    "train",
    "verify",
    "verify_resume",
]
