"""Folders on an object store: what is published is whole or not there, every node sees the same, and each fault has its sentence."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soul import object_store
from soul.models.hashes import RECORD, model_sha256, recorded_sha256
from soul.models.load import load_tokenizer, save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.object_store import find, make_filesystem, put_bytes, read_bytes
from soul.records import InputError
from soul.rundir import RunDir, write_atomically
from soul.store import (
    MARKER,
    attach,
    check_writable,
    checkout,
    discard,
    holds,
    is_uri,
    local,
    path_of,
    place_of,
    publish,
    pull,
    pull_file,
    push,
    skim,
)
from tests.s3 import Fault, Store

SHAPE = TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=300, max_length=32)
FILES = {"config.json": b"{}", "weights/a.bin": os.urandom(300_001), "empty": b"", "name with spaces": b"x"}


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This node's copies."""
    monkeypatch.setenv("SOUL_STORE_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(object_store, "PAUSES_S", (0.0, 0.0, 0.0))
    return tmp_path / "copies"


def test_a_file_that_is_gone_is_not_passed_over(bucket: str) -> None:
    """A checkpoint must not go to the store without the lines of its steps, which are pushed before it."""
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl is gone\. Leave"):
        push(path_of(f"{bucket}/run/metrics.jsonl"))


@pytest.fixture
def other_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setenv("SOUL_STORE_COPIES", str(tmp_path / "other-copies"))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != MARKER}


@pytest.mark.parametrize("uri", ["s3://bucket/run", "s3://bucket/a/b c/model", "gs://bucket/x"])
def test_a_uri_and_its_copy_name_each_other(uri: str, copies: Path) -> None:
    path = path_of(uri)
    assert path.is_relative_to(copies) and place_of(path) == uri == place_of(str(path)) == place_of(path_of(uri + "/"))
    assert place_of(path / "model" / ".." / ".." / ".cache" / "x") == f"{uri.rpartition('/')[0]}/.cache/x"


def test_two_endpoints_do_not_share_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    here = path_of("s3://bucket/run")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert path_of("s3://bucket/run") != here and place_of(path_of("s3://bucket/run")) == "s3://bucket/run"


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3:///run", "s3://bucket//run", "s3://bucket/../run"])
def test_a_uri_names_a_bucket_and_a_folder(uri: str) -> None:
    with pytest.raises(InputError, match="expected scheme://bucket/folder"):
        path_of(uri)


@pytest.mark.parametrize("uri", ["s3://key:password@bucket/run", "s3://bucket/run?endpoint_override=h&secret_key=password"])
def test_a_uri_holds_no_credentials(uri: str) -> None:
    with pytest.raises(InputError, match="Put them in the environment") as error:
        path_of(uri)
    assert "password" not in str(error.value)


def test_a_path_is_its_own_copy_and_nothing_happens_to_it(tmp_path: Path, copies: Path) -> None:
    folder = write(tmp_path / "run", FILES)
    for call in (push, publish, attach):
        call(folder)
    assert pull(folder) and holds(folder) and not pull(tmp_path / "none") and not holds(tmp_path / "none")
    assert (local(str(folder)), local("org/model"), local(f"file://{folder}")) == (str(folder), "org/model", str(folder))
    assert (place_of(folder), path_of(str(folder)), checkout(str(folder))) == (str(folder), folder, folder)
    check_writable(str(folder))
    assert read(folder) == FILES and not (folder / MARKER).exists() and not copies.exists()
    assert not is_uri("file:///x") and not is_uri("/x") and is_uri("s3://b/x")


def test_what_is_published_arrives_elsewhere_byte_for_byte_with_its_times(bucket: str, other_node: Callable[[], None]) -> None:
    uri = f"{bucket}/run/model"
    folder = write(path_of(uri), FILES)
    os.utime(folder / "config.json", ns=(10**18 + 7, 10**18 + 7))
    assert not holds(folder)
    publish(folder)
    assert holds(folder)
    other_node()
    there = Path(local(uri))
    assert there != folder and read(there) == FILES == read(folder)
    assert (there / "config.json").stat().st_mtime_ns == 10**18 + 7


def test_a_whole_copy_is_not_fetched_again(bucket: str, s3_store: Store, other_node: Callable[[], None]) -> None:
    uri = f"{bucket}/run/model"
    publish(write(path_of(uri), FILES))
    other_node()
    for _ in range(2):
        s3_store.requests.clear()
        local(uri)
    assert not [request for request in s3_store.requests if "a.bin" in request] and len(s3_store.requests) < 4


def requests_for(s3_store: Store, text: str) -> list[str]:
    return [request for request in s3_store.requests if text in request]


def test_a_model_is_named_and_looked_at_without_its_weights(bucket: str, s3_store: Store, other_node: Callable[[], None]) -> None:
    """What a driver does with a model that other nodes have made and will evaluate."""
    uri = f"{bucket}/run/model"
    tokenizer = tiny_tokenizer(["a b c"], 300)
    save_model(path_of(uri), tiny_model(SHAPE, tokenizer, seed=1), tokenizer)
    publish(path_of(uri))
    expected = model_sha256(path_of(uri))
    other_node()
    s3_store.requests.clear()
    folder = path_of(uri)
    assert skim(folder, without=".safetensors") and skim(folder, without=".safetensors")
    assert load_tokenizer(str(folder)).encode("a b") == tokenizer.encode("a b")
    assert recorded_sha256(folder) == expected
    assert not requests_for(s3_store, ".safetensors") and not list(folder.glob("*.safetensors"))
    assert pull(folder) and model_sha256(folder) == expected  # a folder that was skimmed is not taken for a whole one
    s3_store.requests.clear()
    assert skim(folder, without=".safetensors") and list(folder.glob("*.safetensors"))  # and a whole one stays whole
    assert not requests_for(s3_store, ".safetensors")


def test_a_model_that_was_put_there_again_has_a_hash_of_its_own(bucket: str, other_node: Callable[[], None]) -> None:
    """By a version without records, or by hand: the bytes are fetched and read."""
    uri = f"{bucket}/run/model"
    tokenizer = tiny_tokenizer(["a b c"], 300)
    save_model(path_of(uri), tiny_model(SHAPE, tokenizer, seed=1), tokenizer)
    publish(path_of(uri))
    before = recorded_sha256(path_of(uri))
    other_node()
    weights = Path(local(uri)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    (path_of(uri) / RECORD).unlink()
    publish(path_of(uri))
    other_node()
    found = recorded_sha256(path_of(uri))
    assert found != before and found == model_sha256(path_of(uri))


def test_what_is_discarded_is_gone_everywhere(bucket: str, tmp_path: Path) -> None:
    for folder in (path_of(f"{bucket}/run/checkpoints"), tmp_path / "checkpoints"):
        push(write(folder, FILES))
        discard(folder)
        assert not folder.exists() and not holds(folder)
        discard(folder)


def test_a_new_version_replaces_the_old_one_everywhere(bucket: str, copies: Path, other_node: Callable[[], None], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    uri = f"{bucket}/run/model"
    publish(write(path_of(uri), FILES))
    other_node()
    there = Path(local(uri))
    monkeypatch.setenv("SOUL_STORE_COPIES", str(copies))
    (path_of(uri) / "empty").unlink()
    publish(write(path_of(uri), {"config.json": b"[1]"}))
    other_node()
    local(uri)
    assert read(there) == {**{name: data for name, data in FILES.items() if name != "empty"}, "config.json": b"[1]"}
    assert "empty" not in (find(uri) or {})


@pytest.mark.parametrize("survivors", range(len(FILES) + 2))
def test_an_upload_that_broke_off_is_never_used(survivors: int, bucket: str, s3_store: Store, other_node: Callable[[], None]) -> None:
    """A first version is whole; the writer of the second one dies after so many objects."""
    uri = f"{bucket}/run/model"
    publish(write(path_of(uri), {"old": b"old"}))
    folder = write(path_of(uri), FILES)
    (folder / "old").unlink()
    left = [survivors]

    def die(request: str) -> Fault:
        left[0] -= request.startswith("PUT") and "old" not in request
        return 403 if left[0] < 0 else None

    with s3_store.failing(die), pytest.raises(OSError, match="permission denied"):
        publish(folder)
    other_node()
    if survivors == 0:  # not even begun: the first version stands
        assert read(Path(local(uri))) == {"old": b"old"}
        return
    assert not holds(path_of(uri)) and not pull(path_of(uri)) and not path_of(uri).exists()
    with pytest.raises(InputError, match="does not exist, or its upload broke off"):
        local(uri)
    publish(write(path_of(uri), FILES))
    assert read(Path(local(uri))) == FILES


def test_a_folder_that_others_uploaded_is_taken_as_it_is(bucket: str) -> None:
    for name, data in FILES.items():
        put_bytes(f"{bucket}/models/theirs/{name}", data)
    assert read(Path(local(f"{bucket}/models/theirs"))) == FILES
    put_bytes(f"{bucket}/models/theirs/config.json", b"[2]")
    assert read(Path(local(f"{bucket}/models/theirs")))["config.json"] == b"[2]"


@pytest.mark.parametrize("name", ["model", "file.npy"])
def test_what_is_not_there_is_told(name: str, bucket: str) -> None:
    for call in (local, checkout):
        with pytest.raises(InputError, match=f"{bucket}/run/{name} does not exist"):
            call(f"{bucket}/run/{name}")
    put_bytes(f"{bucket}/run/file.npy", b"7")
    assert Path(local(f"{bucket}/run/file.npy")).read_bytes() == b"7"


def test_a_file_that_is_written_atomically_is_in_the_store_too(bucket: str) -> None:
    run = RunDir.at(f"{bucket}/run")
    run.create()
    run.finish("train", "key", {"steps": 3})
    write_atomically(run.results, "{}")
    assert read_bytes(f"{run.place}/results.json") == b"{}"
    assert json.loads(read_bytes(f"{run.place}/.stages/train.json") or b"")["value"] == {"steps": 3}
    run.results.write_text("changed here only")
    assert pull_file(run.results) and run.results.read_text() == "{}"
    assert not pull_file(run.manifest)


def test_attaching_makes_the_copy_what_the_store_has(bucket: str) -> None:
    folder = path_of(f"{bucket}/run")
    small = {"config.json": b"1", ".stages/train.json": b"2", "logs/x.json": b"3"}
    push(write(folder, {**small, "model/w": b"4", "checkpoints/a/b": b"5"}))
    write(folder, {"results.json": b"of a run that was deleted", "config.json": b"changed"})
    (folder / "logs" / "x.json").unlink()
    (folder / "checkpoints" / "a" / "b").unlink()
    attach(folder)
    assert read(folder) == {**small, "model/w": b"4"}


def test_a_run_is_worked_on_by_one_process_of_a_machine(bucket: str) -> None:
    uri = f"{bucket}/run"
    folder = path_of(uri)
    push(write(folder, {"metrics.jsonl": b"1"}))
    attach(folder, keep=True)
    attach(folder, keep=True)  # our own
    write(folder, {"metrics.jsonl": b"1, and what is not yet in the store"})
    code = "import sys; from soul.store import attach, path_of; attach(path_of(sys.argv[1]), keep=sys.argv[2] == 'keep')"
    keeping, looking = (
        subprocess.run([sys.executable, "-c", code, uri, how], capture_output=True, text=True, check=False) for how in ("keep", "look")
    )
    assert keeping.returncode != 0 and f"another process of this machine is at work in {uri}" in keeping.stderr
    assert looking.returncode == 0 and read(folder) == {"metrics.jsonl": b"1, and what is not yet in the store"}


PASSING: dict[str, list[Fault]] = {
    "internal errors": [500, 500],
    "slow down": [503, 503],
    "a gateway's page": [502, 502],
    "request dropped": ["drop request", "drop request"],
    "answer dropped": ["drop answer"],
    "slow": [0.3, 0.3],
}


@pytest.mark.parametrize("case", PASSING)
def test_faults_that_pass_change_nothing(case: str, bucket: str, s3_store: Store, other_node: Callable[[], None]) -> None:
    uri = f"{bucket}/run/model"
    folder = write(path_of(uri), FILES)

    def once(method: str) -> Callable[[str], Fault]:
        faults = list(PASSING[case])
        return lambda request: faults.pop() if faults and request.startswith(method) and "a.bin" in request else None

    with s3_store.failing(once("PUT")):
        publish(folder)
        assert s3_store.faults
    other_node()
    with s3_store.failing(once("GET")):
        assert read(Path(local(uri))) == FILES
        assert s3_store.faults


LASTING: dict[str, tuple[Fault, str]] = {
    "denied": (403, "permission denied"),
    "full": (507, "the store is full or over its quota"),
    "broken": (500, "the store says error INTERNAL_FAILURE"),
}


@pytest.mark.parametrize("case", LASTING)
def test_an_output_that_cannot_be_written_is_told_at_once(case: str, bucket: str, s3_store: Store) -> None:
    fault, meaning = LASTING[case]
    with s3_store.failing(lambda request: fault), pytest.raises(InputError, match=f"{bucket}/run cannot be written: {meaning}"):
        check_writable(f"{bucket}/run")
    assert len(s3_store.faults) <= 3
    check_writable(f"{bucket}/run")
    assert (find(f"{bucket}/run") or {}) == {}


@pytest.mark.parametrize(("status", "says"), [(403, "permission denied"), (507, "full or over its quota")])
def test_a_file_that_the_store_does_not_take_is_told_and_its_folder_is_not_whole(
    status: int, says: str, bucket: str, s3_store: Store
) -> None:
    folder = write(path_of(f"{bucket}/folder"), FILES)
    fault = lambda request: status if request.startswith("PUT") and "a.bin" in request else None  # noqa: E731
    with s3_store.failing(fault), pytest.raises(OSError, match=says):
        publish(folder)
    assert not holds(folder) and "config.json" in (find(f"{bucket}/folder") or {})


def test_a_missing_bucket_is_told(s3_store: Store) -> None:
    with pytest.raises(InputError, match=r"s3://nosuchbucket/run cannot be written: there is no such bucket"):
        check_writable("s3://nosuchbucket/run")


def test_a_store_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the store does not answer\. Check the network and AWS_ENDPOINT_URL"):
        check_writable("s3://bucket/run")


def test_missing_credentials_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"no credentials\. Set AWS_ACCESS_KEY_ID"):
        check_writable("s3://bucket/run")


def test_a_filesystem_travels_without_credentials_and_keeps_its_patience(bucket: str, s3_store: Store) -> None:
    filesystem = make_filesystem(f"{bucket}/x")
    sent = pickle.dumps(filesystem)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in sent and os.environ["AWS_ACCESS_KEY_ID"].encode() not in sent
    faults = [503] * 3
    with s3_store.failing(lambda request: faults.pop() if faults else None):  # pyarrow's own gives up after three
        stream = pickle.loads(sent).open_output_stream(f"{bucket.removeprefix('s3://')}/x")
        stream.write(b"8")
        stream.close()
    assert read_bytes(f"{bucket}/x") == b"8"
