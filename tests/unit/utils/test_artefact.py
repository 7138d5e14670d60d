import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.utils import artefact
from owl_deploy.utils import lock as locks


def write_folder(path, content="new", force=False):
    with artefact.staged_folder(path, force) as folder:
        artefact.write_json(folder / artefact.MANIFEST, {"kind": content})
        assert not path.exists() or force


def content_of(path):
    return json.loads((path / artefact.MANIFEST).read_text())


def test_a_folder_appears_whole(tmp_path):
    write_folder(tmp_path / "out")
    assert content_of(tmp_path / "out") == {"kind": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_path_that_is_no_text_is_refused_before_any_work(tmp_path):
    for path in (tmp_path / os.fsdecode(b"out\xff"), tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(os.fsdecode(b"elsewhere\xff"))
        with pytest.raises(BadInput, match="is not UTF-8"), artefact.staged_folder(path):
            pytest.fail("it began")
        assert [one.name for one in tmp_path.iterdir()] == ["link"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="full"), artefact.staged_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_force_and_is_replaced_whole(tmp_path):
    write_folder(tmp_path / "out", "old")
    with pytest.raises(BadInput, match="exists already"):
        write_folder(tmp_path / "out")
    write_folder(tmp_path / "out", "new", force=True)
    assert content_of(tmp_path / "out") == {"kind": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_one(tmp_path):
    write_folder(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), artefact.staged_folder(tmp_path / "out", force=True):
        raise KeyboardInterrupt
    assert content_of(tmp_path / "out") == {"kind": "old"}


def test_two_renames_serve_where_folders_cannot_be_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(artefact.ctypes, "CDLL", lambda *_, **__: object())
    write_folder(tmp_path / "out", "old")
    write_folder(tmp_path / "out", "new", force=True)
    assert content_of(tmp_path / "out") == {"kind": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def renames_fail(monkeypatch):
    """Make renames fail, the ones of these numbers, on a file system that cannot swap."""
    monkeypatch.setattr(artefact.ctypes, "CDLL", lambda *_, **__: object())
    rename = Path.rename

    @contextlib.contextmanager
    def failing(numbers):
        calls = itertools.count(1)

        def fails(self, target):
            if next(calls) in numbers:
                raise OSError(errno.ESTALE, "Stale file handle")
            return rename(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", fails)
            yield

    return failing


@pytest.mark.parametrize("step", [2, 3])
def test_an_exchange_that_was_cut_in_two_is_undone(tmp_path, renames_fail, step):
    """As by a kill, or a share that drops, between the renames of a file system without a swap."""
    write_folder(tmp_path / "out", "old")
    with renames_fail(range(step, 9)), pytest.raises(EnvironmentFailed, match="Stale"):
        write_folder(tmp_path / "out", "new", force=True)
    with artefact.only_writer(tmp_path / "out", force=True):
        assert content_of(tmp_path / "out") == {"kind": "old" if step == 2 else "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_once_leaves_the_old_one_in_its_place(tmp_path, renames_fail):
    write_folder(tmp_path / "out", "old")
    with renames_fail([2]), pytest.raises(EnvironmentFailed, match="Stale"):
        write_folder(tmp_path / "out", "new", force=True)
    assert content_of(tmp_path / "out") == {"kind": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_file_keeps_its_place(tmp_path):
    """A root's `--force` would else put a file where /dev/null was."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="it is no file"):
        artefact.write_json(tmp_path / "fifo", {})
    assert (tmp_path / "fifo").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_where_a_disk_is_mounted_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="mounted, which nothing can replace"):
        artefact.check_output(tmp_path / "out", force=True)
    artefact.check_output(tmp_path / "out" / "within", force=True)


def test_a_circle_of_links_and_the_root_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BadInput, match="cannot be followed"):
        artefact.check_path(tmp_path / "a")
    with pytest.raises(BadInput, match="root of all folders"):
        artefact.check_path(Path("/"))


def test_force_does_not_replace_what_owl_did_not_write(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="not written by owl"):
        write_folder(tmp_path / "home", force=True)
    with pytest.raises(BadInput, match="not written by owl"):
        write_folder(tmp_path / "home" / "thesis.txt", force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        write_folder(tmp_path / "no" / "out")


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_clears_it(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from owl_deploy.utils.artefact import staged_folder\n"
        "with staged_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    write_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import sys, pathlib
from owl_deploy.utils.artefact import staged_folder
with staged_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_two_processes_at_one_output(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(out)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout.readline() == "writing\n"
        half = list(tmp_path.glob(".out.owl-tmp-*/half"))
        with pytest.raises(BadInput, match="Another run is writing"):
            write_folder(out)
        assert [path.read_text() for path in half] == ["x"]
        write_folder(tmp_path / "other")
        first.kill()
    write_folder(out)  # what the killed one left hinders nobody, and is cleared
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_run_that_lost_its_lease_publishes_nothing(tmp_path):
    """As one whose machine slept for an hour, while another machine made the output."""
    out = tmp_path / "out"
    lock = tmp_path / ".out.owl-lock"

    def take_over():
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "b", "of": ["b"]}))

    with pytest.raises(EnvironmentFailed, match=r"took .*out over"), artefact.staged_folder(out):
        take_over()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.owl-lock"]  # it is the other's


def test_what_a_kill_left_of_json_is_cleared_a_while_later(tmp_path):
    fresh, old = (tmp_path / f".a.json.owl-tmp-{name}" for name in ("fresh", "old"))
    for path in (fresh, old):
        path.write_text("{")
    os.utime(old, (0, 0))
    behind = time.time() - 600  # a file server's clock need not be this machine's
    os.utime(fresh, (behind, behind))
    artefact.write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "a.json"]


def test_an_output_within_its_input_or_around_it(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    with (
        pytest.raises(BadInput, match="lies inside the input"),
        artefact.only_writer(model / "pruned", False, str(model)),
    ):
        pass
    with (
        pytest.raises(BadInput, match="which would be replaced"),
        artefact.only_writer(tmp_path, True, model),
    ):
        pass
    (model / artefact.MANIFEST).write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for source in (model, tmp_path / "link"):
        with (
            pytest.raises(BadInput, match="is an input itself"),
            artefact.only_writer(model, True, source),
        ):
            pass
    text = model / "text.txt"
    text.touch()
    with (
        pytest.raises(BadInput, match=r"The input .*text\.txt lies inside"),
        artefact.only_writer(model, True, "organization/model", text),
    ):
        pass
    with artefact.only_writer(tmp_path / "model-pruned", False, model, text):
        pass


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, force):
    out = tmp_path / "out"
    complaint = "not written by owl" if force else "exists already"

    def appear():
        out.mkdir()
        (out / "thesis.txt").write_text("x")

    complaint = f"Meanwhile: .*out.*{complaint}"
    with pytest.raises(EnvironmentFailed, match=complaint), artefact.staged_folder(out, force):
        appear()
    assert (out / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("content", ['["nocturnal birds"]', '{"species": "Strix aluco"}', "{", ""])
def test_another_programs_owl_json_is_none_of_ours(tmp_path, content):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / artefact.MANIFEST).write_text(content)
    with pytest.raises(BadInput, match="was not written by owl"):
        artefact.check_output(tmp_path / "birds", force=True)


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    artefact.write_json(path, {"n": 1})
    with pytest.raises(ValueError, match="JSON"):
        artefact.write_json(path, {"n": float("nan")})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def taken_over(output):
    """A run of another machine writes `output` now."""
    lock, of_another = artefact._lock(output), {"host": "node-7", "of": ["another boot"]}
    lock.write_text(json.dumps(locks._me() | of_another))
    return lock


def test_who_lost_its_output_may_not_write_it(tmp_path):
    output = tmp_path / "out"
    assert not artefact.is_writer(output)
    with artefact.only_writer(output):
        artefact.check_writer(output)
        lock = taken_over(output)
        with pytest.raises(EnvironmentFailed, match=r"Another run took .*out over"):
            artefact.check_writer(output)
    assert lock.is_file()


def test_a_run_that_was_killed_elsewhere_is_outlasted(tmp_path, monkeypatch, capsys):
    lock = taken_over(tmp_path / "out")
    meanwhile = SimpleNamespace(time=time.time, sleep=lambda _: os.utime(lock, (0, 0)))
    monkeypatch.setattr(locks, "time", meanwhile)  # in which it gets old
    with artefact.only_writer(tmp_path / "out"):
        assert artefact.is_writer(tmp_path / "out")
    said = capsys.readouterr().err
    assert "A run on node-7 is writing" in said
    assert (said.count("waiting for at most 60 s"), said.count("\n")) == (1, 1)


def test_a_run_that_lives_elsewhere_is_not(tmp_path, monkeypatch):
    lock = taken_over(tmp_path / "out")
    touched = lock.stat().st_mtime + 0.5

    def touch(*_):
        os.utime(lock, (touched, touched))

    monkeypatch.setattr(artefact, "_say_who_is_waited_for", touch)  # which it does, and watches
    with (
        pytest.raises(BadInput, match="Another run is writing"),
        artefact.only_writer(tmp_path / "out"),
    ):
        pass
    assert lock.is_file()


def test_a_writer_is_waited_for(tmp_path):
    output = tmp_path / "made" / "out"
    artefact.wait_for_writer(output)  # nobody is
    waiting = threading.Thread(target=artefact.wait_for_writer, args=(output,))
    with artefact.only_writer(output):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(60)
    assert not waiting.is_alive()
    assert list(output.parent.iterdir()) == []


def test_of_a_link_what_it_leads_to_is_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "out"
    link.symlink_to(disk / "out")
    write_folder(link, "old")
    assert content_of(disk / "out") == {"kind": "old"}
    with pytest.raises(BadInput, match="out exists already"):
        write_folder(link)
    write_folder(link, "new", force=True)
    assert link.is_symlink()
    assert content_of(disk / "out") == {"kind": "new"}
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_of_a_linked_file_what_it_leads_to_is_replaced(tmp_path):
    dated, latest = tmp_path / "dated.json", tmp_path / "latest.json"
    dated.write_text("old")
    latest.symlink_to(dated.name)
    artefact.write_json(latest, {"a": 1})
    assert latest.is_symlink()
    assert json.loads(dated.read_text()) == {"a": 1}


def test_a_link_to_a_file_of_another_name_is_not_copied(tmp_path):
    """A stranger's model could have owl publish what its user alone may read."""
    (tmp_path / "blobs").mkdir()
    for name in ("id_rsa", "blobs/0123", "merges.txt"):
        (tmp_path / name).write_text(name)
    model = tmp_path / "model"
    model.mkdir()
    for name, target in (
        ("a.txt", "id_rsa"),
        ("b.txt", "blobs/0123"),
        ("merges.txt", "merges.txt"),
    ):
        (model / name).symlink_to(tmp_path / target)
    with pytest.raises(BadInput, match=r"a\.txt is a link to .*id_rsa"):
        artefact.copy(model / "a.txt", tmp_path / "copy")
    for name, content in (("b.txt", "blobs/0123"), ("merges.txt", "merges.txt")):
        artefact.copy(model / name, tmp_path / "copy")
        assert (tmp_path / "copy").read_text() == content


@pytest.mark.parametrize(
    ("before", "after"), [(None, b""), (b"", b""), (b"a", b"a\n"), (b"a\n", b"a\n")]
)
def test_a_line_that_was_cut_short_is_ended(tmp_path, before, after):
    file = tmp_path / "lines"
    if before is not None:
        file.write_bytes(before)
    artefact.end_line(file)
    assert file.read_bytes() == after


def test_tensors_are_for_whoever_may_read_what_is_made_here(tmp_path):
    before = os.umask(0o027)
    try:
        artefact.save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", by="me")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "me"}


def test_equal_tensors_make_equal_files(tmp_path):
    told = {f"{name}.bits": "4" for name in ("läyer", "a.b", *map(str, range(20)))}
    tensors = {name: torch.arange(3) for name in ("b", "ä")}
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file in files:
        artefact.save_tensors(tensors, file, **told)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", **told}
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in tensors.items())


def test_a_full_disk_is_said_to_be_that(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("owl_deploy.utils.lock.json.dump", full)
    with (
        pytest.raises(EnvironmentFailed, match=rf"The disk of {tmp_path} is full"),
        artefact.only_writer(tmp_path / "out"),
    ):
        pass


def test_what_was_replaced_is_cleared_by_the_next_if_this_one_is_killed(tmp_path, monkeypatch):
    out, staging = tmp_path / "out", tmp_path / ".out.owl-partial"
    for folder in (out, staging):
        folder.mkdir()
        (folder / "owl.json").write_text('{"kind": "checkpoint"}')

    def killed(path, **_):
        raise KeyboardInterrupt

    with artefact.only_writer(out, force=True):
        with monkeypatch.context() as patch:
            patch.setattr(artefact.shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                artefact.publish(staging, out, force=True)
        assert not staging.exists()
        assert len(list(tmp_path.glob(".out.owl-tmp-*"))) == 1
    with artefact.only_writer(out, force=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
