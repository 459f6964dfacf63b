"""Claims about crews: they do what one process does, in order, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from itertools import count, islice

import psutil
import pytest
from chat_templates import FAMILIES, tokenizer_of

from qlora_kit import crew
from qlora_kit.crew import each_done
from qlora_kit.data import encode_rows, read_row
from qlora_kit.data.encoded_set import EncodedSet

WHO = "__import__('os').getpid()"
"""What `eval` makes of it says which process did."""


class Unsent(int):
    """Raises what the library beneath fast tokenizers raises of a part that is written in Python."""

    def __reduce__(self):
        raise Exception("Custom PreTokenizer cannot be serialized")


@pytest.fixture
def eager(monkeypatch):
    """Two workers are begun at once, and waited for: the first two items alone are done here."""
    monkeypatch.setattr(crew, "PATIENCE_S", -1.0)
    monkeypatch.setattr(crew, "CHUNK", 3)
    monkeypatch.setattr(crew._Worker, "has_begun", True)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)


def test_items_are_done_by_workers_in_order_and_a_caller_that_stops_leaves_none_behind(eager):
    with closing(each_done(eval, (f"{n}, {WHO}" for n in count()))) as done:
        found = [made for _, made in islice(done, 40)]
    assert [n for n, _ in found] == list(range(40))
    others = {pid for _, pid in found[3:]}
    assert os.getpid() not in others
    assert len(others) == 2
    assert not any(map(psutil.pid_exists, others))


def test_what_workers_fail_at_and_what_cannot_be_sent_is_done_here(eager):
    items = [f"{n} if {WHO} == {os.getpid()} else __import__('os')._exit(1)" for n in range(20)]
    assert [made for _, made in each_done(eval, items)] == list(range(20))
    assert list(each_done(lambda item: -item, range(20))) == [(n, -n) for n in range(20)]
    assert list(each_done(partial(max, Unsent()), range(20))) == [(n, n) for n in range(20)]


def test_a_worker_imports_nothing_from_the_folder_that_it_is_begun_in(eager, tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("open('seen', 'w'); from _pickle import *")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    made = [pid for _, pid in each_done(eval, [WHO] * 9)]
    assert os.getpid() not in made[3:]
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize("items", [0, 1, 2, 3])
def test_few_items_need_nobody(items, eager, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 1)
    assert list(each_done(abs, range(items))) == [(n, n) for n in range(items)]


def test_an_error_of_the_work_is_raised_as_it_is_here(eager):
    with pytest.raises(ZeroDivisionError):
        list(each_done(eval, ["1"] * 9 + ["1 / 0"]))


def test_no_worker_outlives_a_process_that_is_killed():
    program = (
        "import itertools, os, psutil, time; from qlora_kit import crew; crew.PATIENCE_S = -1; "
        "psutil.cpu_count = lambda: 2; crew._Worker.has_begun = True\n"
        "for item, _ in crew.each_done(abs, itertools.count()):\n"
        "    if item == 99: print(*(p.pid for p in psutil.Process().children()), flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(psutil.pid_exists, workers))
    run.send_signal(signal.SIGKILL)
    run.wait()
    until = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_set_is_encoded_by_a_crew_as_by_one_process_faults_and_counts_included(eager, monkeypatch):
    answers = [f"There, {n} times. " * (1 + n % 9) for n in range(40)]
    chats = [[{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}] for answer in answers]
    examples = [read_row({"messages": chat}, where=f"chats.jsonl:{n}") for n, chat in enumerate(chats, 1)]
    tokenizer, sets = tokenizer_of(FAMILIES["llama3"]), []
    for patience in (1e9, -1.0):
        monkeypatch.setattr(crew, "PATIENCE_S", patience)
        sets.append(encode_rows(examples, tokenizer, max_tokens=150, over_length="error", onto=EncodedSet()))
    alone, together = sets
    assert together.rows == alone.rows
    assert together.faults.shown == alone.faults.shown
    assert (together.counts, together.fingerprint) == (alone.counts, alone.fingerprint)
    assert (together.places, together.lengths_given) == (alone.places, alone.lengths_given)
    assert 0 < alone.faults.count < len(examples)
