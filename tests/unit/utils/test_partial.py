import json
from pathlib import Path

import pytest
import torch

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.utils import lock as locks
from owl_deploy.utils.artefact import only_writer
from owl_deploy.utils.ranks import Ranks
from owl_deploy.utils.resume import ASKED, Partial, kept_for_resuming, partial_folder


class Counted(Partial):
    """What is done of it is one file."""

    @property
    def has_work(self):
        return (self.folder / "done.json").is_file()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(output):
    """Begin the run, which does something or not, and have it end with an error."""

    def end(error, *, works=True, resume=False):
        with only_writer(output):
            partial = Counted(output, {}, resume=resume, force=False)
            if works:
                partial.write("done.json", 1)
            with pytest.raises(type(error)), kept_for_resuming(partial, ""):
                raise error

    return end


def content(output):
    folder = partial_folder(output)
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def taken_over(output):
    """A run of another machine writes `output` now."""
    lock = output.with_name(f".{output.name}.owl-lock")
    lock.write_text(json.dumps(locks._me() | {"host": "node-7", "of": ["another boot"]}))


def test_what_is_read_for_hours_is_what_was_asked_for(output):
    inputs = {"model": [1, 2], "teacher": None}
    with only_writer(output):
        partial = Counted(output, inputs | {"settings": 3}, resume=False, force=False)
        partial.check_unchanged(lambda: inputs)
        with pytest.raises(EnvironmentFailed, match="the model was replaced"):
            partial.check_unchanged(lambda: inputs | {"model": (1, 3)})
        with pytest.raises(EnvironmentFailed, match="gone was replaced or removed"):
            partial.check_unchanged(lambda: {"model": (output / "gone").stat()})


@pytest.mark.parametrize("left", [0, 12, 90])
def test_tensors_that_are_damaged_are_told(output, left):
    with only_writer(output):
        partial = Counted(output, {}, resume=False, force=False)
        path = partial.folder / "one"
        partial.write_tensors({"a": torch.ones(8)}, path)
        assert partial.read_tensors(path)["a"].sum() == 8
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(BadInput, match=r"damaged: .*one"):
            partial.read_tensors(path)


def test_what_a_bad_input_stopped_would_stop_again(run, output):
    run(BadInput("no"))
    assert not content(output)


def test_a_bad_input_does_not_cost_what_an_earlier_run_has_done(run, output):
    run(KeyboardInterrupt())
    run(BadInput("no"), works=False, resume=True)
    assert content(output).keys() == {ASKED, "done.json"}


def test_what_nobody_would_have_to_do_again_is_dropped(run, output):
    run(KeyboardInterrupt(), works=False)
    assert not content(output)


@pytest.mark.parametrize("error", [BadInput("no"), ZeroDivisionError()], ids=repr)
def test_a_process_that_only_reads_drops_nothing(output, error):
    with only_writer(output):
        partial = Counted(output, {}, resume=False, force=False)
    with pytest.raises(type(error)), kept_for_resuming(partial, ""):  # as in another process
        raise error
    assert content(output).keys() == {ASKED}


def test_a_run_that_lost_its_output_leaves_the_next_one_alone(output):
    with only_writer(output):
        partial = Counted(output, {}, resume=False, force=False)
        taken_over(output)
        before = content(output)
        with pytest.raises(EnvironmentFailed, match="Another run took"):
            partial.write("done.json", 1)
        tensors, path = {"a": torch.ones(2)}, partial.folder / "a.safetensors"
        with pytest.raises(EnvironmentFailed, match="Another run took"):
            partial.write_tensors(tensors, path)
        for error in (BadInput("no"), ZeroDivisionError()):
            with pytest.raises(type(error)), kept_for_resuming(partial, ""):
                raise error
    assert content(output) == before


@pytest.mark.parametrize("again", ["force", "discard"])
def test_what_goes_first_is_that_there_was_a_run(run, output, monkeypatch, again):
    run(KeyboardInterrupt())
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **how: (removed.append(path.name), unlink(path, **how))
    )
    monkeypatch.setattr(
        "owl_deploy.utils.resume.shutil.rmtree", lambda path, **_: removed.append("all")
    )
    with only_writer(output):
        if again == "force":
            Counted(output, {}, resume=False, force=True)
        else:
            Counted(output, {}, resume=True, force=False).discard()
    of_the_run = [name for name in removed if not name.startswith(".")]
    assert of_the_run[0] == ASKED
    assert of_the_run[1:] == (["all"] if again == "discard" else ["done.json"])


def test_each_process_has_to_see_what_the_first_writes(output, monkeypatch):
    with only_writer(output):
        partial = Counted(output, {"model": "m"}, resume=False, force=False)
        partial.check_seen(Ranks())
        for other in (None, {"model": "another"}):
            told = [{"model": "m"}, {"model": "m"}, other]
            monkeypatch.setattr(Ranks, "gathered", lambda self, asked, told=told: told)
            with pytest.raises(BadInput, match=r"Process 2 does not see .* all nodes share"):
                partial.check_seen(Ranks(0, 3))
