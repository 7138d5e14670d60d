"""More clients than `owl serve` has places for, some of whom go away: benchmarks/serve_load.py."""

import psutil
import pytest

from benchmarks.serve_load import measure, prompts, said
from owl_deploy.bench.clients import Load
from owl_deploy.export.targets import export
from tests import tiny
from tests.integration.test_requests import KEY, serving

CLIENTS, SECONDS = 16, 6
GROWTH_BYTES = 16 * 2**20  # the allocator's play; a batch that stayed would be there every time


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    model = tiny.write_llama(folder / "model")
    export(model, folder / "tiny", target="onnxruntime")
    return folder / "tiny"


def test_many_clients_see_no_error_and_the_server_does_not_grow(deployment):
    with serving(deployment, "--batch", "4", "--waiting", "2") as (process, client):
        load = Load(str(client.base_url).rstrip("/"), "tiny", 8, leave=0.2, key=KEY, varied=True)
        server = psutil.Process(process.pid)
        rows = [measure(load, CLIENTS, prompts(6, SECONDS), server) for _ in range(3)]
        process.terminate()
        assert process.stderr.read() == ""  # clients that go away are nothing to tell
    for row in rows:
        assert row["errors"] == 0, row["error"]
        assert min(row["answered"], row["left"], row["refused"]) > 0
        assert row["first_ms"]["p50"] <= row["first_ms"]["p99"]
        assert row["requests_per_s"] * row["seconds"] == pytest.approx(row["answered"])
        assert f"{row['answered']} answered" in said(row)
    # The first round warms up: pools, buffers, the connections of all clients.
    assert rows[2]["rss_bytes"][1] - rows[0]["rss_bytes"][1] < GROWTH_BYTES


def test_what_a_server_refuses_for_good_is_an_error(deployment):
    with serving(deployment) as (process, client):
        load = Load(str(client.base_url).rstrip("/"), "another", 8, key=KEY)
        row = measure(load, 1, prompts(6, 0.2), psutil.Process(process.pid))
    assert row["errors"] > 0
    assert "404" in row["error"]
    assert row["answered"] == 0
    assert row["first_ms"] == {}
