import signal
import threading

import pytest

pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")

from owl_deploy.distributed.cluster import nodes
from owl_deploy.distributed.cluster.needs import Need
from owl_deploy.distributed.cluster.nodes import (
    Sight,
    alike,
    check_store,
    difference,
    look,
    look_in_store,
    refusal,
)
from owl_deploy.distributed.cluster.store import Store
from owl_deploy.errors import BadInput

HERE = {"owl-deploy": "0.1.0", "python": "3.11.4", "torch": "2.9.0", "ray": "2.60.0"}


def test_the_first_version_that_differs_is_told_with_both():
    assert difference(HERE, HERE) is None
    told = difference(HERE | {"python": "3.12.1", "torch": "2.8.0"}, HERE)
    assert told == "has python 3.12.1, and this machine has 3.11.4"
    lacking = {name: value for name, value in HERE.items() if name != "torch"}
    assert difference(lacking, HERE) == "has torch none, and this machine has 2.9.0"
    assert nodes.versions().keys() > HERE.keys()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("head", "is no address"),
        ("head:²", "is no address"),
        ("head..cluster:6379", "cannot join a Ray cluster at head..cluster:6379"),
        (f"{'a' * 70}.cluster:6379", "cannot join"),
        ("127.0.0.1:99999", "cannot join"),
    ],
)
def test_an_address_that_cannot_be_one(address, words):
    with pytest.raises(BadInput, match=words), nodes.joined(address):
        pass


def test_what_nodes_look_for_is_there_while_the_tasks_run(tmp_path):
    with alike((), tmp_path, ()) as marker, alike((), tmp_path, ()) as of_another:
        assert marker.parent == tmp_path
        assert marker.read_text() in marker.name
        assert marker != of_another
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sight", "answered", "words"),
    [
        (Sight(HERE, "t"), True, None),
        (Sight(HERE | {"torch": "1"}, "t"), True, "has torch 1"),
        (Sight(HERE, None), True, "does not share"),
        (Sight(HERE, "another's"), True, "does not share"),
        (Sight(HERE, "t"), False, "does not share"),  # it reads, but writes elsewhere
        (Sight(HERE, "t", ("/m", "/c")), True, "does not see /m"),
    ],
)
def test_a_node_is_refused_for_what_it_sees(sight, answered, words):
    why = refusal(sight, HERE, "t", answered=answered)
    assert (why is None) if words is None else (why and words in why[0])


def test_a_node_reads_the_marker_answers_and_looks_for_the_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model").touch()
    marker = tmp_path / "marker"
    sources = [nodes.Path("model"), nodes.Path("text")]
    assert look(tmp_path / "there", marker, sources, "answer").marker is None
    assert not (tmp_path / "answer").exists()
    marker.write_text("t")
    sight = look(tmp_path / "there", marker, sources, "answer")
    assert (sight.marker, sight.missing) == ("t", ("text",))
    assert (tmp_path / "answer").exists()
    assert look(tmp_path / "not there", marker, sources, "answer").marker == "t"


@pytest.mark.parametrize(
    ("sight", "answered", "words"),
    [
        (Sight(HERE, "t"), True, None),
        (Sight(HERE, None), True, "does not share s3://b with"),
        (Sight(HERE, "t"), False, "does not share s3://b with"),
        (
            Sight(HERE, None, refused="It needs s3fs. Run: x."),
            False,
            "store: It needs s3fs. Run: x",
        ),
    ],
)
def test_a_node_is_refused_for_what_it_can_do_in_a_store(sight, answered, words):
    why = refusal(sight, HERE, "t", answered=answered, store="s3://b")
    assert (why is None) if words is None else (why and words in why[0])


def test_a_node_reads_the_marker_in_a_store_and_answers():
    store = Store("memory://nodes/one")
    assert look_in_store(store.address, "marker", "answer").marker is None
    store.write("marker", "t")
    assert look_in_store(store.address, "marker", "answer").marker == "t"
    assert store.read("answer") == ""
    assert look_in_store("s4://bucket", "marker", "answer").refused.startswith("Unknown scheme")


def test_a_store_that_refuses_the_driver_is_bad_input(monkeypatch):
    store = Store("memory://nodes/two")

    def refused(*_):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store._files, "pipe_file", refused, raising=False)
    with pytest.raises(BadInput, match=r"cannot be used \(PermissionError: Access Denied\)"):
        check_store([], store)


def test_only_what_can_take_tasks_is_a_node(monkeypatch):
    def node(name, alive=True, **resources):
        return {
            "NodeID": f"{name}0123456789",
            "NodeManagerHostname": name,
            "Alive": alive,
            "Resources": resources,
        }

    told = [
        node("head", memory=5.0),
        node("dead", alive=False, CPU=4.0),
        node("card", CPU=4.0, GPU=1.0, memory=7.0),
    ]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: told)
    (card,) = nodes.alive()
    assert (card.name, card.has) == ("card (card0123)", Need(4, 7, 1.0))


@pytest.fixture
def own_sigterm(monkeypatch):
    """What SIGTERM calls in this test, and a Ray that makes it call something of its own."""
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("ours"))

    def init(*_, **__):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: calls.append("Ray's"))

    monkeypatch.setattr(nodes.ray, "init", init)
    monkeypatch.setattr(nodes.ray, "shutdown", lambda: calls.append("shutdown"))
    yield calls
    signal.signal(signal.SIGTERM, before)


def test_a_driver_that_is_told_to_end_does_as_by_ctrl_c(own_sigterm):
    with pytest.raises(KeyboardInterrupt), nodes.joined("local"):
        signal.raise_signal(signal.SIGTERM)
    assert own_sigterm == ["shutdown"]
    signal.raise_signal(signal.SIGTERM)
    assert own_sigterm == ["shutdown", "ours"]


def test_a_driver_outside_the_main_thread_leaves_signals_alone(own_sigterm):
    def drive():
        with nodes.joined("local"):
            own_sigterm.append("joined")

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGTERM)
    assert own_sigterm == ["joined", "shutdown", "ours"]
