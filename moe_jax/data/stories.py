"""The embedded corpus: short children's stories out of a grammar, so that the probability of each is known exactly.

A hero with a trait goes, in some weather and some clothes, to a place. There one of ten things happens, and at the
end of the day the clothes come off. Who has which toy, who is sad and where the gate stands is drawn once and said
again several times. A model that remembers pays nothing for the repetitions, and nothing for the fixed text; what
no model can avoid on average is the code length of the draws themselves. That is the entropy floor.
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
    "start": "<opening> <plot> <closing>",
    # Small choices that any sentence may make.
    "went": "[walked|ran|skipped|hurried|raced|strolled|wandered|marched|hopped|went|danced|rushed]",
    "said": "[said|called|shouted|answered|replied|whispered|laughed|sang]",
    "wept": "[cried|sobbed|sighed|wept|moaned|groaned|sniffed|wailed]",
    "felt": "[felt|was|looked|seemed|became|grew] [very|so|quite|rather|really|terribly]",
    "soon": "[Soon|Then|At last|Just then|After a while|Suddenly|A moment later|By and by]",
    "near": "[near|by|behind|beside|under|in front of]",
    "came": "[came|walked|ran|skipped|hurried|wandered] [by|over|along|near|up]",
    "saw": "[saw|spotted|found|noticed|met|discovered]",
    "hugged": "[hugged|thanked|kissed|squeezed|cheered|cuddled]",
    "tight": "[tight|close|high|gently|proudly|with care]",
    "mended": "[mended|fixed|glued|repaired]",
    "both": "[played|sang|laughed|danced|rested|talked|giggled|sat]",
    "while": "[for an hour|until dusk|all day|until supper|for a long time|until the stars came out]",
    "now": "[any more|any longer|at all|now]",
    # The tale.
    "opening": "[Once upon a time|Long ago|Once|One year|Some time ago|Not long ago|One spring|In a far land], "
    "there [lived|was] {trait.a} {hero.child} [named|called] {hero}. One {weather} {time}, {hero} put on "
    "{hero.his} {pattern} {clothes} and <went> to the {place}. The {chorus} were "
    "[busy|loud|quiet|awake|everywhere|lively|calm|noisy] "
    "in the [grass|trees|flowers|leaves|branches|hay|reeds|sunlight].",
    "plot": "<lost>|<share>|<fear>|<gift>|<game>|<rescue>|<skill>|<swap>|<broken>|<chest>",
    "lost": "{hero} had brought {look.a} {colour} {toy}. <soon> it was [gone|lost|missing|not there]. "
    '"Where is my {toy}?" <wept> {hero}, who <felt> {sad}. {friend} <came>. "Do not be {sad}, {hero}. '
    '[I will help you|Let us look|We can look|We will find it]," <said> {friend}. {friend} looked <near> '
    "{texture.a} {spot}, and there was the {look} {colour} {toy}! {hero} <hugged> {friend}, and they <both> <near> "
    "the {texture} {spot} <while>. {hero} was not {sad} <now> but {happy}.",
    "share": "{hero} had {flavour.a} {treat} for [lunch|tea|supper|dinner|later|a snack]. {friend} sat <near> "
    '{texture.a} {spot} and <felt> {sad}. "I [lost|dropped|forgot|spilled] my lunch," <wept> {friend}. The '
    "{flavour} {treat} was [small|tiny|the last|not big], but {hero} [broke|cut|split|shared] it in two. "
    '"Half of my {flavour} {treat} is for you, {friend}," <said> {hero}. {friend} '
    "[ate|tasted|nibbled|munched|chewed|finished] the {treat} and was not {sad} <now>. "
    '"You are {trait.a} {hero.child}, {hero}!" <said> {friend}. They <both> <near> the {texture} {spot} <while>, '
    "and {hero} <felt> {happy}.",
    "fear": "At the end of the {place} was {texture.a} {scary}. {hero} <felt> {fright}. "
    '"I [can not|dare not|will not|must not] go [there|on|near|closer]. I am too {fright}!" <wept> {hero}. '
    '{friend} <came> with {look.a} {colour} {toy}. "[Hold|Take|Carry|Keep] my {colour} {toy}, {hero}. It helps '
    'when I am {fright}," <said> {friend}. {hero} held the {look} {colour} {toy} <tight> and <went> to the '
    '{texture} {scary}. "Look, {friend}! I am not {fright} <now>!" <said> {hero}, who <felt> {happy}.',
    "gift": "It was the birthday of {friend}. {hero} and {hero.his} {elder} had [made|found|bought|chosen] {look.a} "
    "{colour} {toy} for {friend.him}. {friend} sat <near> {texture.a} {spot} and <felt> {sad}. "
    '"Nobody [remembers|knows about|thinks of|cares about] my birthday," <wept> {friend}. "Do not be {sad}, '
    '{friend}. This {toy} is from my {elder} and me," <said> {hero}. {friend} held the {look} {colour} {toy} '
    "<tight> and <hugged> {hero}. They <both> <near> the {texture} {spot} <while>, and {hero} <felt> {happy}.",
    "game": "{friend} waited <near> {texture.a} {spot}. "
    '"[Do you want to|Shall we|Can we|Will you] play {game}, {hero}?" <said> {friend}. They played {game} <while>, '
    "but {hero} lost [every time|again and again|each round|three times] and <felt> {sad}. "
    '"I [do not like|am bad at|am tired of|can not play] {game}," <wept> {hero}. "Do not be {sad}. I was bad at '
    '{game} once," <said> {friend}. So {friend} and {hero} played {game} [once more|again|slowly|two more times] '
    "<near> the {texture} {spot}. <soon> {hero} won, and {hero.he} <felt> {happy}.",
    "rescue": "<soon> {hero} <saw> {build.a} {animal} <near> {texture.a} {spot}. "
    '"{animal.sound}! {animal.sound}!" said the {animal}. It was lost and <felt> {sad}. {hero} '
    '[gave|fed|brought|offered] the {build} {animal} {animal.food}. "Do not be {sad}. I will find your '
    '{animal.home}," <said> {hero}. {hero.He} [led|took|brought|guided] the {build} {animal} past the {texture} '
    '{spot} to its {animal.home}. "{animal.sound}!" said the {animal}, which was not {sad} <now>. {hero} <felt> '
    "{happy}.",
    "skill": "{friend} was there, and {friend.he} could {skill} [well|best of all|all day|with joy]. "
    '"Please teach me to {skill}, {friend}," <said> {hero}. {hero} tried to {skill} <near> {texture.a} {spot}, but '
    '{hero.he} [failed|gave up|got it wrong|was too slow]. "I will never {skill}!" <wept> {hero}, who <felt> '
    '{sad}. "Do not be {sad}, {hero}. Try again," <said> {friend}. <soon> {hero.he} could {skill} <near> the '
    "{texture} {spot}, just like {friend}! They <both> <while>, and {hero} <felt> {happy}.",
    "swap": "{hero} had {look.a} {colour} {toy}, and {friend} had {hue.a} {prize}. "
    '"Shall we swap?" <said> {friend}. So {friend} took the {colour} {toy} and {hero} took the {hue} {prize}. '
    '<soon> {friend} <felt> {sad}. "I miss my {prize}," <wept> {friend}. "Do not be {sad}, {friend}. Here is your '
    '{hue} {prize}," <said> {hero}. {friend} <hugged> {hero} and gave back the {look} {colour} {toy}. They <both> '
    "<near> {texture.a} {spot} <while> with the {toy} and the {prize}, and {hero} <felt> {happy}.",
    "broken": "{hero} carried {look.a} {colour} {toy}. It belonged to {hero.his} {elder}. <soon> {hero.he} "
    "[bumped|ran|crashed|stumbled] into {texture.a} {spot}, and the {toy} [broke|cracked|split|fell apart]. {hero} "
    '<felt> {sad}. "I broke the {colour} {toy}," {hero.he} told {hero.his} {elder}. "You are {trait.a} '
    '{hero.child} to tell me. Do not be {sad}, {hero}," <said> the {elder}. {friend} <came> with some '
    "[glue|tape|string|nails]. {friend} and {hero} <mended> the {look} {colour} {toy} <near> the {texture} {spot}, "
    "and {hero} <felt> {happy}.",
    "chest": "{hero} <saw> a [chest|sack|trunk|bag] <near> {texture.a} {spot}. In it was {look.a} {colour} {toy}. "
    '{friend} <came> and <felt> {sad}. "I lost my {colour} {toy} [last week|today|long ago|in the night]," '
    "<wept> {friend}. {hero} [wanted|wished|hoped|longed] to keep the {look} {colour} {toy}, but {hero.he} gave it "
    'to {friend}. "Do not be {sad}, {friend}. Your {toy} was <near> the {texture} {spot}," <said> {hero}. '
    '"You are {trait.a} {hero.child}!" <said> {friend}. {hero} <felt> {happy}.',
    "closing": "[That night|At bedtime|After supper|At home|Later|Before bed], [<undress>|<question>|<return>]",
    "undress": "{hero}, still {happy}, [took off|put away|hung up|pulled off] {hero.his} {pattern} {clothes} and "
    "[dreamed|thought|sang|spoke] of the {weather} {time} in the {place}.",
    "question": '{hero.his} {elder} [cleaned|brushed|dried|put away] the {pattern} {clothes}. "Was it a good {time} '
    'in the {place}, {hero}?" "It was, and I am {happy}!" <said> the {trait} {hero.child}.',
    "return": "the {chorus} [slept|were still|were quiet|rested]. The {trait} {hero.child} in the {pattern} {clothes} "
    "[dreamed|thought|sang|spoke] of the {place}, and {hero} was still {happy}.",
}

_GRAMMAR = Grammar(RULES, SLOTS)


def generate(seed: int, split: Literal["train", "valid"], count: int) -> Iterator[str]:
    """The first `count` stories of a split. Story i is a function of (seed, split, i) and nothing else.

    The splits are independent draws out of some 2^140 stories, so that a story of one in the other has a probability
    that no run will see; to move stories between the splits would make the floor inexact.
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
    """Code length of the stories under the grammar over their UTF-8 bytes: what the best possible model scores.

    The separators between stories add nothing, since the grammar says where a story ends.
    """
    return math.fsum(map(code_length_bits, stories)) / sum(len(story.encode()) for story in stories)
