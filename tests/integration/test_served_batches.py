"""Texts that `owl serve` writes together, with the real engines: each is what it is alone."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from owl_deploy.artefact import sha256
from owl_deploy.engines.deployment import open_deployment
from owl_deploy.engines.draft import chosen_draft
from owl_deploy.engines.sampling import UNLIMITED, Sampling
from owl_deploy.engines.rows import Speed
from owl_deploy.engines.writer import Writer
from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.runtime import library_path
from tests import tiny
from tests.integration.test_requests import serving

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)

CONTEXT = 256
PROMPTS = {  # tokens of a tiny model's byte-like text: from one to most of the context
    "T": 8,
    "The river ran": 20,
    "The river ran past the mill and under the bridge. " * 2: 30,
    "A clock": 1,
    "Snow fell on the hills. " * 4: UNLIMITED,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "dense"
    changes = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    return tiny.write_llama(folder, eos_token_id=2, **changes)  # which it never says below


@pytest.fixture(scope="module", params=["owl:int8", "owl:fp32", "onnxruntime:fp32"])
def deployment(request, dense):
    target, precision = request.param.split(":")
    folder = dense.parent / request.param.replace(":", "-")
    export(dense, folder, target=target, precision=precision)
    return folder


@pytest.fixture(scope="module")
def writer(deployment):
    return Writer(open_deployment(deployment), 1, batch=8)


def asked(writer, sampling=None):
    greedy = Sampling()
    return [
        writer.row(prompt, replace(sampling or greedy, max_new_tokens=new), Speed())
        for prompt, new in PROMPTS.items()
    ]


def together(writer, rows):
    assert writer.takes(rows)
    texts = [""] * len(rows)
    for pieces in writer.write_together(rows):
        for number, piece in pieces.items():
            texts[number] += piece
    return texts


def test_every_text_is_what_it_is_alone(writer):
    rows, alone = asked(writer), asked(writer)
    texts = together(writer, rows)
    assert texts == [together(writer, [row])[0] for row in alone]
    for row, single in zip(rows, alone, strict=True):
        assert row.tokens == single.tokens
        assert row.speed.context_full == single.speed.context_full
    assert [row.speed.new_tokens for row in rows[:4]] == [8, 20, 30, 1]
    assert len(set(texts)) > 2  # a random model's tokens are often no whole character


def test_a_text_that_nobody_wants_ends_and_the_others_go_on(writer):
    rows, heard = asked(writer)[:3], [0, 0, 0]
    for pieces in writer.write_together(rows):
        for number in pieces:
            heard[number] += 1
        rows[2].ended |= heard[2] == 5
    assert heard == [8, 20, 5]


def test_a_text_goes_on_past_its_ends_where_that_is_asked(deployment, writer, tmp_path):
    """The tokens that it says most are made its ends, which it then must not choose."""
    rows = asked(writer)[:3]
    together(writer, rows)
    said = [token for row in rows for token in row.tokens[-row.speed.new_tokens :]]
    ends = sorted(set(said), key=said.count)[-2:]
    opened = open_deployment(
        changed(deployment, tmp_path / "ends", "model", eos_token_id=ends), trust_library=True
    )
    ending = Writer(opened, 1, batch=8)
    short, whole = asked(ending)[:3], asked(ending, Sampling(ignore_eos=True))[:3]
    assert not ending.takes([short[0], whole[0]])
    together(ending, short)
    assert sum(row.speed.new_tokens for row in short) < len(said)
    together(ending, whole)
    assert [row.speed.new_tokens for row in whole] == [8, 20, 30]
    assert not any(set(ends) & set(row.tokens[-row.speed.new_tokens :]) for row in whole)
    for row, single in zip(whole, asked(ending, Sampling(ignore_eos=True)), strict=False):
        together(ending, [single])
        assert single.tokens == row.tokens


def test_a_draft_goes_on_past_the_ends_too(deployment, writer, tmp_path):
    row = asked(writer)[2]
    together(writer, [row])
    ends = row.tokens[-row.speed.new_tokens :][:1]
    opened = open_deployment(
        changed(deployment, tmp_path / "ends", "model", eos_token_id=ends), trust_library=True
    )
    drafting = Writer(opened, 1, drafting=chosen_draft(opened, "lookup", None, False))
    short, whole = (asked(drafting, Sampling(ignore_eos=one))[2] for one in (False, True))
    for each in (short, whole):
        together(drafting, [each])
    assert (short.speed.new_tokens, whole.speed.new_tokens) == (1, 30)


def test_sampled_texts_share_a_batch_and_are_drawn_each_for_itself(writer):
    sampling = Sampling(do_sample=True, max_new_tokens=24)
    rows = [writer.row("The river ran", sampling, Speed()) for _ in range(8)]
    assert len(set(together(writer, rows))) > 4


@pytest.mark.parametrize(
    ("sampling", "other", "fits"),
    [
        # The likeliest token, both.
        (Sampling(), Sampling(do_sample=True, temperature=0, seed=3), True),
        (Sampling(), Sampling(do_sample=True), False),
        (Sampling(do_sample=True), Sampling(do_sample=True, top_k=5), False),
        (Sampling(do_sample=True, seed=1), Sampling(do_sample=True, seed=1), False),
        (Sampling(repetition_penalty=1.2), Sampling(repetition_penalty=1.2), False),
    ],
)
def test_what_is_chosen_otherwise_shares_no_batch(writer, sampling, other, fits):
    rows = [
        writer.row("A clock", replace(one, max_new_tokens=4), Speed()) for one in (sampling, other)
    ]
    assert writer.takes(rows) is fits
    assert writer.takes(rows[:1])
    assert writer.takes(rows[1:])


def test_what_ends_like_the_padding_goes_alone(writer):
    rows = [writer.row("A clock", Sampling(max_new_tokens=4), Speed()) for _ in range(2)]
    assert writer.takes(rows)
    rows[1].tokens[-1] = writer._pad
    assert not writer.takes(rows)
    assert writer.takes(rows[1:])


def test_who_needs_the_room_of_the_padding_is_begun_anew(writer):
    def asked():
        long = writer.row("Snow fell. " * 16, Sampling(max_new_tokens=9), Speed())
        return [long, writer.row("T", Sampling(max_new_tokens=UNLIMITED), Speed())]

    rows = asked()
    assert len(rows[0].tokens) > CONTEXT // 3
    texts = together(writer, rows)
    assert [len(row.tokens) for row in rows] == [rows[0].length, CONTEXT]
    assert rows[1].speed.context_full
    alone = asked()
    assert texts == [together(writer, [row])[0] for row in alone]
    assert [row.tokens for row in rows] == [row.tokens for row in alone]


def changed(deployment, folder, part, **settings):
    """A copy of a deployment with other settings, as a stranger's."""
    folder.mkdir()
    for file in deployment.iterdir():
        if file.name not in ("owl.json", "genai_config.json"):
            shutil.copy(file, folder)
    config = json.loads((deployment / "genai_config.json").read_text())
    config[part] |= settings
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def test_prompts_that_are_run_in_parts_go_alone(deployment, tmp_path):
    folder = changed(deployment, tmp_path / "parts", "search", chunk_size=8)
    writer = Writer(open_deployment(folder, trust_library=True), 1, batch=8)
    rows = asked(writer)
    assert not writer.takes(rows[:2])
    assert together(writer, [rows[1]])[0]


def test_what_a_request_leaves_out_is_the_models_and_the_start_says_so(deployment, tmp_path):
    folder = shutil.copytree(deployment, tmp_path / "sampled")
    config, manifest = folder / "genai_config.json", folder / "owl.json"
    values, told = (json.loads(file.read_text()) for file in (config, manifest))
    values["search"] |= {"do_sample": True, "temperature": 0.5, "top_k": 1, "top_p": 1.0}
    config.write_text(json.dumps(values))
    told["files"][config.name]["sha256"] = sha256(config)
    manifest.write_text(json.dumps(told))
    with serving(folder, "--name", "one", "--name", "two") as (process, client):
        said = process.stderr.readline()
        assert said == (
            "Requests that do not say otherwise have the model's own temperature 0.5, top_k 1.\n"
        )
        assert [model.id for model in client.models.list()] == ["one", "two"]
        asked = {"model": "two", "prompt": "The river ran", "max_tokens": 12}
        usual, greedy, drawn = (
            client.completions.create(**asked, **more).choices[0].text
            for more in (
                {},
                {"temperature": 0},
                {"temperature": 2, "extra_body": {"top_k": 0}, "seed": 1},
            )
        )
    assert usual == greedy != drawn


def test_more_context_than_the_model_takes_is_refused_in_a_sentence(owl, deployment):
    code, _, err = owl("serve", deployment, "--port", 0, "--context", CONTEXT + 1)
    assert (code, f"--context {CONTEXT + 1} is more than the {CONTEXT} tokens" in err) == (2, True)


def test_clients_at_once_get_what_each_gets_alone(dense):
    folder = dense.parent / "owl-int8"
    if not folder.exists():
        export(dense, folder, target="owl", precision="int8")
    with serving(folder) as (_, client):

        def ask(prompt):
            return client.completions.create(
                model=folder.name, prompt=prompt, max_tokens=20, temperature=0, stream=False
            ).choices[0]

        alone = [ask(prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(15) as pool:
            for _ in range(2):
                assert list(pool.map(ask, [*PROMPTS] * 3)) == alone * 3


@pytest.mark.parametrize("draft", ["int4", "lookup"])
def test_a_request_alone_has_the_draft_and_the_answers_are_the_same(dense, draft, tmp_path):
    folder = tmp_path / "int8"
    export(dense, folder, target="owl", precision="int8")
    if draft != "lookup":
        export(dense, tmp_path / draft, target="owl", precision=draft)
        draft = tmp_path / draft
    opened = open_deployment(folder)
    drafted = Writer(opened, 1, drafting=chosen_draft(opened, draft, None, False), batch=8)
    alone = Writer(opened, 1, batch=8)
    for prompt in PROMPTS:
        texts = []
        for writer in (alone, drafted):
            row = writer.row(prompt, Sampling(max_new_tokens=40), Speed())
            texts.append(together(writer, [row]))
            assert (row.speed.draft is None) is (writer is alone)
        assert texts[0] == texts[1]
    rows = asked(drafted)
    assert together(drafted, rows) == together(alone, asked(alone))
    assert all(row.speed.draft is None for row in rows)


def test_a_drafted_answer_ends_where_nobody_hears_it(dense, tmp_path):
    folder = tmp_path / "int8"
    export(dense, folder, target="owl", precision="int8")
    opened = open_deployment(folder)
    writer = Writer(opened, 1, drafting=chosen_draft(opened, "lookup", 3, False))
    row = writer.row("The river ran", Sampling(max_new_tokens=40), Speed())
    for step, _ in enumerate(writer.write_together([row])):
        row.ended = step == 2
    assert row.speed.new_tokens == 3
