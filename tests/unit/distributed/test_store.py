import errno
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="pip install 'owl-deploy[ray]'")

from owl_deploy.distributed.cluster.store import File, Store, contents_of
from owl_deploy.errors import BadInput, EnvironmentFailed


@pytest.fixture(params=["memory", "file"])
def store(request, store, tmp_path):
    return store if request.param == "memory" else Store(f"file://{tmp_path}/store/")


@pytest.fixture
def made(tmp_path):
    """A folder with two files."""
    folder = tmp_path / "made"
    (folder / "in").mkdir(parents=True)
    (folder / "one").write_text("owl")
    (folder / "in" / "two").write_bytes(b"\0\1")
    return folder


def publish(store, made, name="checkpoints/a", **asked):
    files = [path for path in made.rglob("*") if path.is_file()]
    contents = contents_of(made, files)
    return store.publish(name, made, contents, is_folder=True, digest="d", asked=asked)


def fetch(store, file, path):
    store.fetch(file, path, "Do this.")


def test_an_artefact_comes_back_as_it_was(store, made, tmp_path):
    assert store.stored("checkpoints/a") is None
    stored = publish(store, made, sparsity=0.5)
    assert store.stored("checkpoints/a") == stored
    assert (stored.digest, stored.asked) == ("d", {"sparsity": 0.5})
    assert sorted(stored.files) == ["in/two", "one"]
    for name, file in stored.files.items():
        assert file.key == f"checkpoints/a/{stored.version}/{name}"
        fetch(store, file, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == (made / name).read_bytes()
    assert list(tmp_path.glob(".fetched*")) == []


def test_objects_are_read_written_listed_and_removed(store):
    assert store.read("logs/a") is None
    assert store.sizes("logs") == {}
    store.remove("logs/a")
    store.write("logs/a", "one")
    store.write("logs/a", "ün")
    assert store.read("logs/a") == "ün"
    assert store.sizes("logs") == {"logs/a": 3}
    store.remove("logs/a", "logs/b")
    assert store.read("logs/a") is None


def test_what_has_no_marker_is_not_there(store, made, monkeypatch):
    def killed(self, key, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(store, made)
    assert len(store.sizes("checkpoints/a")) == 2  # all but the marker
    assert store.stored("checkpoints/a") is None
    published = publish(store, made)
    assert store.stored("checkpoints/a") == published


def test_of_two_writers_the_first_stays(store, made, tmp_path):
    first = publish(store, made, sparsity=0.5)
    (made / "one").write_text("another time")  # as seconds in a manifest differ
    assert publish(store, made, sparsity=0.5) == first
    fetch(store, first.files["one"], tmp_path / "one")
    assert (tmp_path / "one").read_text() == "owl"


def test_both_at_once_are_whole_whoever_is_last(store, made, tmp_path, monkeypatch):
    stored, write = Store.stored, Store.write
    other = tmp_path / "other"
    other.mkdir()
    (other / "one").write_text("the other's")

    def meanwhile(self, key, text):
        monkeypatch.setattr(Store, "write", write)
        monkeypatch.setattr(Store, "stored", lambda *_: None)  # it looked before there was one
        publish(store, other)
        monkeypatch.setattr(Store, "stored", stored)
        write(self, key, text)

    monkeypatch.setattr(Store, "write", meanwhile)
    last = publish(store, made)
    assert store.stored("checkpoints/a") == last
    for name, file in last.files.items():
        fetch(store, file, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == (made / name).read_bytes()


def test_what_answers_another_question_takes_the_place(store, made):
    first = publish(store, made, sparsity=0.5)
    publish(store, made, name="checkpoints/ab", sparsity=0.5)
    (made / "one").write_text("OWL")
    second = publish(store, made, sparsity=0.7)
    assert store.stored("checkpoints/a") == second
    keys = store.sizes("checkpoints/a")
    assert not {file.key for file in first.files.values()} & keys.keys()
    same = publish(store, made, sparsity=0.9)  # of the same files, which stay
    assert same.files == second.files
    assert {file.key for file in same.files.values()} <= store.sizes("checkpoints/a").keys()
    assert len(store.sizes("checkpoints/ab")) == 3


def test_a_damaged_or_missing_object_is_said_and_leaves_nothing(store, made, tmp_path):
    file = publish(store, made).files["one"]
    store.write(file.key, "eagle")
    with pytest.raises(BadInput, match=r"a/\w+/one is damaged: its digest is another. Do this"):
        fetch(store, file, tmp_path / "one")
    store.write(file.key, "OWL")  # of the same size
    with pytest.raises(BadInput, match="is damaged"):
        fetch(store, file, tmp_path / "one")
    store.remove(file.key)
    with pytest.raises(BadInput, match=r"a/\w+/one is missing. Do this"):
        fetch(store, file, tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir() if "one" in path.name) == []


@pytest.mark.parametrize("change", ["{", '{"files": 3}', "../../x", "/etc/passwd", "a//b"])
def test_a_marker_that_is_none_is_said(store, made, change):
    stored = publish(store, made)
    if "{" not in change:
        value = json.loads(stored.model_dump_json())
        value["files"][change] = value["files"].pop("one")
        change = json.dumps(value)
    store.write("checkpoints/a/stored.json", change)
    with pytest.raises(BadInput, match=r"no marker of owl's, or a damaged one\. Delete .*again"):
        store.stored("checkpoints/a")


@pytest.mark.parametrize("version", [None, ""])
def test_a_marker_without_a_version_is_none(store, made, version):
    """What a version replaces is removed, by the folder that is named for it."""
    value = json.loads(publish(store, made, sparsity=0.5).model_dump_json())
    publish(store, made, name="checkpoints/a/b", sparsity=0.5)
    value["version"] = version
    if version is None:
        del value["version"]
    store.write("checkpoints/a/stored.json", json.dumps(value))
    words = r"no marker of owl's, or a damaged one\. Delete .*again"
    for asked in (lambda: store.stored("checkpoints/a"), lambda: publish(store, made)):
        with pytest.raises(BadInput, match=words):
            asked()
    assert store.stored("checkpoints/a/b") is not None


@pytest.mark.parametrize("digest", ["/etc/passwd", "../../x", "", "0" * 63 + "G"])
def test_a_marker_whose_digest_is_a_path_is_none(store, made, digest):
    """A node keeps files by their digests."""
    value = json.loads(publish(store, made).model_dump_json())
    value["files"]["one"]["sha256"] = digest
    store.write("checkpoints/a/stored.json", json.dumps(value))
    with pytest.raises(BadInput, match=r"no marker of owl's"):
        store.stored("checkpoints/a")


def test_a_full_disk_is_said_and_leaves_nothing(store, made, tmp_path, monkeypatch):
    file = publish(store, made).files["one"]

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("owl_deploy.utils.artefact.to_disk", full)
    with pytest.raises(EnvironmentFailed, match=rf"The disk of {tmp_path} is full"):
        fetch(store, file, tmp_path / "one")
    assert not list(tmp_path.glob("*one*"))


def test_this_machines_disk_is_not_the_stores_fault(store, made, tmp_path, monkeypatch):
    file = publish(store, made).files["one"]

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("owl_deploy.utils.artefact.to_disk", refused)
    words = rf"The folder {tmp_path} cannot be written \(Permission denied\)"
    with pytest.raises(EnvironmentFailed, match=words):
        fetch(store, file, tmp_path / "one")


def test_whatever_a_library_raises_is_one_sentence(store, made, monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def refused(*_, **__):
        raise NoCredentialsError("Unable to locate\ncredentials.")

    for name in ("cat_file", "find", "put_file", "open"):
        monkeypatch.setattr(store._files, name, refused, raising=False)
    words = r"The store .* \(NoCredentialsError: Unable to locate credentials\)\. Check"
    file = File(key="a", bytes=1, sha256="0" * 64)
    for asked in (
        lambda: store.read("a"),
        lambda: store.sizes("a"),
        lambda: store.put(made / "one", "a"),
        lambda: fetch(store, file, made / "three"),
    ):
        with pytest.raises(EnvironmentFailed, match=words):
            asked()


def test_bytes_are_told_as_they_go(store, made):
    told = []
    store.put(made / "one", "a", told.append)
    assert sum(told) == 3


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3", "--store s3 is no address"),
        ("/folder", "--store /folder is no address"),
        ("s3://[x/y", r"is no address \(Invalid IPv6 URL\)"),
        ("ftp://me:secret@host/folder", "--store has a password in it"),
        ("s4://bucket", r"Unknown scheme in --store 's4'. Did you mean 's3'"),
    ],
)
def test_an_address_that_is_none(address, words):
    with pytest.raises(BadInput, match=words):
        Store(address)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    words = r"gs:// needs the package gcsfs, .* Run: pip install gcsfs, on this machine and"
    with pytest.raises(EnvironmentFailed, match=words):
        Store("gs://bucket")


def test_a_folder_has_one_address_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("file://store/").address == f"file://{Path.cwd()}/store"
