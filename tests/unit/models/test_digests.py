"""A file is read again when it may have changed, and only then."""

import hashlib
import os
import time

import pytest

from owl_deploy.models import digests


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that has long been as it is, and a cache of the test's own."""
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_LEAST_BYTES", 4)
    monkeypatch.setattr(digests, "_SETTLED_S", 0.0)
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    time.sleep(0.02)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The files that were read."""
    seen = []
    honest = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda path: seen.append(path) or honest(path))
    return seen


def of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once(file, reads):
    assert digests.digest(file) == digests.digest(file) == of(b"first")
    moved = file.rename(file.with_name("elsewhere"))
    assert digests.digest(moved, again=True) == of(b"first")
    assert reads == [file, moved]
    assert digests.digest(moved) == of(b"first")
    assert len(reads) == 2


def test_a_change_that_keeps_size_and_time_is_seen(file, reads):
    digests.digest(file)
    status = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.digest(file) == of(b"other")
    assert len(reads) == 2


def test_what_has_just_changed_or_is_small_is_not_recorded(file, reads, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_S", 60.0)
    digests.digest(file)
    monkeypatch.setattr(digests, "_LEAST_BYTES", 100)
    digests.digest(file)
    assert not (file.parent / "cache").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"state": 1}', '{"sha256": "forged"}'])
def test_a_damaged_record_is_none(file, reads, content):
    digests.digest(file)
    (record,) = (file.parent / "cache" / "digests").iterdir()
    record.write_text(content)
    assert digests.digest(file) == of(b"first")
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(file, reads):
    (file.parent / "cache").touch()
    assert digests.digest(file) == digests.digest(file) == of(b"first")
    assert len(reads) == 2
