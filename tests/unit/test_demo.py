from owl_deploy.demo import FIRST_LOOK, FULL


def test_the_first_look_is_a_part_of_the_full_demo():
    full = {variant.name: variant for variant in FULL.variants}
    for variant in FIRST_LOOK.variants:
        assert variant.settings == full[variant.name].settings
        assert set(variant.roads) <= set(full[variant.name].roads)
    assert FIRST_LOOK.windows < FULL.windows
