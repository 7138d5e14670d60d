"""Texts that `owl serve` writes together, with the real engines: each is what it is alone."""

import json
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import transformers

from owl_deploy.errors import BadInput, EngineFailed, EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.inference.deployment import open_deployment
from owl_deploy.inference.draft import chosen_draft
from owl_deploy.inference.rows import Speed
from owl_deploy.inference.sampling import UNLIMITED, Sampling
from owl_deploy.inference.writer import OneByOne, SideBySide, open_writer
from owl_deploy.runtime import kernels, library_path
from owl_deploy.utils.artefact import sha256
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
    return open_writer(open_deployment(deployment), 1, batch=8)


@pytest.fixture(scope="module")
def alone(deployment):
    """onnxruntime-genai, as `owl generate` has it."""
    return OneByOne(open_deployment(deployment), 1)


def asked(writer, sampling=None):
    greedy = Sampling()
    return [
        writer.row(prompt, replace(sampling or greedy, max_new_tokens=new), Speed())
        for prompt, new in PROMPTS.items()
    ]


def written(writer, rows, every=0):
    """The texts of rows, of which another comes with each `every` steps; 0: all at once.

    More of them than there are places wait for those.
    """
    texts = defaultdict(str)
    waiting, steps = [*rows], 0
    while not all(row.ended for row in rows):
        under_way = sum(not row.ended for row in rows) - len(waiting)
        while waiting and under_way < writer.batch and (not every or steps % every == 0):
            writer.add(waiting.pop(0))
            under_way += 1
            if every:
                break
        for row, piece in writer.step().items():
            texts[row] += piece
        steps += 1
    return [texts[row] for row in rows]


def each_written(writer, rows):
    return [written(writer, [row])[0] for row in rows]


@pytest.mark.parametrize("every", [0, 1, 7])
def test_every_text_is_what_it_is_alone(writer, alone, every):
    rows, single = asked(writer), asked(alone)
    texts = written(writer, rows, every)
    assert texts == each_written(alone, single)
    for row, one in zip(rows, single, strict=True):
        assert row.tokens == one.tokens
        assert row.speed.context_full == one.speed.context_full
    assert [row.speed.new_tokens for row in rows[:4]] == [8, 20, 30, 1]
    assert len(set(texts)) > 2  # a random model's tokens are often no whole character


def test_texts_come_and_go_in_places_that_others_had(deployment, alone):
    writer = open_writer(open_deployment(deployment), 1, batch=3)
    for _ in range(2):
        rows, single = ([row for _ in range(3) for row in asked(one)] for one in (writer, alone))
        assert written(writer, rows, 2) == each_written(alone, single)


def test_others_go_on_while_a_prompt_is_read(writer, alone, monkeypatch):
    monkeypatch.setattr("owl_deploy.inference.writer.PROMPT_PART", 16)
    monkeypatch.setattr("owl_deploy.inference.writer._READ_S", 0)
    rows, single = ([asked(one)[2], asked(one)[4]] for one in (writer, alone))
    writer.add(rows[0])
    while not rows[0].speed.new_tokens:
        writer.step()
    writer.add(rows[1])
    meanwhile = 0
    while not rows[1].speed.new_tokens:
        before = rows[0].speed.new_tokens
        writer.step()
        meanwhile += rows[0].speed.new_tokens - before
    assert meanwhile == -(-rows[1].speed.prompt_tokens // 16) > 1
    while not all(row.ended for row in rows):
        writer.step()
    each_written(alone, single)
    if kernels() != "amx":  # whose sums of a prompt depend on its parts
        assert [row.tokens for row in rows] == [row.tokens for row in single]


def test_a_text_that_nobody_wants_ends_and_the_others_go_on(writer):
    rows = asked(writer)[:3]
    for row in rows:
        writer.add(row)
    while not all(row.ended for row in rows):
        writer.step()
        if rows[0].speed.new_tokens == 5:
            rows[0].ended = True
    assert [row.speed.new_tokens for row in rows] == [5, 20, 30]


@pytest.fixture
def small_parts(monkeypatch):
    """So that a tiny model's prompts have several."""
    monkeypatch.setattr("owl_deploy.inference.writer.PROMPT_PART", 16)


def snowy(writer, end="", times=3, anew=False):
    prompt = "Snow fell on the hills. " * times + end
    row = writer.row(prompt, Sampling(max_new_tokens=12), Speed())
    row.anew = anew
    return row


@pytest.mark.usefixtures("small_parts")
def test_what_a_place_has_of_a_prompt_is_not_read_again(deployment):
    writer = open_writer(open_deployment(deployment), 1, batch=3)
    first = snowy(writer, "Then")
    written(writer, [first])
    known = (first.speed.prompt_tokens - 1) // 16 * 16
    assert known > 16
    others = [writer.row(f"{name} clock", Sampling(40), Speed()) for name in ("A", "The", "My")]
    written(writer, others[:1])  # in the place that was free for longest
    again = [snowy(writer, "Then"), snowy(writer, "And"), snowy(writer, "Then", anew=True)]
    texts = each_written(writer, again)
    assert [row.speed.cached_tokens for row in again] == [known, known, 0]
    assert again[0].tokens == again[2].tokens == first.tokens
    assert texts[1] == written(writer, [snowy(writer, "And", anew=True)])[0]
    written(writer, others[1:], 3)  # beside each other, so that what is known moves
    longer = snowy(writer, times=5)
    written(writer, [longer])
    assert longer.speed.cached_tokens >= known - 16
    assert longer.tokens == written_tokens(writer, snowy(writer, times=5, anew=True))


def written_tokens(writer, row):
    written(writer, [row])
    return row.tokens


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("beyond", [0, 1])
def test_of_a_prompt_that_is_all_known_the_end_is_read(deployment, beyond):
    writer = open_writer(open_deployment(deployment), 1, batch=2)
    rows = [snowy(writer) for _ in range(3)]
    for row in rows:
        del row.tokens[32 + beyond :]
        row.length = 40
        written(writer, [row])
    assert [row.speed.cached_tokens for row in rows] == [0, *[32 if beyond else 16] * 2]
    assert rows[0].tokens == rows[1].tokens == rows[2].tokens


@pytest.mark.usefixtures("small_parts")
def test_a_client_that_left_leaves_what_was_read_for_it(deployment, monkeypatch):
    monkeypatch.setattr("owl_deploy.inference.writer._READ_S", 0)
    writer = open_writer(open_deployment(deployment), 1, batch=2)
    rows = [snowy(writer), snowy(writer), snowy(writer, anew=True)]
    writer.add(rows[0])
    writer.step()
    writer.step()
    rows[0].ended = True
    each_written(writer, rows[1:])
    assert [row.speed.cached_tokens for row in rows] == [0, 32, 0]
    assert rows[1].tokens == rows[2].tokens


def test_what_fails_ends_all_texts_and_the_next_is_written(writer, alone, monkeypatch):
    rows, (row, *_), (single, *_) = asked(writer)[:2], asked(writer), asked(alone)
    with monkeypatch.context() as broken:
        for one in rows:
            writer.add(one)
        writer.step()
        broken.setattr(writer._slots, "_logits", writer._slots._logits[..., :3])
        with pytest.raises(EngineFailed, match="onnxruntime failed with"):
            writer.step()
    assert all(one.ended for one in rows)
    assert written(writer, [row]) == written(alone, [single])


def test_a_text_goes_on_past_its_ends_where_that_is_asked(deployment, writer, tmp_path):
    """The tokens that it says most are made its ends, which it then must not choose."""
    rows = asked(writer)[:3]
    written(writer, rows)
    said = [token for row in rows for token in row.tokens[-row.speed.new_tokens :]]
    ends = sorted(set(said), key=said.count)[-2:]
    opened = open_deployment(
        changed(deployment, tmp_path / "ends", "model", eos_token_id=ends), trust_library=True
    )
    ending, single = SideBySide(opened, 1, batch=8), OneByOne(opened, 1)
    on = Sampling(ignore_eos=True)
    short, whole = asked(ending)[:3], asked(ending, on)[:3]
    written(ending, [*short, *whole])
    assert sum(row.speed.new_tokens for row in short) < len(said)
    assert [row.speed.new_tokens for row in whole] == [8, 20, 30]
    assert not any(set(ends) & set(row.tokens[-row.speed.new_tokens :]) for row in whole)
    for row, one in zip(whole, asked(single, on), strict=False):
        written(single, [one])
        assert one.tokens == row.tokens


@pytest.mark.parametrize("batch", [1, 2])
def test_a_draft_goes_on_past_the_ends_too(deployment, writer, tmp_path, batch):
    row = asked(writer)[2]
    written(writer, [row])
    ends = row.tokens[-row.speed.new_tokens :][:1]
    opened = open_deployment(
        changed(deployment, tmp_path / "ends", "model", eos_token_id=ends), trust_library=True
    )
    drafting = open_writer(opened, 1, None, chosen_draft(opened, "lookup", None, False), batch)
    short, whole = (asked(drafting, Sampling(ignore_eos=one))[2] for one in (False, True))
    each_written(drafting, [short, whole])
    assert (short.speed.new_tokens, whole.speed.new_tokens) == (1, 30)
    assert not {*ends} & {*whole.tokens[-30:]}


@pytest.mark.usefixtures("small_parts")
def test_with_a_draft_too_a_prompt_is_read_in_parts(deployment, alone):
    """Between which a client may leave, and another come."""
    opened = open_deployment(deployment)
    drafting = open_writer(opened, 1, None, chosen_draft(opened, "lookup", None, False), 2)
    row, single = snowy(drafting), snowy(alone)
    drafting.add(row)
    steps = 0
    while not row.speed.new_tokens:
        drafting.step()
        steps += 1
    assert steps == -(-row.speed.prompt_tokens // 16) > 1
    while not row.ended:
        drafting.step()
    assert row.speed.draft.steps
    left = snowy(drafting, times=5)
    drafting.add(left)
    drafting.step()
    left.ended = True
    again = snowy(drafting, times=5)
    texts = each_written(drafting, [again]) + each_written(alone, [single])
    assert again.speed.cached_tokens == left.speed.cached_tokens + 16
    if kernels() != "amx":  # whose sums of a prompt depend on its parts
        assert (row.tokens, texts[0]) == (single.tokens, written(alone, [snowy(alone, times=5)])[0])


def test_sampled_texts_are_drawn_each_for_itself(writer):
    sampling = Sampling(do_sample=True, max_new_tokens=24)
    rows = [writer.row("The river ran", sampling, Speed()) for _ in range(8)]
    assert len(set(written(writer, rows))) > 4


def test_a_seed_gives_its_text_in_whatever_company(writer):
    """Beside others, each with its tokens chosen in its own way."""
    ways = [
        Sampling(24, do_sample=True, seed=5),
        Sampling(24, do_sample=True, top_k=5, temperature=1.5, seed=5),
        Sampling(24, repetition_penalty=1.3),
        Sampling(24, do_sample=True, repetition_penalty=1.3, top_p=0.8, seed=1),
        Sampling(24),
    ]
    rows, single = ([writer.row("The river ran", one, Speed()) for one in ways] for _ in range(2))
    texts = written(writer, rows, 3)
    assert texts == each_written(writer, single)
    assert len(set(texts)) > 3


def test_a_row_that_fills_the_context_goes_on_beside_a_longer_one(writer, alone):
    def asked(one):
        long = one.row("Snow fell. " * 16, Sampling(max_new_tokens=9), Speed())
        return [long, one.row("T", Sampling(max_new_tokens=UNLIMITED), Speed())]

    rows, single = asked(writer), asked(alone)
    assert len(rows[0].tokens) > CONTEXT // 3
    texts = written(writer, rows)
    assert [len(row.tokens) for row in rows] == [rows[0].length, CONTEXT]
    assert rows[1].speed.context_full
    assert texts == each_written(alone, single)
    assert [row.tokens for row in rows] == [row.tokens for row in single]


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


def test_settings_without_the_size_of_a_head_are_refused_in_a_sentence(owl, deployment, tmp_path):
    decoder = json.loads((deployment / "genai_config.json").read_text())["model"]["decoder"]
    del decoder["head_size"]
    folder = changed(deployment, tmp_path / "folder", "model", decoder=decoder)
    code, _, err = owl("serve", folder, "--port", 0, "--batch", 2, "--trust-library")
    assert (code, "does not say the model's head_size" in " ".join(err.split())) == (2, True), err


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


@pytest.fixture(params=["int4", "lookup"])
def drafted(request, dense, tmp_path):
    """A writer with a draft, and one without."""
    export(dense, tmp_path / "int8", target="owl", precision="int8")
    draft = request.param
    if draft != "lookup":
        export(dense, tmp_path / draft, target="owl", precision=draft)
        draft = tmp_path / draft
    opened = open_deployment(tmp_path / "int8")
    drafting = chosen_draft(opened, draft, None, False)
    return SideBySide(opened, 1, None, drafting, batch=8), OneByOne(opened, 1)


def test_a_request_alone_has_the_draft_and_the_answers_are_the_same(drafted):
    writer, alone = drafted
    for prompt in PROMPTS:
        rows = [one.row(prompt, Sampling(max_new_tokens=40), Speed()) for one in drafted]
        assert written(writer, rows[:1]) == written(alone, rows[1:])
        assert [row.speed.draft is None for row in rows] == [False, True]
    rows, single = asked(writer), asked(alone)
    assert written(writer, rows) == each_written(alone, single)
    assert all(row.speed.draft is None for row in rows[1:])


@pytest.mark.usefixtures("small_parts")
def test_a_draft_goes_on_from_what_is_known(drafted):
    writer, _ = drafted
    rows = [snowy(writer), snowy(writer), snowy(writer, anew=True)]
    each_written(writer, rows)
    assert [row.speed.cached_tokens > 16 for row in rows] == [False, True, False]
    assert rows[0].tokens == rows[1].tokens == rows[2].tokens
    assert all(row.speed.draft is not None for row in rows)


def test_a_seed_gives_the_text_that_it_gives_in_company(drafted):
    writer, _ = drafted
    sampling = Sampling(40, do_sample=True, seed=7)
    rows = [writer.row("The river ran", sampling, Speed()) for _ in range(3)]
    assert len({*each_written(writer, rows[:1]), *written(writer, rows[1:], 9)}) == 1
    assert rows[0].speed.draft is None


@pytest.mark.parametrize("steps", range(5))
def test_a_request_goes_on_without_its_draft_beside_another(drafted, steps):
    """Whatever the draft has put into the cache beyond what was said."""
    writer, alone = drafted
    rows, single = ([asked(one)[2], asked(one)[1]] for one in drafted)
    writer.add(rows[0])
    for _ in range(steps):
        writer.step()
    assert written(writer, rows[1:]) == written(alone, single[1:])
    while not rows[0].ended:
        writer.step()
    each_written(alone, single[:1])
    assert [row.tokens for row in rows] == [row.tokens for row in single]


@pytest.mark.parametrize("others", [1, 3])
def test_a_request_that_is_alone_again_has_its_draft_again(drafted, others):
    """Though more was said meanwhile than a draft proposes; what comes of it adds up."""
    writer, alone = drafted
    row, single = (one.row("The river ran", Sampling(UNLIMITED), Speed()) for one in drafted)
    writer.add(row)
    steps = 0
    for _ in range(others):
        while not row.speed.draft or row.speed.draft.steps == steps:
            writer.step()
        steps = row.speed.draft.steps
        written(writer, [writer.row("A clock", Sampling(20), Speed())])
        assert row.speed.draft.steps == steps
        assert not row.ended
    written(alone, [single])
    while not row.ended:
        writer.step()
    assert row.speed.draft.steps > steps
    assert row.tokens == single.tokens


@pytest.mark.parametrize("batch", [1, 2])
def test_a_drafted_answer_ends_where_nobody_hears_it(dense, tmp_path, batch):
    export(dense, tmp_path / "int8", target="owl", precision="int8")
    opened = open_deployment(tmp_path / "int8")
    writer = open_writer(opened, 1, None, chosen_draft(opened, "lookup", 3, False), batch)
    row = writer.row("The river ran", Sampling(max_new_tokens=40), Speed())
    writer.add(row)
    for _ in range(3):
        writer.step()
    row.ended = True
    assert writer.step() == {}
    assert row.speed.new_tokens == 3


def test_a_token_that_the_model_has_not_ends_nobodys_answer(dense, tmp_path):
    """As where a tokenizer was given one more, and the model was not resized."""
    model = shutil.copytree(dense, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    export(model, tmp_path / "tiny", target="owl", precision="int8")
    writer = open_writer(open_deployment(tmp_path / "tiny"), 1, batch=2)
    row = writer.row("The river", Sampling(max_new_tokens=4), Speed())
    writer.add(row)
    writer.step()
    with pytest.raises(BadInput, match="gives the token 320, and the model has 320"):
        writer.row("The <extra> river", Sampling(), Speed())
    while not row.ended:
        writer.step()
    assert row.speed.new_tokens == 4
