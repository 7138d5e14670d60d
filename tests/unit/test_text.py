import pytest
import torch

from owl_deploy import text
from owl_deploy.errors import BadInput


def test_calibration_windows_do_not_overlap_and_follow_the_seed():
    tokens = torch.arange(105)
    found = text.calibration_windows(tokens, 6, 10, seed=3)
    assert found.shape == (6, 10)
    assert len(set(found.flatten().tolist())) == 60
    assert torch.equal(found, text.calibration_windows(tokens, 6, 10, seed=3))
    assert not torch.equal(found, text.calibration_windows(tokens, 6, 10, seed=4))


def test_a_text_too_short_for_the_samples():
    with pytest.raises(BadInput, match="10 windows of 10 tokens, not 11"):
        text.calibration_windows(torch.arange(105), 11, 10, seed=0)


def test_evaluation_windows_are_the_first_ones():
    tokens = torch.arange(105)
    assert text.evaluation_windows(tokens, 10, None).shape == (10, 10)
    assert text.evaluation_windows(tokens, 10, 2).flatten().tolist() == list(range(20))
    assert text.evaluation_windows(tokens, 10, 99).shape == (10, 10)
    with pytest.raises(BadInput, match="less than one window"):
        text.evaluation_windows(tokens, 106, None)


@pytest.mark.parametrize("source", ["no-such-file.txt", "wikitex", "hf:a:b:c", "hf:a::c:d"])
def test_a_source_that_does_not_exist(source):
    with pytest.raises(BadInput):
        text.load_text(source)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        text.load_text(str(tmp_path / "a.txt"))


def test_a_data_set_is_joined_by_blank_lines(monkeypatch):
    class Rows(list):
        def take(self, count):
            return self[:count]

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split) == ("org/set", "en", "test")
        return Rows([{"body": "one"}, {"body": "two"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert text.load_text("hf:org/set:en:test:body") == "one\n\ntwo"
    with pytest.raises(BadInput, match="could not be read"):
        text.load_text("hf:org/set:en:test:title")
