from owl_deploy.demo import meaning


def row(model, speed, perplexity, *, dense=False, engine="onnxruntime"):
    return {
        "model": model,
        "engine": engine,
        "precision": "fp32",
        "perplexity": perplexity,
        "decode_tokens_per_s": speed,
        "prefill_ms": 100.0,
        "speedup": "",
        "dense": dense,
    }


def test_says_when_dense_is_both_faster_and_better():
    text = meaning([row("dense", 50, 15, dense=True), row("OWL 50 %", 40, 30)])
    assert "no sparse deployment pays" in text
    assert "dense fp32 in onnxruntime decodes 50 tokens/s" in text


def test_names_the_fastest_that_no_dense_one_dominates():
    table = [
        row("dense", 50, 15, dense=True),
        row("dense int4", 60, 18, dense=True),
        row("OWL 50 %", 90, 30, engine="owl"),
        row("OWL 70 %", 55, 400),
    ]
    text = meaning(table)
    assert "OWL 50 % fp32 in owl decodes 90 tokens/s" in text
    assert "1.50x the fastest dense one (dense int4 fp32 in onnxruntime" in text


def test_a_sparse_model_that_is_better_and_slower_is_a_choice():
    text = meaning([row("dense int4", 60, 18, dense=True), row("OWL 50 %", 40, 16)])
    assert "0.67x the fastest dense one" in text
