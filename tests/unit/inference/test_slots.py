"""Places of texts, over a graph made by hand whose caches hold the tokens themselves."""

import ctypes
import random
from types import SimpleNamespace

import numpy as np
import pytest

from owl_deploy.inference.slots import Slots

ROWS, LENGTH, VOCABULARY, PART = 4, 40, 97, 8


class Binding:
    def __init__(self):
        self.values = {}

    def bind_cpu_input(self, name, values):
        self.values[name] = values

    def bind_input(self, name, device, _, dtype, shape, address):
        assert (device, dtype) == ("cpu", np.float32)
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(address)
        self.values[name] = np.ctypeslib.as_array(memory).reshape(shape)

    bind_output = bind_input


class Session:
    """Foretells, after each token, the sum of all tokens before it in its row."""

    def __init__(self, *names):
        self.names = names
        self.runs = []

    def get_inputs(self):
        cache = SimpleNamespace(
            name="past_key_values.0.key", shape=["b", 1, "past", 1], type="tensor(float)"
        )
        return [cache, *(SimpleNamespace(name=name, shape=[], type="") for name in self.names)]

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding):
        found = binding.values
        ids, mask, logits = found["input_ids"], found["attention_mask"], found["logits"]
        past, present = (found[f"{name}.0.key"] for name in ("past_key_values", "present"))
        assert past.ctypes.data == present.ctypes.data
        rows, new = ids.shape
        assert past.shape == (rows, 1, LENGTH, 1)
        if ids.max() >= VOCABULARY:
            raise ValueError("no such token")
        self.runs.append((rows, new))
        for row in range(rows):
            count = mask[row].sum() - new
            assert mask[row, len(mask[row]) - count - new :].all()  # what is of it stands last
            if "position_ids" in self.names:
                assert found["position_ids"][row].tolist() == [*range(count, count + new)]
            past[row, 0, count : count + new, 0] = ids[row]
            sums = past[row, 0, :, 0].cumsum()[count : count + new].astype(int)
            logits[row] = np.eye(VOCABULARY, dtype=np.float32)[sums % VOCABULARY]


@pytest.fixture(params=[(), ("position_ids",)])
def session(request):
    return Session("input_ids", "attention_mask", *request.param)


@pytest.fixture
def places(session):
    return Slots(session, ROWS, LENGTH, 1, VOCABULARY, PART)


@pytest.mark.parametrize("seed", range(5))
def test_each_text_is_its_own_whoever_comes_and_goes(places, seed):
    """And what a place has known before is as if it had been read."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(VOCABULARY) for _ in range(20)] for _ in range(3)]
    texts, spared = {}, 0
    for _ in range(300):
        if len(texts) < ROWS and draw.random() < 0.3:
            prompt = draw.choice(beginnings)[: draw.randrange(1, 21)]
            prompt = prompt + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 5))]
            slot = places.enter(prompt)
            spared += slot.count
            assert slot.count % PART == 0
            assert slot.count < len(prompt)
            assert slot.run(prompt[slot.count :])[-1].argmax() == sum(prompt) % VOCABULARY
            texts[slot] = prompt
        going = [slot for slot in texts if draw.random() < 0.7]  # others are being read, say
        new = [draw.randrange(VOCABULARY) for _ in going]
        for slot, token in zip(going, new, strict=True):
            texts[slot].append(token)
        if going:
            for slot, logits in zip(going, places.step(going, new), strict=True):
                assert logits.argmax() == sum(texts[slot]) % VOCABULARY
                assert slot.count == len(texts[slot])
        for slot in [slot for slot in texts if len(texts[slot]) == LENGTH or draw.random() < 0.15]:
            places.leave(slot)
            del texts[slot]
    assert spared > 5 * PART


def test_rows_that_go_together_are_run_together(places, session):
    held = [places.enter([n]) for n in range(ROWS)]
    for number, slot in enumerate(held):
        slot.run([number])
    session.runs.clear()
    places.step([held[3], held[1]], [5, 6])
    places.step(held, [1, 2, 3, 4])
    assert session.runs == [(2, 1), (4, 1)]


def test_the_place_with_most_of_a_prompt_is_taken_and_else_the_one_free_for_longest(places):
    prompt = [*range(3 * PART)]
    first = places.enter(prompt)
    first.run(prompt)
    second = places.enter([9])
    second.run([9, 9])
    places.leave(first)
    places.leave(second)
    others = [places.enter([90]), places.enter([91])]  # not yet used, so free for longest
    assert {*others}.isdisjoint({first, second})
    assert (places.enter([*prompt[:PART], 50, 51]), first.count) == (first, PART)
    assert places.enter(prompt) is second  # what it had is gone with its prompt's end


def test_a_text_that_goes_back_is_not_taken_for_read(places):
    """As drafts have it."""
    slot = places.enter()
    slot.run([*range(PART + 3)])
    assert slot.read == [*range(PART)]
    slot.rewind(PART - 1)
    assert (slot.read, slot.count) == ([], PART - 1)
    assert slot.run([5, 6])[-1].argmax() == (sum(range(PART - 1)) + 11) % VOCABULARY


def test_what_the_runtime_stumbles_over_leaves_a_text_as_it_was(places):
    slot = places.enter()
    with pytest.raises(RuntimeError, match="no such token"):
        slot.run([VOCABULARY])
    assert slot.count == 0
    assert slot.run([3])[-1].argmax() == 3
