"""Speculative decoding without any: one token after another, distributions as dense vectors.

What a text's next token may be is written down by definition, so that the probability of a whole
text is a product, which the sampled texts are held to.
"""

import itertools

import numpy as np


def distribution(logits, text, *, temperature, top_k, top_p, repetition_penalty):
    """The probabilities [vocab] of the next token, by loops over tokens sorted by logit."""
    scores = [float(value) for value in logits]
    for token in set(text):
        factor = repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
        scores[token] *= factor
    order = sorted(range(len(scores)), key=lambda token: -scores[token])[:top_k]
    weights = [np.exp((scores[token] - scores[order[0]]) / temperature) for token in order]
    shares = [weight / sum(weights) for weight in weights]
    kept = 1
    while top_p < 1 and sum(shares[:kept]) < top_p:
        kept += 1
    kept = len(order) if top_p == 1 else kept
    found = np.zeros(len(scores))
    for token, share in zip(order[:kept], shares[:kept], strict=True):
        found[token] = share / sum(shares[:kept])
    return found


def greedy(logits_after, prompt, length, ends=(), repetition_penalty=1.0):
    """The likeliest text of `length` tokens after `prompt`, without it."""
    text = list(prompt)
    while len(text) < length:
        scores = logits_after(text).astype(np.float32).copy()
        for token in set(text):
            factor = np.float32(repetition_penalty)
            scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
        text.append(int(scores.argmax()))
        if text[-1] in ends:
            break
    return text[len(prompt) :]


def text_probabilities(logits_after, prompt, count, **search):
    """The probability of every text of `count` tokens after `prompt`, by the chain rule."""
    vocabulary = len(logits_after(list(prompt)))
    found = {}
    for text in itertools.product(range(vocabulary), repeat=count):
        share = 1.0
        for place, token in enumerate(text):
            before = [*prompt, *text[:place]]
            share *= distribution(logits_after(before), before, **search)[token]
        if share > 0:
            found[text] = share
    return found


def lookup(text, count, longest, least):
    """What follows the latest of the longest matches of the text's end, going round."""
    best, place = 0, None
    for end in range(1, len(text)):  # a match is text[end - length : end]
        length = 0
        while length < min(longest, end) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length >= max(best, least):
            best, place = length, end
    if place is None:
        return []
    going_on = list(text)
    for step in range(count):
        going_on.append(going_on[place + step])
    return going_on[len(text) :]


def steps(text, proposals, start):
    """How many tokens each step makes of the likeliest text, the first token being there.

    `proposals(i)` are a draft's for the places from `i` on.
    """
    made = []
    at = start + 1
    while at < len(text):
        accepted = 0
        proposed = proposals(at)
        while accepted < len(proposed) and text[at + accepted] == proposed[accepted]:
            accepted += 1
        made.append(accepted + 1)
        at += accepted + 1
    return made
