"""The words of the embedded corpus: for each slot of a story, the list of words that the slot draws from.

Every word of a list fits every story. So the first mention of a word carries 2 to 4 bits: log2 of the number of words
to choose from. A model that remembers the word needs 0 bits at each later mention. A word determines its other forms: a
girl is "she"; a rabbit lives in a hole and eats carrots.
"""

from collections.abc import Sequence

from moe_jax.data.synthetic.grammar import Word

_VOWELS = "aeiou"
_SILENT_H = ("honest",)


def _word(plain: str, **forms: str) -> Word:
    """The forms of a word: the word itself (""), the word with its article ("a": "an orange"), and `forms`."""
    article = "an" if plain[0] in _VOWELS or plain in _SILENT_H else "a"
    return {"": plain, "a": f"{article} {plain}", **forms}


def _words(plain: str) -> Sequence[Word]:
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
COLOURS = _words("red blue green pink golden brown black white")
SNACKS = _words("nuts jam eggs rice soup toast grapes dates figs beans butter apples cherries berries crackers noodles")
THINGS = _words("kite doll boat drum train bell cup lamp top ring horn box book clock hat sled")

SLOTS = {
    "hero": _children("Lily Mia Anna Ella Nora Zoe Ivy Rosie", "Tom Ben Max Leo Sam Finn Jack Theo"),
    "friend": _children("Tess Maya Lucy June Kate Emma Clara Ruby", "Ned Adam Luca Kofi Dan Will Omar Hugo"),
    "elder": _words("mother father grandma grandpa aunt uncle sister brother"),
    "trait": _words("kind brave clever gentle honest polite sweet lively"),
    "weather": _words("sunny windy cloudy warm misty bright cool rainy"),
    "time": _words("morning afternoon evening day"),
    "pattern": _words("striped spotted woolly patched cozy faded fancy soft"),
    "clothes": _words("coat scarf boots cap mittens cape shoes vest"),
    "place": _words("garden park forest meadow field valley village market yard harbor jungle orchard"),
    "colour": COLOURS,
    "hue": COLOURS,
    "look": _words("little old tiny big lovely odd heavy grand"),
    "toy": THINGS,
    "prize": THINGS,
    "texture": _words("mossy muddy dusty crooked broken low wide dark"),
    "spot": _words("bush rock log bench tree fence gate wall cart shed well stump"),
    "scary": _words("bridge tunnel cave tower path maze"),
    "fright": _words("scared afraid nervous worried timid shy"),
    "sad": _words("sad upset gloomy lonely unhappy tearful glum weary"),
    "happy": _words("happy glad proud merry jolly joyful pleased cheerful"),
    "build": _words("thin plump sleepy noisy young hungry"),
    "animal": ANIMALS,
    "treat": _words("cake pie bun peach pear cookie plum muffin"),
    "game": _words("tag catch chess cards darts marbles"),
    **dict.fromkeys(("snack", "dish", "bite", "treasure"), SNACKS),
    "skill": _words("dance sing paint knit read skate"),
}
