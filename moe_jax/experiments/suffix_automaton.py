"""The longest passages that texts share with another, long text, by a suffix automaton.

The automaton has a state for each set of substrings that end at the same places (Blumer et al. 1985, "The smallest
automaton recognizing the subwords of a text"). It is built of the short texts. The long text then runs through it once:
the time is proportional to the tokens of both, and the memory to those of the short texts.
"""

from collections.abc import Iterable, Sequence

ROOT = 0


class SuffixAutomaton:
    """All substrings of one sequence of tokens.

    A state stands for the substrings that end at the same places of the sequence. The longest of them has `length[s]`
    tokens. The shortest has one token more than the longest of state `link[s]`, whose substrings end at more places.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.prefixes: list[int] = []
        """The state of each prefix: entry i belongs to the first i + 1 tokens."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        before = self.prefixes[-1] if self.prefixes else ROOT
        new = self._add_state(self.length[before] + 1, {}, ROOT)
        self.prefixes.append(new)
        state = before
        while state >= 0 and token not in self.following[state]:
            self.following[state][token] = new
            state = self.link[state]
        if state < 0:
            return
        target = self.following[state][token]
        if self.length[target] == self.length[state] + 1:
            self.link[new] = target
            return
        # The shorter substrings of `target` now end at one place more than its longer ones: they get their own state.
        split = self._add_state(self.length[state] + 1, dict(self.following[target]), self.link[target])
        while state >= 0 and self.following[state].get(token) == target:
            self.following[state][token] = split
            state = self.link[state]
        self.link[target] = self.link[new] = split

    def _add_state(self, length: int, following: dict[int, int], link: int) -> int:
        self.length.append(length)
        self.following.append(following)
        self.link.append(link)
        return len(self.length) - 1

    def longest_matches(self, other: Iterable[int]) -> list[int]:
        """For each position of the sequence, the length of the longest substring that ends there and is in `other`."""
        found = [0] * len(self.length)
        state, matched = ROOT, 0
        for token in other:
            while state != ROOT and token not in self.following[state]:
                state = self.link[state]
                matched = self.length[state]
            if token in self.following[state]:
                state, matched = self.following[state][token], matched + 1
                found[state] = max(found[state], matched)
        # What was matched in a state ends wherever the shorter substrings of its links end, and these are in it.
        for s in sorted(range(1, len(found)), key=self.length.__getitem__, reverse=True):
            if found[s] and self.link[s] != ROOT:
                found[self.link[s]] = self.length[self.link[s]]
        for s in sorted(range(1, len(found)), key=self.length.__getitem__):
            found[s] = found[s] or found[self.link[s]]
        return [found[s] for s in self.prefixes]


def longest_copies(texts: Sequence[Sequence[int]], source: Iterable[int]) -> list[list[int]]:
    """For each position of each text, the length of the longest passage that ends there and occurs in `source`.

    Lengths are in tokens. Tokens are not negative. No passage goes over the end of a text.
    """
    joined: list[int] = []
    for number, text in enumerate(texts):
        joined += [*text, -1 - number]  # an end of its own, which is in no other text
    lengths, copies, first = SuffixAutomaton(joined).longest_matches(source), [], 0
    for text in texts:
        copies.append(lengths[first : first + len(text)])
        first += len(text) + 1
    return copies
