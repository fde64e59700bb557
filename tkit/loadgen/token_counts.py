"""How many tokens each chunk of an answer brought. Knows texts and counts; no protocol and no tokenizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

TokenEnds = Callable[[str], list[int]]  # the end, in characters, of each token of a text


def added_tokens(counts: Sequence[int | None], osl: int) -> list[int]:
    """What each response adds. Some servers count the tokens of the response, some those so far."""
    given = [count for count in counts if count]
    if not _is_running_total(given, osl):
        return [count or 0 for count in counts]
    added, so_far = [], 0
    for count in counts:
        added.append(max((count or 0) - so_far, 0))
        so_far = max(so_far, count or 0)
    return added


def _is_running_total(counts: list[int], osl: int) -> bool:
    steps = [later - earlier for earlier, later in zip(counts, counts[1:], strict=False)]
    if not steps or min(steps) < 0:
        return False
    return counts[-1] == osl or sum(counts) > osl or (len(steps) > 1 and min(steps) > 0)


def tokens_of_texts(texts: Sequence[str], token_ends: TokenEnds | None) -> list[int]:
    """A token belongs to the response that brought its last character. Servers send deltas or the text so far.

    Without a tokenizer every text counts as one token.
    """
    if token_ends is None:
        return [int(bool(text)) for text in texts]
    spoken = [text for text in texts if text]
    is_so_far = len(set(spoken)) > 2 and all(
        later.startswith(earlier) for earlier, later in zip(spoken, spoken[1:], strict=False)
    )
    lengths, length = [], 0
    for text in texts:
        length = max(length, len(text)) if is_so_far else length + len(text)
        lengths.append(length)
    ends = token_ends(spoken[-1] if is_so_far else "".join(spoken))
    added, taken = [], 0
    for length in lengths:
        before = taken
        while taken < len(ends) and ends[taken] <= length:
            taken += 1
        added.append(taken - before)
    return added


def tokens_of_total(texts: Sequence[str], total: int, token_ends: TokenEnds | None) -> list[int]:
    """Spreads a total over the chunks: a chunk without text gets none, one with text at least one where that is possible.

    Only where chunks and tokens do not match one to one does the tokenizer say which chunk is the longer.

    >>> tokens_of_total(["", "a", "b"], 2, lambda text: [1, 2])
    [0, 1, 1]
    """
    has_text = [int(bool(text)) for text in texts]
    num_chunks = sum(has_text)
    if num_chunks == total or not num_chunks:
        return has_text
    encoded = [count * has for count, has in zip(tokens_of_texts(texts, token_ends), has_text, strict=True)]
    if total < num_chunks:
        weights = encoded if any(encoded) else has_text
        return _shares(total, weights, round_up=True)  # up: the first chunk brought a token, or there would be none
    extra = [max(count - 1, 0) for count in encoded]
    shares = _shares(total - num_chunks, extra if any(extra) else has_text, round_up=False)
    return [one + share for one, share in zip(has_text, shares, strict=True)]


def _shares(total: int, weights: Sequence[int], *, round_up: bool) -> list[int]:
    """Whole numbers in proportion to the weights, by rounding their running sum, so that they add up to the total."""
    whole = sum(weights)
    shares, so_far, given = [], 0, 0
    for weight in weights:
        so_far += weight
        due = -(-so_far * total // whole) if round_up else so_far * total // whole
        shares.append(due - given)
        given = due
    return shares
