"""`owl generate --draft`: the deployment's own text, whoever proposes it, and who may not."""

import json
import shutil

import numpy as np
import onnxruntime_genai
import pytest

from owl_deploy.export.targets import export
from owl_deploy.inference.generate import generate
from owl_deploy.inference.loading import GENAI_CONFIG
from owl_deploy.inference.rows import Speed
from owl_deploy.inference.sampling import Sampling
from owl_deploy.inference.speculate import Search
from owl_deploy.utils.artefact import MANIFEST, sha256, write_json
from tests import tiny

PROMPTS = ("The river ran", "A small boat came in on the tide. A small boat", "x")


def without_end(folder, *ends):
    """Give the deployment other tokens that end a text, as if it had been exported so."""
    config = folder / GENAI_CONFIG
    values = json.loads(config.read_text())
    values["model"] |= {"eos_token_id": list(ends), "pad_token_id": 0}
    config.write_text(json.dumps(values))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][config.name]["sha256"] = sha256(config)
    write_json(folder / MANIFEST, manifest)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A deployment, a draft of it, and some that fit it less."""
    folder = tmp_path_factory.mktemp("draft")
    model = tiny.write_llama(folder / "model")
    for precision in ("int8", "int4"):
        export(model, folder / precision, target="owl", precision=precision)
        without_end(folder / precision)
    (folder / "other engine").mkdir()
    (folder / "other engine" / "fake.json").write_text('{"vocab": 320}')
    for name in ("other", "short"):
        shutil.copytree(folder / "int4", folder / name)
    tokenizer = folder / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"</s>"', '"<end>"'))
    manifest = json.loads((folder / "short" / MANIFEST).read_text())
    write_json(folder / "short" / MANIFEST, manifest | {"max_context": 256})
    return folder


def told(owl, folders, prompt, *options):
    code, out, err = owl("generate", folders / "int8", prompt, "--json", *options)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("rule", [(), ("--repetition-penalty", 1.2)])
def test_the_text_is_the_deployments_own(owl, folders, prompt, rule):
    alone = told(owl, folders, prompt, "-n", 40, *rule)
    assert alone["draft"] is None
    for draft in (folders / "int4", "lookup"):
        for count in (1, 3, 15):
            found = told(
                owl, folders, prompt, "-n", 40, *rule, "--draft", draft, "--draft-tokens", count
            )
            assert found["text"] == alone["text"]
            assert found["new_tokens"] == alone["new_tokens"] == 40
            tally = found["draft"]
            assert tally["made"] == tally["accepted"] + tally["steps"] >= 39
            assert tally["proposed"] <= count * tally["steps"]


def test_it_ends_where_the_deployment_does(owl, folders, tmp_path):
    whole = told(owl, folders, PROMPTS[0], "-n", -1)
    assert whole["context_full"]
    ending = tmp_path / "int8"
    shutil.copytree(folders / "int8", ending)
    model = onnxruntime_genai.Model(str(folders / "int8"))
    tokens = onnxruntime_genai.Tokenizer(model).encode(PROMPTS[0] + whole["text"])
    for end in tokens[20:24].tolist():
        without_end(ending, end, 5)
        alone = told(owl, tmp_path, PROMPTS[0], "-n", -1)
        for draft in (folders / "int4", "lookup"):
            found = told(owl, tmp_path, PROMPTS[0], "-n", -1, "--draft", draft)
            parts = ("text", "new_tokens", "context_full")
            assert [found[part] for part in parts] == [alone[part] for part in parts]
    for draft in (folders / "int4", "lookup"):
        found = told(owl, folders, PROMPTS[0], "-n", -1, "--draft", draft)
        assert (found["text"], found["context_full"]) == (whole["text"], True)


def test_it_comes_in_pieces_and_what_came_of_the_proposals_is_said(owl, folders):
    speed = Speed()
    draft = {"draft": folders / "int4", "draft_tokens": 2}
    sampling = Sampling(max_new_tokens=12)
    running = generate(folders / "int8", PROMPTS[0], sampling, speed, **draft)
    first = next(running)
    assert (speed.new_tokens, speed.draft.steps) == (1, 0)
    pieces = [first, *running]
    assert len(pieces) == 12
    assert "".join(pieces) == told(owl, folders, PROMPTS[0], "-n", 12)["text"]
    asked = ("generate", folders / "int8", PROMPTS[0], "-n", 12)
    assert "a step" not in owl(*asked)[2]
    said = owl(*asked, "--draft", folders / "int4", "--draft-tokens", 2)[2]
    share = f"of {speed.draft.proposed} tokens proposed {speed.draft.share_accepted:.0%} accepted"
    assert f"{share}, {speed.draft.tokens_per_step:.2f} tokens a step" in said


def test_a_seed_gives_the_same_text_again(owl, folders):
    asked = ("-n", 30, "--do-sample", "--temperature", 0.9, "--draft", folders / "int4", "--seed")
    texts = [told(owl, folders, PROMPTS[0], *asked, seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_are_sampled_as_without_a_draft(folders):
    """onnxruntime-genai's own next tokens have the distribution that drafts are accepted by."""
    options = {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "repetition_penalty": 1.5}
    model = onnxruntime_genai.Model(str(folders / "int8"))
    prompt = onnxruntime_genai.Tokenizer(model).encode(PROMPTS[0])
    counts = dict.fromkeys(range(320), 0)
    for seed in range(600):
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + 1
        parameters.set_search_options(
            max_length=length, do_sample=True, random_seed=seed, **options
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        logits = generator.get_logits()[0, -1]
        generator.generate_next_token()
        counts[int(generator.get_next_tokens()[0])] += 1
    choice = Search(do_sample=True, **options)(logits, prompt.tolist())
    assert {token for token, count in counts.items() if count} == set(choice.tokens.tolist())
    found = np.array([counts[token] for token in choice.tokens]) / 600
    error = np.sqrt(choice.probabilities * (1 - choice.probabilities) / 600)
    assert (np.abs(found - choice.probabilities) < 4 * error).all()


@pytest.mark.parametrize(
    ("deployment", "options", "complaint"),
    [
        ("int8", ("--draft", "{}/int8"), "cannot draft for itself"),
        ("int8", ("--draft", "{}/none"), "The draft {}/none does not exist. Give a deployment's"),
        ("int8", ("--draft", "{}/model"), "is not a deployment"),
        ("int8", ("--draft", "{}/other engine"), "{}/other engine has no genai_config.json"),
        ("other engine", ("--draft", "lookup"), "so onnxruntime-genai cannot open it."),
        ("int8", ("--draft", "{}/other"), "has other tokens than {}/int8"),
        ("int8", ("--draft", "{}/short"), "takes 256 tokens, and {}/int8 takes 512"),
        ("int8", ("--draft", "lookup", "--draft-tokens", 0), "--draft-tokens 0 is impossible"),
        ("int8", ("--draft", "lookup", "--draft-tokens", 16), "Give 1 to 15."),
        ("int8", ("--draft-tokens", 3), "there is none. Give --draft too."),
    ],
)
def test_what_cannot_draft_is_said_in_a_sentence(owl, folders, deployment, options, complaint):
    options = [str(option).format(folders) for option in options]
    code, out, err = owl("generate", folders / deployment, "x", *options)
    assert (code, out, complaint.format(folders) in err) == (2, "", True), err
    assert err.count("\n") == 1


def test_bench_compares_with_and_without_the_draft(owl, folders, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    asked = ("bench", folders / "int8", "--draft", folders / "int4", "--prompts", prompts)
    small = ("--new-tokens", 8, "--context", 64, "--pairs", 1, "--threads", 1)
    code, out, err = owl(*asked, *small, "--json")
    assert code == 0, err
    result = json.loads(out)
    drafted, alone = result["subjects"]
    assert (drafted["name"], alone["name"]) == ("int8 with int4", "int8")
    assert (drafted["role"], alone["role"]) == ("candidate", "baseline")
    assert (drafted["draft"], drafted["draft_tokens"]) == (str(folders / "int4"), 0)
    tally = drafted["samples"][0]["draft"]
    assert tally["made"] == tally["accepted"] + tally["steps"] > 0
    assert alone["samples"][0]["draft"] == {}
    (note,) = [note for note in result["notes"] if note.startswith("int8 with int4")]
    assert f"{tally['share_accepted']:.0%} were accepted" in note
    assert result["comparisons"][0]["scenario"] == "answers@8:token"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--scenario", "decode"), "A draft is measured on real prompts"),
        (("--context", 64), "The longest prompt has"),
        (("--save-baseline", "x.json"), "A draft is compared with none"),
        (("--prompts", "none.jsonl"), "none.jsonl cannot be read"),
    ],
)
def test_what_bench_cannot_do_with_a_draft_is_said(owl, folders, options, complaint):
    code, out, err = owl("bench", folders / "int8", "--draft", "lookup", *options)
    assert (code, out, complaint in err) == (2, "", True), err
