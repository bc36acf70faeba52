"""The embedded corpus: short children's stories out of a grammar, so that the probability of each is known.

A hero with a trait goes, in some weather and some clothes, to a place, and notices this or that on the way.
There one of ten things happens, and then it is time to go home. Who has which toy, who is sad and what the gate
looks like is drawn once and said several times. A model that remembers pays nothing for the repetitions, and
nothing for the fixed text; what no model can avoid on average is the code length of the draws themselves. That is
the entropy floor.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from moe_jax.data.grammar import Grammar
from moe_jax.data.vocabulary import SLOTS

VALIDATION_STORIES = 600
"""How many stories of the validation split are scored."""

RULES = {
    "start": "<opening> <plot> <closing> <supper>",
    # Small choices that any sentence may make, each with a place of its own.
    "went": "[walked|ran|skipped|hurried|raced|marched|hopped|danced]",
    "how": "[kindly|warmly|wisely|brightly|sweetly|eagerly|quickly|firmly]",
    "said": "[said|called|shouted|laughed|cheered|whispered|chuckled|replied]",
    "wept": "[cried|sobbed|sighed|wept|moaned|groaned|sniffed|wailed]",
    "felt": "[felt|was|looked|seemed|became|grew] [very|so|quite|rather|really|truly]",
    "near": "[near|by|behind|beside]",
    "sat": "[sat|stood|waited|rested]",
    "had": "[had|held|brought|carried]",
    "saw": "[saw|spotted|found|noticed]",
    "held": "[held|took|lifted|hugged|shook|waved]",
    "both": "[played|sang|rested|talked|hummed|clapped|jumped|napped]",
    "now": "[Now|Soon|Then|Later]",
    "fresh": "[fresh|warm|sweet|salty|crisp|tasty|ripe|creamy|spicy|juicy|crunchy|sticky|sour|tender|frosty|rich]",
    # The tale.
    "opening": """
        [Once upon a time, one|Once upon a|Long ago, one|One] {weather} {time}, {trait.a} {hero.child} named {hero}
        [put|pulled|tried|had] on {hero.his} {pattern} {clothes} and <went> to the {place}.
    """,
    "plot": "<lost>|<share>|<fear>|<gift>|<game>|<rescue>|<skill>|<swap>|<broken>|<find>",
    "lost": """
        {hero} [lost|dropped] {look.a} {colour} {toy} there and <felt> {sad}. "Do not be {sad}," <said> {friend} <how>.
        {friend} [looked|searched|peeked|went] <near> {texture.a} {spot} and <saw> the {colour} {toy}. The
        two <both> <near> the {spot}, and {hero} <felt> {happy}.
    """,
    "share": """
        {hero} <had> {look.a} {treat}. {friend} <sat> <near> {texture.a} {spot} and <felt> {sad}. "I am hungry,"
        <wept> {friend}. {hero} [broke|cut|split|tore] the {treat} in two. "Half of my {look} {treat} is for you,
        {friend}," <said> {hero} <how>. {friend} ate <near> the {spot}, and {hero} <felt> {happy}.
    """,
    "fear": """
        There [was|stood|lay|rose] {texture.a} {scary}, and {hero} <felt> {fright}. "I am too {fright} to go
        [on|there|near|by]," <wept> {hero}. {friend} <had> {look.a} {colour} {toy}. "[Take|Hold|Keep|Carry] my {toy},
        and do not be {fright}," <said> {friend} <how>. {hero} <held> the {colour} {toy} and <went> to the
        {scary}. <now> {hero} <felt> {happy}.
    """,
    "gift": """
        {hero} and {hero.his} {elder} <had> {look.a} {colour} {toy} for {friend}. {friend} <sat> <near>
        {texture.a} {spot} and <felt> {sad}. "It is my birthday," <wept> {friend}. "This {toy} is from my {elder} and
        me," <said> {hero} <how>. {friend} <held> the {colour} {toy} <near> the {spot}, and {hero}
        <felt> {happy}.
    """,
    "game": """
        {friend} <sat> <near> {texture.a} {spot}. "Will you play {game}, {hero}?" <said> {friend}. But {hero}
        lost and <felt> {sad}. "I do not like {game}," <wept> {hero}. "Do not be {sad}," <said> {friend} <how>. The two
        <both> and played {game} <near> the {spot}. <now> {hero} won and <felt> {happy}.
    """,
    "rescue": """
        {hero} <saw> {build.a} {animal} <near> {texture.a} {spot}. "{animal.sound}!" said the {animal}, who <felt>
        {sad}. {hero} gave some {animal.food} to the {build} {animal}. "Do not be {sad}. I know your {animal.home},"
        <said> {hero} <how>. The {build} {animal} <went> past the {spot} to its {animal.home}, and
        {hero} <felt> {happy}.
    """,
    "skill": """
        {friend} could {skill} [very|so|quite|really] well. "Teach me to {skill}, {friend}," <said> {hero}.
        {hero} tried to {skill} <near> {texture.a} {spot}, but fell and <felt> {sad}. "I can not {skill}," <wept>
        {hero}. "Do not be {sad}," <said> {friend} <how>. <now> {hero} could {skill} <near> the {spot} and
        <felt> {happy}.
    """,
    "swap": """
        {hero} <had> {look.a} {colour} {toy} and {friend} <had> {hue.a} {prize}. {friend} <held> the {colour} {toy},
        and {hero} <held> the {hue} {prize}. But {friend} <felt> {sad}. "I [miss|want|need] my {prize}," <wept>
        {friend}. "Here is your {hue} {prize}," <said> {hero} <how>. {friend} gave back the {colour} {toy}, and
        {hero} <felt> {happy}.
    """,
    "broken": """
        {hero} <had> {look.a} {colour} {toy} from {hero.his} {elder}. {hero.He} <went> into {texture.a} {spot},
        the {toy} [broke|bent|cracked], and {hero.he} <felt> {sad}. "I broke the {toy}," {hero.he} told {hero.his}
        {elder}. "Do not be {sad}," <said> the {elder} <how>. {friend} [mended|fixed|glued] the {colour} {toy}
        <near> the {spot}, and {hero} <felt> {happy}.
    """,
    "find": """
        {hero} <saw> {look.a} {colour} {toy} <near> {texture.a} {spot}. <now> {hero.he} [met|passed|joined] {friend},
        who <felt> {sad}. "I [lost|miss|want|need] my {look} {toy}," <wept> {friend}. "Your {colour} {toy} was <near>
        the {texture} {spot}," <said> {hero} <how>. {friend} <held> the {colour} {toy}, and {hero} <felt>
        {happy}.
    """,
    "closing": "<undress>|<exclaim>|<return>",
    "undress": """
        [That night|At home|At bedtime|At last], {hero} [took off|put away|hung up|put down] the {pattern} {clothes}
        and [dreamed|thought|sang|spoke] of the {place}.
    """,
    "exclaim": """
        "[What|Such] a {weather} {time}!" <said> the {trait} {hero.child} in the {pattern} {clothes}.
    """,
    "return": """
        [Still|Very|So] {happy}, the {trait} {hero.child} <went> home in the {pattern} {clothes}.
    """,
    "supper": """
        For [supper|tea|dinner|lunch], there [came|were] <fresh> {snack}, <fresh> {dish},
        <fresh> {bite} and <fresh> {treasure}.
    """,
}

_GRAMMAR = Grammar(RULES, SLOTS)


def generate(seed: int, split: Literal["train", "valid"], count: int) -> Iterator[str]:
    """The first `count` stories of a split. Story i is a function of (seed, split, i) and nothing else.

    The splits are independent draws, each with more than 100 bits of choice: that a story occurs in both has a
    probability below 2^-60 in any run, and keeping stories apart by force would make the floor inexact.
    """
    for i in range(count):
        yield _GRAMMAR.sample(random.Random(f"{seed} {split} {i}").random).text


def code_length_bits(text: str) -> float:
    """-log2 of the probability of a story under the grammar, in bits; inf where the grammar can't write it.

    The probability is the sum over all derivations of the text. A story has exactly one: the tests hold that.
    """
    probability = math.fsum(2.0**-derivation.bits for derivation in _GRAMMAR.derivations(text))
    return -math.log2(probability) if probability > 0 else math.inf


def entropy_floor_bits_per_byte(stories: Sequence[str]) -> float:
    """Code length of the stories under the grammar over their UTF-8 bytes: what the best model scores.

    The separators between stories add nothing, since the grammar says where a story ends. inf where the
    grammar can't write one of the stories.
    """
    return math.fsum(map(code_length_bits, stories)) / sum(len(story.encode()) for story in stories)
