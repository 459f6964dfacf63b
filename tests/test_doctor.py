"""Claims about the doctor: it tries things for real, tells what failed, never crashes and never shows a secret."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from huggingface_hub import constants
from local_hub import Handler, serving

from qlora_kit.base import formats, quantizer
from qlora_kit.base.device import default_compute_dtype
from qlora_kit.cli import devices, doctor
from qlora_kit.cli.check import attempt
from qlora_kit.cli.doctor import Check, checks, run_doctor


@pytest.fixture(scope="module")
def results():
    """One true round of all checks, by name."""
    return {check.name: check for check in checks()}


def only(name, found):
    """The check of that name among `found`."""
    return next(check for check in found if check.name == name)


def test_nothing_fails_on_a_machine_that_runs_these_tests(results):
    assert [check for check in results.values() if check.ok is False] == []
    assert {"Python", "torch", "bitsandbytes", "processor", "CUDA", "nf4 decode, cpu", "hub cache"} <= set(results)
    assert results["nf4 decode, cpu"].ok
    assert results["8-bit step, cpu"].ok
    assert all(check.advice == "" for check in results.values())


def test_the_processors_line_names_the_dtype_that_auto_takes(results):
    dtype = str(default_compute_dtype(torch.device("cpu"))).removeprefix("torch.")
    assert results["processor"].found.endswith(f"compute_dtype auto is {dtype}")


@pytest.mark.parametrize(
    ("functions", "ok", "said"), [(object(), True, "available, for a CPU"), (None, None, "none, plain torch")]
)
def test_it_is_told_whether_there_is_compiled_code(functions, ok, said, monkeypatch):
    monkeypatch.setattr(quantizer, "c_functions", lambda: functions)
    found = only("compiled code", checks())
    assert found.ok is ok
    assert found.found.startswith(said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_gpu_is_tried(results):
    for index in range(torch.cuda.device_count()):
        for name in (f"cuda:{index}", f"nf4 decode, cuda:{index}", f"paged 8-bit step, cuda:{index}"):
            assert results[name].ok


def test_json_is_one_object_with_the_checks(results, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "checks", lambda: list(results.values()))
    assert run_doctor(as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["ok"]) == (1, True)
    assert [check["name"] for check in told["checks"]] == list(results)
    assert set(told["checks"][0]) == {"name", "ok", "found", "advice"}


def test_only_a_failure_makes_the_exit_code_2_and_the_table_shows_its_advice(monkeypatch, capsys):
    absent, failed = Check("CUDA", None, "no driver", ""), Check("disk", False, "full [5]", "make room")
    monkeypatch.setattr(doctor, "checks", lambda: [absent])
    assert run_doctor(as_json=False) == 0
    monkeypatch.setattr(doctor, "checks", lambda: [absent, failed])
    capsys.readouterr()
    assert run_doctor(as_json=True) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert run_doctor(as_json=False) == 2
    table = capsys.readouterr().out
    assert "full [5]" in table
    assert "make room" in table
    assert "1 check failed" in table


@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_a_decoder_that_is_wrong_in_one_weight_is_noticed(monkeypatch, wrong):
    decode = formats.decode_4bit

    def decode_wrongly(*arguments):
        weight = decode(*arguments)
        weight[3, 5] += wrong
        return weight

    monkeypatch.setattr(formats, "decode_4bit", decode_wrongly)
    check = only("nf4 decode, cpu", devices.device_checks("cpu"))
    assert check.ok is False
    assert "off by" in check.found
    assert check.advice


def test_an_optimizer_that_does_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", lambda self: None)
    check = only("8-bit step, cpu", devices.device_checks("cpu"))
    assert check.ok is False
    assert "off by 0.001" in check.found


def test_the_step_is_large_enough_for_its_state_to_be_paged_on_a_gpu(monkeypatch):
    asked, make = [], Optimizer8bit.get_state_buffer
    noted = lambda self, weight, **how: asked.append(weight) or make(self, weight, **how)  # noqa: E731
    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", noted)
    assert only("8-bit step, cpu", devices.device_checks("cpu")).ok
    assert asked
    assert all(weight.numel() >= 1e5 for weight in asked), "bitsandbytes pages no smaller state (0.50)"


@pytest.mark.parametrize(("capability", "ok"), [((6, 1), False), ((7, 5), True), ((8, 9), True), ((12, 1), True)])
def test_a_card_that_torch_has_no_code_for_is_a_failure_that_names_both(capability, ok, monkeypatch):
    for name, answer in {
        "get_arch_list": ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"],
        "get_device_capability": capability,
        "get_device_name": "NVIDIA Something",
        "mem_get_info": (1, 2),
        "is_bf16_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    check = only("cuda:0", devices.device_checks("cuda:0"))
    assert check.ok is ok
    assert ("capability 6.1, and torch" in check.found and "for 7.5 and newer" in check.found) != ok


@pytest.mark.parametrize("serves", [True, False])
def test_kernels_of_a_gpu_are_found_or_are_no_failure(serves, monkeypatch):
    monkeypatch.setattr("qlora_kit.ops.triton.serves", lambda device: serves)
    check = only("Triton kernels, cuda:0", devices.device_checks("cuda:0"))
    assert check.ok is (True if serves else None)
    assert ("plain torch instead" in check.found) != serves


def test_a_version_outside_the_range_of_the_metadata_fails(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=2.11", "safetensors>=99", "peft; extra == 'x'"])
    assert "(>=2.11)" in doctor._package("torch")
    with pytest.raises(RuntimeError, match="wanted >=99"):
        doctor._package("safetensors")


def test_a_package_that_is_not_there_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("qlora_kit_has_no_such_package",))
    monkeypatch.setattr(doctor, "devices", list)
    check = only("qlora_kit_has_no_such_package", checks())
    assert check.ok is False
    assert "No module named" in check.found
    assert check.advice.startswith("pip install")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_driver_beside_a_cpu_build_of_torch_is_a_failure_that_names_both(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '| NVIDIA-SMI 570.1  Driver Version: 570.124.06  CUDA Version: 12.8 |'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match=r"driver 570\.124\.06 for CUDA up to 12\.8, but torch .* is a CPU build"):
        devices.cuda()


def test_a_cache_that_cannot_be_written_fails_and_one_to_be_made_does_not(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(OSError, match="file"):
        doctor._hub_cache()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "new" / "hub"))
    assert "free in" in doctor._hub_cache()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_token_is_found_but_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check = attempt("hub token", doctor._hub_token, "")
    assert check == Check("hub token", True, "found", "")


class Failing(Handler):
    """A hub, or what stands before it, that is out of order."""

    def do_HEAD(self) -> None:
        """Nothing but that."""
        self.send_response(503)
        self.end_headers()


def test_a_hub_that_answers_is_told_from_one_that_does_not_which_is_no_failure(monkeypatch):
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        assert attempt("hub access", doctor._hub_access, "") == Check("hub access", True, f"{hub.url} answers", "")
        assert hub.asked
        monkeypatch.setattr(hub, "RequestHandlerClass", Failing)
        check = attempt("hub access", doctor._hub_access, "")
        assert check.ok is None
        assert "status 503" in check.found
    check = attempt("hub access", doctor._hub_access, "")
    assert check.ok is None
    assert f"{hub.url} cannot be reached" in check.found


def test_offline_is_told_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = attempt("hub access", doctor._hub_access, "")
    assert check.ok is None
    assert "HF_HUB_OFFLINE is set" in check.found
