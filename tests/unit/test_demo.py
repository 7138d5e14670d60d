from owl_deploy.demo import FIRST_LOOK, FULL, meaning


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


def test_says_when_sparsity_does_not_pay():
    text = meaning([row("dense", 50, 15, dense=True), row("OWL 50 %", 40, 30)])
    assert "the fastest that keeps the model's quality is dense fp32 in onnxruntime" in text
    assert "No sparse deployment pays here" in text


def test_a_faster_sparse_one_is_named_with_its_loss():
    table = [
        row("dense", 50, 15, dense=True),
        row("dense int4", 60, 18, dense=True),
        row("OWL 50 %", 90, 30, engine="owl"),
        row("OWL 70 %", 200, 400, engine="owl"),
    ]
    text = meaning(table)
    assert "dense fp32 in onnxruntime, 50 tokens/s at perplexity 15.0" in text
    assert "OWL 50 % fp32 in owl is 1.80x as fast, at perplexity 30.0" in text
    assert "OWL 70 %: whatever the speed" in text
    assert "200" not in text  # a ruined model is not recommended for its speed


def test_a_sparse_one_can_be_the_best_of_all():
    text = meaning([row("dense", 50, 15, dense=True), row("OWL 50 %", 90, 15.5)])
    assert "is OWL 50 % fp32 in onnxruntime, 90 tokens/s" in text
    assert "No sparse" not in text


def test_the_first_look_is_a_part_of_the_full_demo():
    full = {variant.name: variant for variant in FULL.variants}
    for variant in FIRST_LOOK.variants:
        assert variant.settings == full[variant.name].settings
        assert set(variant.roads) <= set(full[variant.name].roads)
    assert FIRST_LOOK.windows < FULL.windows
