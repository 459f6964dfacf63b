"""Claims about reading model folders and fetching them: everything unsafe or damaged is refused in words that help."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from local_hub import COMMIT, Handler, files_of, serving
from safetensors.torch import load_file, save_file

from qlora_kit.base.files import check_model_folder, weight_files
from qlora_kit.base.header import read_header
from qlora_kit.base.hub import locate_model
from qlora_kit.errors import ModelError
from qlora_kit.units import GIB

CONFIG = {"model_type": "llama", "hidden_size": 8}
INDEX = "model.safetensors.index.json"


# --- folders ---


@pytest.fixture
def folder(tmp_path):
    """A sound model folder with one file of weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "none": torch.empty(0)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(folder):
    """The same in two shards and an index."""
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(5)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3, 7)}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def refusal(folder, **options):
    """The message with which a folder is refused."""
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder, **options)
    return str(caught.value)


def test_a_sound_folder_passes_and_is_returned_as_it_is(folder, sharded):
    check_model_folder(folder)
    assert locate_model(str(folder)) == folder
    assert [path.name[:11] for path in weight_files(sharded)] == ["model-00001", "model-00002"]


def test_a_header_says_where_each_tensor_lies(folder):
    path = folder / "model.safetensors"
    raw, header = path.read_bytes(), read_header(path)
    expected = load_file(path)
    assert set(header) == set(expected)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    for name in ("a", "b"):
        entry = header[name]
        stored = torch.frombuffer(bytearray(raw[entry.begin : entry.end]), dtype=dtypes[entry.dtype])
        assert torch.equal(stored.view(entry.shape), expected[name])
    assert list(header.values()) == sorted(header.values(), key=lambda entry: entry.begin)


def test_a_relative_name_is_a_folder_and_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        locate_model("./nothing/here")


def test_a_file_in_place_of_a_folder_is_named_as_one(folder):
    with pytest.raises(ModelError, match=r"is a file: give the folder"):
        locate_model(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("config", "said"),
    [("{", "cannot be read"), ("[]", "expected a JSON object"), ("{}", "no model_type"), ("[" * 10**5, "recursion")],
)
def test_a_damaged_config_is_named_by_its_path(folder, config, said):
    (folder / "config.json").write_text(config)
    message = refusal(folder, weights=False)
    assert str(folder / "config.json") in message
    assert said in message


@pytest.mark.parametrize("config", ["{", "[]", "null"])
def test_a_damaged_generation_config_is_named_by_its_path(folder, config):
    check_model_folder(folder)
    (folder / "generation_config.json").write_text(config)
    assert str(folder / "generation_config.json") in refusal(folder)


def test_an_adapter_given_as_a_base_is_told_apart(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "is an adapter" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert name in message
    assert "safe_serialization=True" in message
    check_model_folder(folder, weights=False)


def test_pickles_beside_safetensors_are_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    check_model_folder(folder)


def test_no_weights_and_no_config_are_both_told(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    (folder / "config.json").unlink()
    message = refusal(folder)
    assert "2 faults" in message
    assert "no config.json" in message
    assert "has no weights" in message


def test_every_fault_of_the_weights_is_told_at_once(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))
    whole = second.stat().st_size
    os.truncate(second, whole - 1)
    first.unlink()
    message = refusal(sharded)
    assert f"{first} is missing" in message
    assert f"{second} is cut short: expected {whole} bytes, found {whole - 1}" in message
    assert len(message.splitlines()) == 3


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_told(sharded):
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "lost": "model-00001-of-00002.safetensors"})
    assert "lacks 1 tensors" in refusal(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_named_by_its_path(sharded, content):
    (sharded / INDEX).write_text(content)
    assert str(sharded / INDEX) in refusal(sharded)


@pytest.mark.parametrize("entry", ["../evil.safetensors", "ABSOLUTE", "sub/../../evil", "", "a\0b", "..\\x"])
def test_an_index_cannot_lead_out_of_the_folder(sharded, tmp_path, entry):
    save_file({"a": torch.ones(2)}, tmp_path / "evil.safetensors")
    entry = entry.replace("ABSOLUTE", str(tmp_path / "evil.safetensors"))
    write_index(sharded, {"a": entry})
    message = refusal(sharded)
    assert "leads out of the model folder" in message
    assert "'a'" in message
    with pytest.raises(ModelError, match="leads out"):
        weight_files(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_cannot_lead_out_of_the_folder(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    assert f"{folder / name} links to" in refusal(folder)


def test_a_link_within_the_folder_passes(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    check_model_folder(folder)


def test_only_the_hubs_cache_may_keep_files_beside_a_snapshot(folder, tmp_path):
    for repository, is_cache in (("models--o--m", True), ("plain", False)):
        snapshot = tmp_path / repository / "snapshots" / "abc"
        shutil.copytree(folder, snapshot)
        blob = tmp_path / repository / "blobs" / "1234"
        blob.parent.mkdir()
        (snapshot / "model.safetensors").rename(blob)
        (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
        if is_cache:
            check_model_folder(snapshot)
        else:
            assert "links to" in refusal(snapshot)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "is not a file" in refusal(folder)


# --- headers ---

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

DAMAGED = {
    "zero bytes": (b"", "has 0 bytes"),
    "giant header": ((10**9).to_bytes(8, "little") + b"{}", "announces a header of 1000000000 bytes"),
    "header cut short": ((50).to_bytes(8, "little") + b"{}", "expected more than 58 bytes, found 10"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not JSON": (b"{'a", "JSON cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', "JSON cannot be read"),
    "not an object": ([1], "expected a JSON object"),
    "nested deeply": (b'{"a":' + b"[" * 10**5, "recursion"),
    "data cut short": ({"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, "found"),
    "data too long": ({"a": {**F32, "shape": [1], "data_offsets": [0, 4]}}, "continues after its last tensor"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [0, 8]}}, "overlaps"),
    "gap": ({"a": {**F32, "shape": [1], "data_offsets": [4, 8]}}, "leaves a gap"),
    "unknown dtype": ({"a": {**F32, "dtype": "F7"}}, "does not allow"),
    "negative length": ({"a": {**F32, "shape": [-1, -2]}}, "does not allow"),
    "negative offset": ({"a": {**F32, "data_offsets": [-8, 0]}}, "does not allow"),
    "shape of another size": ({"a": {**F32, "shape": [3]}}, "takes 12 bytes, the header gives it 8"),
    "size beyond 64 bits": ({"a": {**F32, "shape": [2**62, 2**62]}}, "takes"),
    "not a description": ({"a": 7}, "does not allow"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_by_name(folder, case):
    content, said = DAMAGED[case]
    path = folder / "model.safetensors"
    if case in ("zero bytes", "giant header", "header cut short", "pointer of Git LFS"):
        path.write_bytes(content)
    else:
        write_raw(path, content, bytes(8))
    message = refusal(folder)
    assert str(path) in message
    assert said in message


def test_any_cut_of_a_sound_file_is_noticed(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_header(path)
    path.write_bytes(whole)
    assert read_header(path)


# --- the hub ---


@pytest.fixture
def hub(tmp_path, folder, monkeypatch):
    """A running fake hub with one sound model in its top folder, and things beside it that nobody wants."""
    files = files_of(folder) | {
        "tokenizer.model": b"spm",
        "chat_template.jinja": b"{{ messages }}",
        "merges.txt": b"a b",
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"import os",
        "consolidated.safetensors": b"again",
        "original/params.json": b"{}",
        "original/model.safetensors": b"again",
    }
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as server:
        server.repositories["models/owner/model"] = files
        point_at(server.url, monkeypatch)
        yield server


def point_at(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def hub_refusal(model, revision=None):
    with pytest.raises(ModelError) as caught:
        locate_model(model, revision)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


WANTED = {
    "config.json", "tokenizer.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt",
}  # fmt: skip


def test_a_hub_model_is_fetched_once_with_news_and_then_found_with_the_hub_gone(hub, folder, monkeypatch):
    news = []
    found = locate_model("owner/model", notify=news.append)
    assert {path.name for path in found.iterdir()} == WANTED
    assert sorted(hub.fetched) == sorted(WANTED)
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "6 of 6 files to download" in news[0]
    assert constants.HF_HUB_CACHE in news[0]
    assert "free" in news[0]

    assert locate_model("owner/model", notify=news.append) == found
    assert "all 6 files are in the cache" in news[1]

    point_at("http://127.0.0.1:9", monkeypatch)
    assert locate_model("owner/model", notify=news.append) == found
    assert "cannot be reached" in news[2]
    assert str(found) in news[2]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_model("owner/model", notify=news.append) == found
    assert "HF_HUB_OFFLINE is set" in news[3]
    assert len(hub.fetched) == len(WANTED)
    assert len(news) == 4


def test_a_plan_fetches_no_weights_and_a_later_run_fetches_only_them(hub, monkeypatch):
    found = locate_model("owner/model", weights=False)
    assert "model.safetensors" not in hub.fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_model("owner/model", weights=False) == found
    assert "HF_HUB_OFFLINE is set" in hub_refusal("owner/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fetched.clear()
    news = []
    locate_model("owner/model", notify=news.append)
    assert hub.fetched == ["model.safetensors"]
    assert "1 of 6 files" in news[0]


def test_a_models_own_code_is_fetched_only_if_it_may_run(hub):
    locate_model("owner/model")
    assert "modeling_evil.py" not in hub.fetched
    found = locate_model("owner/model", code=True)
    assert (found / "modeling_evil.py").read_bytes() == b"import os"


def test_a_new_commit_fetches_only_what_changed(hub):
    locate_model("owner/model")
    hub.fetched.clear()
    hub.repositories["models/owner/model"]["merges.txt"] = b"a c"
    hub.commit = COMMIT[::-1]
    news = []
    assert locate_model("owner/model", notify=news.append).name == hub.commit
    assert hub.fetched == ["merges.txt"]
    assert "1 of 6 files to download, 3 B," in news[0]


def test_shards_are_fetched_with_their_index_and_a_second_set_is_not(hub, sharded):
    hub.repositories["models/owner/model"] = files_of(sharded) | {"consolidated.safetensors": b"again"}
    found = locate_model("owner/model")
    assert [path.name[:11] for path in weight_files(found)] == ["model-00001", "model-00002"]
    assert "consolidated.safetensors" not in hub.fetched


def test_a_download_that_does_not_fit_the_disk_is_refused_before_it_begins(hub, monkeypatch):
    hub.sizes["model.safetensors"] = 7 * GIB
    usage = namedtuple("usage", "total used free")(9 * GIB, 4 * GIB, 5 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = hub_refusal("owner/model")
    assert "needs 7.00 GiB" in message
    assert "5.00 GiB free" in message
    assert constants.HF_HUB_CACHE in message
    assert hub.fetched == []


def test_a_repository_of_pickles_is_refused_before_a_download(hub):
    hub.repositories["models/owner/model"] = {"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"pickle"}
    assert "safe_serialization" in hub_refusal("owner/model")
    assert hub.fetched == []


@pytest.mark.parametrize("lists_its_files", [True, False])
def test_a_gated_model_is_answered_with_its_page_and_the_login(hub, lists_its_files):
    hub.gated.add("owner/gated")
    hub.repositories["models/owner/gated"] = hub.repositories["models/owner/model"]
    if not lists_its_files:
        hub.refusals["owner/gated"] = (401, "GatedRepo")
    message = hub_refusal("owner/gated")
    assert "it is gated" in message
    assert f"{hub.url}/owner/gated" in message
    assert "`hf auth login`" in message


def test_an_unknown_id_is_answered_with_the_nearest_one_of_the_cache(hub):
    locate_model("owner/model")
    message = hub_refusal("owner/modell")
    assert "no such model" in message
    assert "in the cache: owner/model" in message
    assert "`hf auth login` if it is private" in message


def test_an_unknown_revision_is_named(hub):
    assert "no revision 'v9'" in hub_refusal("owner/model", "v9")


@pytest.mark.parametrize("model", ["", "a b", "a/b/c", "owner/na--me", "runs/x:y"])
def test_an_impossible_id_is_refused_without_asking_the_hub(hub, model):
    assert "neither a folder here nor a hub id" in hub_refusal(model)


@pytest.mark.parametrize(
    ("status", "said"), [(429, "`hf auth login` for a higher limit"), (503, "(HTTP 503)"), (403, "valid")]
)
def test_other_refusals_of_the_hub_say_what_to_do(hub, status, said):
    hub.refusals["owner/model"] = (status, None)
    assert said in hub_refusal("owner/model")


def test_offline_and_without_network_name_the_download_for_another_machine(hub, monkeypatch):
    point_at("http://127.0.0.1:9", monkeypatch)
    message = hub_refusal("owner/model")
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert "`hf download owner/model`" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = hub_refusal("owner/model")
    assert "`unset HF_HUB_OFFLINE" in message
    assert "`hf download owner/model`" in message


def test_a_page_in_place_of_the_hub_is_told_apart_from_it(hub, monkeypatch):
    monkeypatch.setattr(Handler, "answer_api", lambda self, path: self.send(b"<html>log in</html>"))
    assert "does not answer like a hub" in hub_refusal("owner/model")


def test_a_disk_that_fills_during_the_download_is_named(hub, monkeypatch):
    def fill(*_, local_files_only=False, **__):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing is cached")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    message = hub_refusal("owner/model")
    assert "No space left on device" in message
    assert "HF_HOME" in message
