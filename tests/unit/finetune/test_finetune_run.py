import json
import math
import os
import shutil
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from owl_deploy.compression import recipe
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.tokens import load_tokens
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.evaluate.perplexity import perplexity
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.finetune import needs
from owl_deploy.finetune import run as module
from owl_deploy.finetune import train as training
from owl_deploy.finetune.run import Run, finetune
from owl_deploy.finetune.settings import resolved
from owl_deploy.finetune.show import caption
from owl_deploy.finetune.source import Source
from owl_deploy.models import adapter
from owl_deploy.models.checkpoint import Checkpoint
from owl_deploy.models.measurements import measurement
from owl_deploy.utils.ending import Defect
from owl_deploy.utils.ranks import Ranks
from tests import alike, tiny
from tests.reference import finetune as reference
from tests.reference.divergence import divergence

QUICK = {
    "sequence_length": 32,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "phi3"])
@pytest.mark.parametrize("how", [{"method": "masked"}, {"merge": "masked"}], ids=str)
def test_every_zero_stays_and_no_other_comes(models, text_file, tmp_path, family, how):
    _, sparse = models(family)
    manifest = finetune(sparse, tmp_path / "out", str(text_file), QUICK | how).to_json()
    before, after = weights(sparse), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        if tensor.ndim == 2:
            assert torch.equal(tensor == 0, after[name] == 0), name
        assert tensor.dtype == after[name].dtype
        if not name.startswith(tuple(Source(sparse).blocks)):
            assert torch.equal(tensor, after[name]), name
        changed += not torch.equal(tensor, after[name])
    assert changed >= 2
    held_out = manifest["finetune"]["held_out_loss"]
    assert held_out["after"] < held_out["before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_was_measured_before_is_not_said_of_the_result(models, text_file, tmp_path):
    _, sparse = models("llama")
    evaluated = shutil.copytree(sparse, tmp_path / "evaluated")
    perplexity(evaluated, EvaluationSettings(str(text_file), window=64, windows=1))
    assert measurement(evaluated, "perplexity")
    settings = QUICK | {"method": "masked"}
    manifest = finetune(evaluated, tmp_path / "out", str(text_file), settings).to_json()
    assert measurement(tmp_path / "out", "perplexity") is None
    assert not {"perplexity", "tasks", "measured"} & manifest.keys()
    assert manifest["blocks"] == json.loads((sparse / "owl.json").read_text())["blocks"]


def test_the_manifest_says_what_was_pruned_and_what_was_trained(models, text_file, tmp_path):
    dense, sparse = models("llama")
    values = QUICK | {"method": "masked", "temperature": 2.0}
    finetune(sparse, tmp_path / "out", str(text_file), values, teacher=dense)
    manifest = json.loads((tmp_path / "out" / "owl.json").read_text())
    pruning = json.loads((sparse / "owl.json").read_text())
    assert {key: manifest[key] for key in pruning} == pruning
    done = manifest["finetune"]
    assert done["checkpoint"]["weights_sha256"] == adapter.weights_digest(Checkpoint(sparse))
    assert (done["steps"], done["tokens"]) == (4, 4 * 4 * 32)
    assert done["settings"]["temperature"] == 2.0
    assert done["teacher"] == str(dense)
    assert [row["step"] for row in done["curve"] if "eval_loss" in row] == [0, 1, 2, 3, 4]
    assert "<svg" in (tmp_path / "out" / "learning_curve.svg").read_text()
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert text.startswith("# Then fine-tuned by owl: masked")
    assert recipe.load(tmp_path / "out" / "recipe.yaml") == recipe.load(sparse / "recipe.yaml")


def test_block_groups_train_every_block(models, text_file, tmp_path):
    _, sparse = models("llama")
    values = QUICK | {"method": "masked", "block_group": 1}
    manifest = finetune(sparse, tmp_path / "out", str(text_file), values).to_json()
    before, after = weights(sparse), weights(tmp_path / "out")
    for block in range(2):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert not torch.equal(before[name], after[name])
    assert manifest["finetune"]["steps"] == 4
    steps = [row["step"] for row in manifest["finetune"]["curve"]]
    assert steps == sorted(steps)
    # The second group begins where the first one ended.
    rows = [row for row in manifest["finetune"]["curve"] if "eval_loss" in row]
    ((end, begin),) = [two for two in pairwise(rows) if two[0]["step"] == two[1]["step"] == 2]
    assert begin["eval_loss"] == pytest.approx(end["eval_loss"], rel=1e-6)
    assert begin["eval_loss"] < rows[0]["eval_loss"]


def test_steps_are_divided_over_the_groups(models, text_file, tmp_path):
    _, sparse = models("llama")
    values = QUICK | {"method": "masked", "block_group": 1, "max_steps": 3}
    manifest = finetune(sparse, tmp_path / "out", text_file, values)  # a Path may be a text, too
    assert manifest.finetune.steps == 3
    with pytest.raises(BadInput, match="1 step, and 2 groups of blocks"):
        finetune(sparse, tmp_path / "none", text_file, values | {"max_steps": 1})


def test_bfloat16_checkpoint_and_products(models, text_file, tmp_path):
    _, sparse = models("llama")
    half = shutil.copytree(sparse, tmp_path / "half")
    model = transformers.AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.bfloat16)
    model.save_pretrained(half)
    values = QUICK | {"method": "masked", "dtype": "bfloat16"}
    manifest = finetune(half, tmp_path / "out", str(text_file), values).to_json()
    after = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert (
        manifest["finetune"]["held_out_loss"]["after"]
        < manifest["finetune"]["held_out_loss"]["before"]
    )


def test_weights_are_trained_as_the_files_hold_them(models, text_file, tmp_path):
    """Whatever config.json says of their dtype."""
    _, sparse = models("llama")
    said = shutil.copytree(sparse, tmp_path / "said")
    config = json.loads((said / "config.json").read_text())
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (said / "config.json").write_text(json.dumps(config))
    values = {"method": "masked", "dtype": "bfloat16", "learning_rate": 1e-12, "max_steps": 1}
    finetune(said, tmp_path / "out", str(text_file), QUICK | values)
    before, after = weights(said), weights(tmp_path / "out")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-9)


def test_a_loss_that_is_no_perplexitys_ends_it_before_a_step(models, text_file, tmp_path):
    _, sparse = models("llama")
    wrong = shutil.copytree(sparse, tmp_path / "wrong")
    (file,) = wrong.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"The loss is .* at step 0\. Nothing was trained yet"):
        finetune(wrong, tmp_path / "out", str(text_file), QUICK)


def test_the_adapter_is_pefts_and_its_merge_is_the_formula(models, text_file, tmp_path):
    _, sparse = models("llama")
    finetune(sparse, tmp_path / "adapter", str(text_file), QUICK)
    finetune(sparse, tmp_path / "merged", str(text_file), QUICK | {"merge": "masked"})
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "learning_curve.svg",
        "owl.json",
    ]
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = weights(sparse), weights(tmp_path / "merged")
    for block in range(2):
        for layer in ("q_proj", "v_proj"):
            name = f"model.layers.{block}.self_attn.{layer}"
            a, b = (parts[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            assert a.shape[0] == 8
            assert b.abs().max() > 0
            expected = reference.merge_under_the_mask(before[f"{name}.weight"], a, b, 16 / 8)
            torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=0, atol=1e-6)

    with_it = perplexity(
        sparse,
        EvaluationSettings(str(text_file), window=32, windows=9, adapter=tmp_path / "adapter"),
    )
    assert (
        with_it.value
        < perplexity(sparse, EvaluationSettings(str(text_file), window=32, windows=9)).value
    )


def test_an_adapter_for_another_model(models, text_file, tmp_path):
    dense, sparse = models("llama")
    finetune(sparse, tmp_path / "adapter", str(text_file), QUICK)
    with pytest.raises(BadInput, match=r"is not for .* it was trained on"):
        perplexity(
            dense,
            EvaluationSettings(str(text_file), window=32, windows=1, adapter=tmp_path / "adapter"),
        )
    (tmp_path / "adapter" / "owl.json").unlink()  # as from elsewhere: names and shapes decide
    for family, changes in (("opt", {}), ("llama", {"num_hidden_layers": 3})):
        other = tiny.write_model(family, tmp_path / f"{family}-other", **changes)
        with pytest.raises(BadInput, match="is not for"):
            perplexity(
                other,
                EvaluationSettings(
                    str(text_file), window=32, windows=1, adapter=tmp_path / "adapter"
                ),
            )
    with pytest.raises(BadInput, match=r"no adapter_config\.json"):
        perplexity(sparse, EvaluationSettings(str(text_file), window=32, windows=1, adapter=sparse))


def test_a_lost_mask_is_seen_before_anything_appears(models, text_file, tmp_path, monkeypatch):
    _, sparse = models("llama")

    def careless(source, deltas):
        return {name: source.checkpoint.read(name) + delta for name, delta in deltas}, 0

    monkeypatch.setattr(module, "merged", careless)
    with pytest.raises(Defect, match="zeros of"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK | {"merge": "masked"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_what_is_replaced_while_it_is_read_makes_nothing(
    models, text_file, tmp_path, monkeypatch, which
):
    dense, sparse = (shutil.copytree(one, tmp_path / one.name) for one in models("llama"))
    execute = Run.execute

    def replacing(self, partial):
        outcome = execute(self, partial)
        os.utime({"model": sparse, "teacher": dense}[which] / "model.safetensors")
        return outcome

    monkeypatch.setattr(Run, "execute", replacing)
    asked = QUICK | {"method": "masked", "max_steps": 1}
    with pytest.raises(EnvironmentFailed, match=f"the {which} was replaced"):
        finetune(sparse, tmp_path / "out", str(text_file), asked, teacher=str(dense))
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_seen_before_anything_is_trained(
    models, text_file, tmp_path, monkeypatch
):
    _, sparse = models("llama")
    source = Source(sparse)
    files = sum(path.stat().st_size for path in sparse.glob("*.safetensors"))
    saved = 3 * 12 * (source.weights - source.zeros)  # Adam's moments too, each before one goes
    free = SimpleNamespace(free=2 * files + saved - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(module.Run, "execute", lambda *_: 1 / 0)
    with pytest.raises(BadInput, match=r"The result, with what is saved on the way, needs"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK | {"method": "masked"})
    assert list(tmp_path.iterdir()) == []
    free.free += 1
    with pytest.raises(ZeroDivisionError):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK | {"method": "masked"})


@pytest.mark.parametrize("group", [1, 2])
def test_a_memory_too_small_is_seen_before_anything_is_trained(
    models, text_file, tmp_path, monkeypatch, group
):
    dense, sparse = models("llama")
    source = Source(sparse)
    trained = group * source.weights // len(source.blocks)
    survivors = math.ceil(group * (source.weights - source.zeros) / len(source.blocks))
    logits = 4 * 32 * source.checkpoint.config["vocab_size"]
    # Two models in 16 bits, of one of which a part is in 32; three times the logits.
    least = 2 * 2 * source.checkpoint.weights() + 2 * trained + 16 * survivors + 3 * 4 * logits
    asked = QUICK | {"method": "masked", "block_group": group}
    monkeypatch.setattr(module.Run, "execute", lambda *_: 1 / 0)
    monkeypatch.setattr(needs, "free_memory", lambda: least - 1)
    with pytest.raises(BadInput, match=r"This training takes at least .*--block-group"):
        finetune(sparse, tmp_path / "out", str(text_file), asked, teacher=str(dense))
    monkeypatch.setattr(needs, "free_memory", lambda: 1000)
    with pytest.raises(BadInput, match=r"Train an adapter of a smaller --rank, or smaller batches"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK, teacher=str(dense))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(needs, "free_memory", lambda: least)
    with pytest.raises(ZeroDivisionError):
        finetune(sparse, tmp_path / "out", str(text_file), asked, teacher=str(dense))


def losses(manifest):
    return [(row.step, row.loss, row.eval_loss) for row in manifest.finetune.curve]


def test_ctrl_c_finishes_the_step_and_resumes_to_the_same(models, text_file, tmp_path, monkeypatch):
    _, sparse = models("llama")
    whole = finetune(sparse, tmp_path / "whole", str(text_file), QUICK)
    with monkeypatch.context() as patched:
        step_end = training._Clock.on_step_end

        def interrupted(self, args, state, control, **more):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            step_end(self, args, state, control, **more)

        patched.setattr(training._Clock, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(sparse, tmp_path / "out", str(text_file), QUICK)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="was interrupted"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK)
    resumed = finetune(sparse, tmp_path / "out", str(text_file), QUICK, resume=True)
    assert losses(resumed) == losses(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_teacher_is_no_run_to_resume(models, text_file, tmp_path, monkeypatch):
    dense, sparse = models("llama")
    teacher = shutil.copytree(dense, tmp_path / "teacher")
    with monkeypatch.context() as patched:
        patched.setattr(module.Run, "complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(module._Unfinished, "has_work", True)
        with pytest.raises(KeyboardInterrupt):
            finetune(sparse, tmp_path / "out", str(text_file), QUICK, teacher=str(teacher))
    tensors = {name: 2 * one for name, one in weights(teacher).items()}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"other arguments: teacher\.files\.model\.safetensors was"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK, teacher=str(teacher), resume=True)


def test_a_mask_and_a_manifest_that_disagree(models, text_file, tmp_path):
    _, sparse = models("llama")
    changed = shutil.copytree(sparse, tmp_path / "changed")
    tensors = weights(changed)
    tensors["model.layers.1.mlp.up_proj.weight"][0, :5] = 0.5
    save_file(tensors, changed / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.layers\.1 .* its manifest says 60\.\d\d%"):
        finetune(changed, tmp_path / "out", str(text_file), QUICK)


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
def test_the_teachers_logits_count_by_their_weight(models, tmp_path, share):
    dense, sparse = models("llama")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    windows = Source(sparse).windows([str(tmp_path / "text.txt")], 32)[0].long()
    # One batch of all windows: the order in which they are drawn is nothing to the loss.
    values = QUICK | {"batch_size": len(windows), "max_steps": 1, "learning_rate": 1e-4}
    values |= {} if share is None else {"teacher_weight": share}
    text = str(tmp_path / "text.txt")
    manifest = finetune(sparse, tmp_path / "out", text, values, teacher=str(dense))
    (first,) = (row.loss for row in manifest.finetune.curve if row.loss is not None)

    teacher, student = map(transformers.AutoModelForCausalLM.from_pretrained, (dense, sparse))
    linears = {
        name: module.weight
        for name, module in student.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    told = divergence(teacher, linears, windows[:, :-1])  # the last token predicts nothing
    with torch.no_grad():
        untold = student(input_ids=windows, labels=windows).loss.item()
    assert abs(told - untold) > 1
    share = 0.5 if share is None else share
    assert first == pytest.approx(share * told + (1 - share) * untold, rel=1e-5)


def test_a_teacher_that_takes_less_than_a_window(models, text_file, tmp_path):
    dense, sparse = models("llama")
    teacher = shutil.copytree(dense, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    for longest, words in ((16, "teacher takes 16 tokens, not 32"), ("64", "'64' in .*teacher's")):
        config["max_position_embeddings"] = longest
        (teacher / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match=words):
            finetune(sparse, tmp_path / "out", str(text_file), QUICK, teacher=str(teacher))


def test_a_teacher_with_another_vocabulary(models, text_file, tmp_path):
    _, sparse = models("llama")
    other = tiny.write_llama(tmp_path / "other", vocab_size=352)
    with pytest.raises(BadInput, match="another vocabulary"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK, teacher=str(other))
    tiny.write_tokenizer(other, vocabulary=300)
    same_size = tiny.write_llama(tmp_path / "same-size")
    tiny.write_tokenizer(same_size, vocabulary=300)
    with pytest.raises(BadInput, match="another vocabulary"):
        finetune(sparse, tmp_path / "out", str(text_file), QUICK, teacher=str(same_size))


def test_blocks_are_compared_with_a_teacher_that_has_as_many(models, text_file, tmp_path):
    dense, sparse = models("llama")
    other = tiny.write_llama(tmp_path / "other", num_hidden_layers=3)
    values = QUICK | {"feature_weight": 1.0}
    with pytest.raises(BadInput, match="teacher has 3 of width 64, the student 2"):
        finetune(sparse, tmp_path / "out", str(text_file), values, teacher=str(other))
    for how in ({"method": "masked", "block_group": 1}, {"merge": "masked"}):
        done = finetune(
            sparse, tmp_path / "out", str(text_file), values | how, teacher=str(dense), force=True
        )
        assert done.finetune.held_out_loss.after < done.finetune.held_out_loss.before


def test_several_texts_are_one_after_another(models, text_file, tmp_path):
    _, sparse = models("llama")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "more.txt").write_text(tiny.text(2000))
    texts = [str(text_file), str(folder)]
    manifest = finetune(sparse, tmp_path / "out", texts, QUICK | {"method": "masked"}).to_json()
    one = finetune(sparse, tmp_path / "one", texts[0], QUICK | {"method": "masked"}).to_json()
    told, alone = (each["finetune"]["text"] for each in (manifest, one))
    assert (told["source"], alone["source"]) == (texts, texts[0])
    assert told["windows"] > 1.4 * alone["windows"]


def test_a_cache_of_the_teacher_changes_nothing(models, text_file, tmp_path, monkeypatch):
    dense, sparse = models("llama")
    values = QUICK | {"method": "masked", "block_group": 1, "teacher_top": 8, "max_steps": 8}
    asked, made = [], module.TeacherCache.of

    def counted(self, windows, make):
        def noted(places):
            asked.extend(windows[places].tolist())
            return make(places)

        return made(self, windows, noted)

    monkeypatch.setattr(module.TeacherCache, "of", counted)
    kept = finetune(sparse, tmp_path / "kept", str(text_file), values, teacher=str(dense))
    assert len(asked) == len(set(asked))
    assert 4 * 4 < len(asked) < 2 * 4 * 4  # the second group reads the text in another order
    monkeypatch.setattr(needs.Needs, "cache_bytes", 0)
    again = finetune(sparse, tmp_path / "again", str(text_file), values, teacher=str(dense))
    assert losses(kept) == losses(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "kept"]


@pytest.mark.parametrize("how", [{"method": "masked"}, {}], ids=str)
def test_the_teachers_own_loss_is_told(models, text_file, tmp_path, how):
    """Below it a student has learnt the text's ways, and not what it had lost."""
    dense, sparse = models("llama")
    done = finetune(sparse, tmp_path / "out", str(text_file), QUICK | how, teacher=str(dense))
    assert done.finetune is not None
    held_out = Source(sparse).windows([str(text_file)], 32)[1].long()
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        wanted = float(model(input_ids=held_out, labels=held_out).loss)
    assert done.finetune.held_out_loss.teacher == pytest.approx(wanted, rel=1e-5)
    assert f"the teacher has {wanted:.4f}" in caption("out", done.finetune)
    assert "the teacher's" in (tmp_path / "out" / "learning_curve.svg").read_text()
    alone = finetune(sparse, tmp_path / "alone", str(text_file), QUICK | how)
    assert alone.finetune is not None
    assert alone.finetune.held_out_loss.teacher is None
    assert "teacher" not in caption("alone", alone.finetune)


def test_no_room_for_the_teachers_cache(models, text_file, tmp_path, monkeypatch):
    dense, sparse = models("llama")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    monkeypatch.setattr(module.Run, "execute", lambda *_: 1 / 0)
    values = QUICK | {"teacher_top": 300, "max_steps": 10**6}
    with pytest.raises(BadInput, match=r"The teacher's cache .* the disk has 2\.0 MB left"):
        finetune(sparse, tmp_path / "out", str(text_file), values, teacher=str(dense))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError):  # in one pass nothing comes again
        finetune(
            sparse,
            tmp_path / "out",
            str(text_file),
            QUICK | {"teacher_top": 300},
            teacher=str(dense),
        )


@pytest.mark.parametrize("how", ["resume", "force"])
def test_room_that_an_earlier_run_has_taken_is_there_for_the_next(
    models, text_file, tmp_path, monkeypatch, how
):
    dense, sparse = models("llama")
    values = QUICK | {"teacher_top": 300, "max_steps": 10**6}

    def run(**how):
        finetune(sparse, tmp_path / "out", str(text_file), values, teacher=str(dense), **how)

    def cut_off(run, partial):
        nonlocal left
        (partial.folder / "group-0.json").write_text("{}")  # so that it is worth resuming
        (partial.folder / "teacher-0.ids").write_bytes(bytes(run.needs.cache_bytes))
        left -= run.needs.cache_bytes
        raise KeyboardInterrupt

    left = 50_000_000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=left))
    monkeypatch.setattr(module.Run, "execute", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    left = min(
        left,
        module.Run(
            Source(sparse), resolved(values, teacher=True), str(text_file), str(dense)
        ).needs.cache_bytes,
    )
    monkeypatch.setattr(module.Run, "execute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(**{how: True})


def test_more_of_the_teachers_tokens_than_there_are(models, text_file, tmp_path):
    dense, sparse = models("llama")
    with pytest.raises(BadInput, match="below the vocabulary's 320"):
        finetune(
            sparse,
            tmp_path / "out",
            str(text_file),
            QUICK | {"teacher_top": 320},
            teacher=str(dense),
        )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_steps": "many"}, "max_steps in the settings of a fine-tuning is 'many'"),
        ({"max_step": 3}, "Unknown key 'max_step'"),
        ({"seed": -1}, "--seed must be between 0 and 2147483647"),
    ],
)
def test_settings_that_are_none_are_said_in_a_sentence(values, said):
    with pytest.raises(BadInput, match=said):
        resolved(values, teacher=False)


@pytest.mark.parametrize("skip", ["model.layers.0", "model.layers.0.self_attn", "mlp.down_proj"])
def test_what_pruning_skipped_is_not_counted(models, text_file, tmp_path, skip):
    dense, _ = models("llama")
    settings = PruneSettings.checked(
        method="magnitude", allocation="uniform", sparsity=0.5, skip=(skip,)
    )
    prune(dense, tmp_path / "sparse", settings, None)
    asked = QUICK | {"method": "masked", "max_steps": 1}
    finetune(tmp_path / "sparse", tmp_path / "out", str(text_file), asked)


def test_what_is_held_out_is_not_trained_on(models, text_file):
    _, sparse = models("llama")
    train, held_out = Source(sparse).windows([str(text_file)], 32)
    tokens = load_tokens(sparse, [str(text_file)])
    count = len(tokens) // 32
    assert (1 <= len(held_out) <= 8, len(train) + len(held_out)) == (True, count)
    assert torch.equal(torch.cat((train, held_out)).flatten(), tokens[: count * 32])


@pytest.mark.parametrize("targets", [None, ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")])
def test_a_merge_is_told_as_it_is_written(models, text_file, tmp_path, targets):
    _, sparse = models("llama")
    how = QUICK | {"merge": "masked", "max_steps": 20, "target_modules": targets}
    done = finetune(sparse, tmp_path / "out", str(text_file), how).finetune
    windows = Source(sparse).windows([str(text_file)], 32)[1].long()
    model = Checkpoint(tmp_path / "out").load(torch.float32)
    with torch.no_grad():
        found = model(input_ids=windows, labels=windows).loss.item()
    assert done.held_out_loss.after == pytest.approx(found, rel=1e-4)
    *_, trained, written = [row.eval_loss for row in done.curve if row.eval_loss is not None]
    assert written == done.held_out_loss.after != pytest.approx(trained, rel=1e-4)


@pytest.mark.parametrize("group", [None, 1])
def test_ctrl_c_in_the_last_evaluation_loses_nothing(
    models, text_file, tmp_path, monkeypatch, group
):
    _, sparse = models("llama")
    asked = QUICK | {"method": "masked", "block_group": group}
    whole = finetune(sparse, tmp_path / "whole", str(text_file), asked)
    told = []
    with monkeypatch.context() as patched:
        evaluated = training._Clock.on_evaluate

        def interrupted(self, args, state, control, **more):
            if state.global_step == state.max_steps and not told:
                told.append(state.global_step)
                os.kill(os.getpid(), signal.SIGINT)
            evaluated(self, args, state, control, **more)

        patched.setattr(training._Clock, "on_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(sparse, tmp_path / "out", str(text_file), asked)
        resumed = finetune(sparse, tmp_path / "out", str(text_file), asked, resume=True)
    assert losses(resumed) == losses(whole)
    lora = finetune(sparse, tmp_path / "adapter", str(text_file), QUICK)
    assert lora.finetune.steps == 4


def one_of_two(sparse, text, **other):
    """A process that makes its run, asked `other` than `QUICK`."""
    settings = resolved(QUICK | {"method": "masked"} | other, teacher=False)
    return lambda ranks: Run(Source(sparse), settings, text, None, ranks)


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("--learning-rate", {"learning_rate": 1e-1}),
        ("--max-steps", {"max_steps": 3}),
        ("--sequence-length", {"sequence_length": 16}),
        ("--dtype", {"dtype": "bfloat16"}),
        ("--shard", {"shard": True}),
    ],
)
def test_processes_with_other_settings_are_refused(models, text_file, monkeypatch, what, other):
    _, sparse = models("llama")
    usual, others = (one_of_two(sparse, str(text_file), **told) for told in ({}, other))
    said = alike.refused(monkeypatch, usual, others)
    assert said.startswith(f"Not all processes of this run have the same {what}. Give every node")


def test_processes_whose_processors_choose_another_dtype_are_refused(
    models, text_file, monkeypatch
):
    _, sparse = models("llama")

    def on(fast):
        def made(ranks):
            monkeypatch.setattr("owl_deploy.utils.hardware.multiplies_bfloat16", lambda _: fast)
            return one_of_two(sparse, str(text_file), dtype="auto")(ranks)

        return made

    said = alike.refused(monkeypatch, on(True), on(False))
    assert "the same dtype. Give every node the same files and options, and name --dtype." in said


def test_processes_with_another_grid_or_device_are_refused(
    models, text_file, tmp_path, monkeypatch
):
    _, sparse = models("llama")
    usual = one_of_two(sparse, str(text_file))

    def with_another(what, value):
        def made(ranks):
            asked = Run.asked
            with monkeypatch.context() as patch:
                patch.setattr(Run, "asked", lambda self: asked(self) | {what: value})
                return usual(ranks)

        return made

    for what, value, told in (("grid", "0" * 64, "grid"), ("device", "cuda", "kind of device")):
        said = alike.refused(monkeypatch, usual, with_another(what, value))
        assert said.startswith(f"Not all processes of this run have the same {told}.")


def test_processes_with_other_numbers_of_threads_train_together(models, text_file, monkeypatch):
    _, sparse = models("llama")
    told = []
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: told.append(value) or [value] * 2)
    one_of_two(sparse, str(text_file))(Ranks(0, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    one_of_two(sparse, str(text_file))(Ranks(0, 2))
    first, second = filter(None, told)
    assert first == second
