# %% [markdown]
# # 20. Byte pairs
#
# Everything so far began with tokens. Where do they come from? **Which pieces should a
# text be cut into?** There is no gradient in this chapter. It is counting, done well.
# Yet it decides how long a text is for the model, what "2.1 nats a token" means, and
# why a model cannot spell. The code is `foundation/byte_pairs.py`. The model of chapter
# 7 reads such pieces, and not letters: so it sees a whole story at once. The project
# trains and applies such a tokenizer in `moe_jax/data/tokenizers.py`, with fast
# libraries. Here is what they do.
#
# ## Step 1: two bad answers
# **Bytes.** There are 256 of them, and every text is made of them. But a text of 1,000
# letters is then 1,000 steps long, and attention grows with the square of it.
#
# **Words.** A text becomes short. But there is no end of words, and for a new one, a
# name or a mistyped word, there is no number at all.
#
# A good answer lies between. Frequent pieces should be long and rare ones short. And
# single bytes must stay, so that *nothing* is impossible to write.
#
# ## Step 2: merge the most frequent pair
# Begin with bytes. Count all pairs of neighbours. Give the most frequent **pair** a new
# number, 256, and replace it everywhere. Count again, now with 256 as a letter like
# others. Do this as often as you like. The list of pairs, in the order in which they
# were learned, is the whole **tokenizer**.
#
# Three small rules make the answer unique:
#
# 1. Each place counts. "aaa" has the pair (a, a) twice, though only one of the two can
#    be replaced.
# 2. Of equally frequent pairs, the one with the smaller numbers is taken.
# 3. Replacing goes from left to right. "aaa" becomes (aa, a).
#
# Before all this, a text is cut into words, and no pair may span two words. Otherwise
# "of the" would become one piece. It also saves work: each *different* word is looked
# at once, and its count is multiplied in.

# %%
import math
from collections import Counter

from foundation.byte_pairs import BYTES, encode, learn, pair_counts, replaced, spelled
from foundation.lessons.notebook import check, np, pictures, shown

shown(pair_counts, replaced, learn)

# %%
text = (
    "the king and the queen of the north sing in the morning. the singer is the "
    "king of the morning, and the queen is the queen of the evening. nothing is "
    "nearer than the evening, and nobody is the king of the night."
)


def counted_words(text):
    """Each different word as bytes, with a space before it, and how often it occurs."""
    return Counter(tuple(f" {word}".encode()) for word in text.split())


words = counted_words(text)
pairs = learn(words, 40)
for i, pair in enumerate(pairs[:10]):
    print(f"{BYTES + i}: {spelled((BYTES + i,), pairs)!r} from {pair}")


def cut(text, pairs):
    """A text, cut into its pieces."""
    words = (encode(f" {word}".encode(), pairs) for word in text.split())
    numbers = tuple(number for word in words for number in word)
    return numbers, "|".join(spelled((n,), pairs).decode() for n in numbers)


for sample in ("the king of the evening", "the kingfisher", "xylophone"):
    print(cut(sample, pairs)[1])
assert spelled(cut(text, pairs)[0], pairs).decode() == " " + text

# %% [markdown]
# Words that are frequent have become one piece. A word that was never seen is cut into
# pieces that were, and in the worst case into bytes. Nothing is lost: each number
# spells its left and then its right half, down to the bytes.
#
# ## Step 3: encoding
# How is a *new* word encoded? By the same replacements in the same order: the whole
# list, from its beginning, each pair replaced everywhere. With 50,000 pairs that would
# be slow. There is a faster way. Look at the pairs that are *in* the word, and replace
# the one that was **learned first**. Repeat until none is left.
#
# Why is this the same? Replacing pair $i$ makes new neighbours, and all of them contain
# the number $256 + i$. A pair that contains this number was learned *after* it, because
# the number did not exist before. So what appears is always later in the list than what
# was just replaced. The earliest pair that is present moves only towards the end, as in
# the slow way.
#
# Two tempting rules are wrong: to take the leftmost pair, and to take the longest
# piece. Both give a valid cut, which even spells the same text. But it is not the cut
# that the model was trained with. Its loss rises, and nothing fails.

# %%
shown(encode)

# %% [markdown]
# ## Step 4: how many pairs?
# Every pair makes the text shorter, and the table of embeddings longer. How can two
# tokenizers be compared? Not by the loss of a token. With long pieces there are few
# tokens, and each is hard to guess. Divide by something that no tokenizer changes, the
# **bytes**:
#
# $$\boxed{\;\text{bits per byte} = \frac{\text{loss in nats per token}}{\ln 2}\cdot
# \frac{\text{tokens}}{\text{bytes}}\;}$$
#
# The project reports this number everywhere. Below it is measured for the simplest of
# all models, which knows how frequent each piece is and nothing else.


# %%
def measured(pairs):
    """(tokens a byte, bits a token, bits per byte) of a model of frequencies alone."""
    numbers, _ = cut(text, pairs)
    size, count = len(text.encode()) + 1, Counter(numbers)
    bits = -sum(n * math.log2(n / len(numbers)) for n in count.values())
    return len(numbers) / size, bits / len(numbers), bits / size


rows = np.array([measured(pairs[:n]) for n in range(len(pairs) + 1)])
names = ("tokens for each byte", "bits for each token", "bits per byte")
panels = {name: {"measured": rows[:, n]} for n, name in enumerate(names)}
pictures.curves(panels, "pairs learned", markers=True)
print(f"bytes: {rows[0, 1]:.2f} bits a token, {rows[0, 2]:.2f} bits per byte")
print(f"40 pairs: {rows[-1, 1]:.2f} bits a token, {rows[-1, 2]:.2f} bits per byte")
assert rows[-1, 1] > rows[0, 1]
assert rows[-1, 2] < rows[0, 2]

# %% [markdown]
# With the first pairs the bits of a *token* rise, while the bits of a *byte* fall.
# Whoever compares the former concludes the opposite of the truth. Later both fall, and
# that flatters: words have become one piece each, and the list has learned this one
# text by heart. So judge a tokenizer on a text that it has not seen.
#
# So: cut into the pieces that pay for their number, the most frequent pair of what is
# already there, again and again. And count in bytes whatever you compare.
#
# ## Exercises

# %%
check("20.1", None)

# %%
check("20.2", None)

# %%
check("20.3", None)
