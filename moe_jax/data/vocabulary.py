"""The words of the embedded corpus: for each slot of the tale, the list that it draws from.

The lists are long and the words in them interchangeable, so that a word said for the first time carries
several bits, and whoever remembers it saves as many at each later mention. A word may bring others along,
always the same ones: a girl is a she, a rabbit lives in a burrow and eats carrots.
"""

from collections.abc import Sequence

from moe_jax.data.grammar import Word

_VOWELS = "aeiou"
_SILENT_H = ("honest",)


def _word(plain: str, **forms: str) -> Word:
    """A word, the word with its article ("an orange"), and whatever other forms it has."""
    article = "an" if plain[0] in _VOWELS or plain in _SILENT_H else "a"
    return {"": plain, "a": f"{article} {plain}", **forms}


def _words(plain: str) -> Sequence[Word]:
    return tuple(_word(word) for word in plain.split())


def _people(names: str, child: str, he: str, him: str, his: str) -> Sequence[Word]:
    return tuple(
        _word(name, child=child, he=he, He=he.capitalize(), him=him, his=his) for name in names.split()
    )


def _animal(plain: str, sound: str, home: str, food: str) -> Word:
    return _word(plain, sound=sound, home=home, food=food)


def _children(girls: str, boys: str) -> Sequence[Word]:
    return (*_people(girls, "girl", "she", "her", "her"), *_people(boys, "boy", "he", "him", "his"))


ANIMALS = (
    _animal("rabbit", "Sniff", "burrow", "carrots"),
    _animal("mouse", "Squeak", "hole", "cheese"),
    _animal("duck", "Quack", "pond", "bread"),
    _animal("puppy", "Woof", "kennel", "bones"),
    _animal("kitten", "Meow", "basket", "milk"),
    _animal("squirrel", "Chip", "oak", "nuts"),
    _animal("lamb", "Baa", "fold", "clover"),
    _animal("piglet", "Oink", "sty", "potatoes"),
    _animal("pony", "Neigh", "stable", "hay"),
    _animal("chick", "Cheep", "coop", "corn"),
    _animal("cub", "Growl", "den", "honey"),
    _animal("sparrow", "Tweet", "nest", "worms"),
)

COLOURS = _words(
    "red blue green yellow purple pink orange silver golden brown white black gray violet scarlet crimson"
)
THINGS = _words(
    "kite doll boat drum train robot whistle bell cup lantern flute truck top puppet clock box "
    "mask crown lamp jar bucket horn harp trumpet book basket bowl hammer spoon ring key brush"
)

SLOTS = {
    "hero": _children(
        "Lily Mia Anna Rosie Ella Nora Clara Ruby Hana Zoe Ivy Molly",
        "Tom Ben Max Leo Sam Finn Jack Oscar Hugo Theo Noah Omar",
    ),
    "friend": _children(
        "Tess Greta Sofia Maya Bella Lucy Freya Priya Rosa Emma June Sara",
        "Felix Milo Ned Toby Adam Ravi Luca Kofi Dan Will Henry Jon",
    ),
    "elder": _words("mother father grandma grandpa aunt uncle sister brother"),
    "trait": _words(
        "kind brave clever gentle cheerful curious honest patient careful friendly helpful lively "
        "thoughtful polite sweet loyal"
    ),
    "weather": _words("sunny windy cloudy warm breezy misty bright mild cool foggy hazy rainy"),
    "time": _words("morning afternoon evening day"),
    "pattern": _words("striped spotted woolly patched cozy checkered flowery faded fancy fuzzy soft thick"),
    "clothes": _words("coat hat scarf boots cap mittens sweater cape gloves jacket shoes vest"),
    "place": _words(
        "garden park forest meadow orchard yard field valley village market playground square "
        "jungle vineyard harbor canyon"
    ),
    "colour": COLOURS,
    "hue": COLOURS,
    "look": _words(
        "little old tiny big lovely pretty sturdy funny plain odd heavy splendid wonderful enormous grand precious"
    ),
    "toy": THINGS,
    "prize": THINGS,
    "texture": _words("mossy muddy dusty crooked broken low wide dark shady strange ancient famous"),
    "spot": _words(
        "bush rock log bench tree fence gate wall stump cart barrel ladder shed well statue haystack"
    ),
    "scary": _words("bridge tunnel cave tower path swamp maze castle"),
    "fright": _words("scared afraid frightened nervous worried timid"),
    "sad": _words("sad upset gloomy unhappy miserable tearful glum troubled lonely weary"),
    "happy": _words("happy glad proud merry joyful thrilled delighted pleased jolly hopeful"),
    "build": _words("shaggy thin plump sleepy noisy young clumsy shy"),
    "animal": ANIMALS,
    "treat": _words("cake pie bun muffin cookie pancake peach pear"),
    "game": _words("tag catch marbles hopscotch chess checkers cards dominoes"),
    "skill": _words("skate whistle juggle dance sing paint knit read"),
}
