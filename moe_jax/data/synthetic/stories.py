"""The embedded corpus: short children's stories from a grammar that gives each story an exact probability.

A hero with a trait goes to a place, in some weather and some clothes. There one of ten things happens, and then it is
time to go home. Details, such as the name of the friend and the colour of the toy, are drawn once and mentioned several
times. A model that remembers them needs 0 bits for the repetitions and 0 bits for the fixed text. On average no model
can need fewer bits than the code length of the random choices: the entropy floor.

Every word of a list fits every story. So the first mention of a word carries 2 to 4 bits: log2 of the number of words
to choose from. A word determines its other forms: a girl is "she"; a rabbit lives in a hole and eats carrots.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from moe_jax.data.synthetic.grammar import Derivation, Grammar, Word

type Split = Literal["train", "valid"]

VALIDATION_STORIES = 600
"""How many stories of the validation split are scored."""

RULES = {
    "start": "<opening> <plot> <closing> <supper>",
    # Small choices. Each use of such a rule is a new choice.
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

# The words: for each slot of a story, the list of words that the slot draws from

_VOWELS = "aeiou"
_SILENT_H = ("honest",)


def _word(plain: str, **forms: str) -> Word:
    """The forms of a word: the word itself (""), the word with its article ("a": "an orange"), and `forms`."""
    article = "an" if plain[0] in _VOWELS or plain in _SILENT_H else "a"
    return {"": plain, "a": f"{article} {plain}", **forms}


def words(plain: str) -> Sequence[Word]:
    return tuple(_word(word) for word in plain.split())


def _people(names: str, child: str, he: str, him: str, his: str) -> Sequence[Word]:
    return tuple(_word(name, child=child, he=he, He=he.capitalize(), him=him, his=his) for name in names.split())


def _animal(plain: str, sound: str, home: str, food: str) -> Word:
    return _word(plain, sound=sound, home=home, food=food)


def _children(girls: str, boys: str) -> Sequence[Word]:
    return (*_people(girls, "girl", "she", "her", "her"), *_people(boys, "boy", "he", "him", "his"))


ANIMALS = (
    _animal("rabbit", "Sniff", "hole", "carrots"),
    _animal("mouse", "Squeak", "barn", "cheese"),
    _animal("duck", "Quack", "pond", "bread"),
    _animal("puppy", "Woof", "kennel", "meat"),
    _animal("kitten", "Meow", "basket", "milk"),
    _animal("lamb", "Baa", "pen", "clover"),
    _animal("pony", "Neigh", "stable", "hay"),
    _animal("chick", "Cheep", "nest", "corn"),
)
COLOURS = words("red blue green pink golden brown black white")
SNACKS = words("nuts jam eggs rice soup toast grapes dates figs beans butter apples cherries berries crackers noodles")
THINGS = words("kite doll boat drum train bell cup lamp top ring horn box book clock hat sled")

SLOTS = {
    "hero": _children("Lily Mia Anna Ella Nora Zoe Ivy Rosie", "Tom Ben Max Leo Sam Finn Jack Theo"),
    "friend": _children("Tess Maya Lucy June Kate Emma Clara Ruby", "Ned Adam Luca Kofi Dan Will Omar Hugo"),
    "elder": words("mother father grandma grandpa aunt uncle sister brother"),
    "trait": words("kind brave clever gentle honest polite sweet lively"),
    "weather": words("sunny windy cloudy warm misty bright cool rainy"),
    "time": words("morning afternoon evening day"),
    "pattern": words("striped spotted woolly patched cozy faded fancy soft"),
    "clothes": words("coat scarf boots cap mittens cape shoes vest"),
    "place": words("garden park forest meadow field valley village market yard harbor jungle orchard"),
    "colour": COLOURS,
    "hue": COLOURS,
    "look": words("little old tiny big lovely odd heavy grand"),
    "toy": THINGS,
    "prize": THINGS,
    "texture": words("mossy muddy dusty crooked broken low wide dark"),
    "spot": words("bush rock log bench tree fence gate wall cart shed well stump"),
    "scary": words("bridge tunnel cave tower path maze"),
    "fright": words("scared afraid nervous worried timid shy"),
    "sad": words("sad upset gloomy lonely unhappy tearful glum weary"),
    "happy": words("happy glad proud merry jolly joyful pleased cheerful"),
    "build": words("thin plump sleepy noisy young hungry"),
    "animal": ANIMALS,
    "treat": words("cake pie bun peach pear cookie plum muffin"),
    "game": words("tag catch chess cards darts marbles"),
    **dict.fromkeys(("snack", "dish", "bite", "treasure"), SNACKS),
    "skill": words("dance sing paint knit read skate"),
}

_GRAMMAR = Grammar(RULES, SLOTS)


def generate(seed: int, split: Split, count: int) -> Iterator[str]:
    """The first `count` stories of a split. Story i is a function of (seed, split, i) and nothing else.

    The two splits are drawn independently. A story has more than 100 bits of choices, so the probability that any story
    occurs in both splits is below 2^-60. Removing such a story would make the entropy floor inexact.
    """
    for i in range(count):
        yield sample(seed, split, i).text


def sample(seed: int, split: Split, i: int) -> Derivation:
    """Story i of a split, with its choices."""
    return _GRAMMAR.sample(random.Random(f"{seed} {split} {i}").random)


RULES_DIGEST = "ce0644c10fe80271f982acc2d4b65b1a"
"""Stands for the rules, the words and the way in which they are drawn: caches and saved runs know the corpus by it. A
test computes it from all of them, so it is changed together with them."""


def fingerprint(seed: int, count: int) -> str:
    """xxh3-128 of everything that determines the text: the seed, both counts, and the rules."""
    import xxhash

    text = f"{seed} {count} {VALIDATION_STORIES} {RULES_DIGEST}"
    return xxhash.xxh3_128_hexdigest(text.encode())


def entropy_floor_bits_per_byte(seed: int, split: Split, count: int) -> float:
    """Code length of the first stories of a split under the grammar, in bits, divided by their UTF-8 bytes: the best
    possible score.

    A story has exactly one derivation, which the tests check, so its probability is 2^-bits. The separators between
    stories add 0 bits, because the grammar determines where a story ends.
    """
    stories = [sample(seed, split, i) for i in range(count)]
    bits = math.fsum(-math.log2(2.0**-story.bits) for story in stories)
    return bits / sum(len(story.text.encode()) for story in stories)
