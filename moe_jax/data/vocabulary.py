"""The words of the embedded corpus: for each slot of the tale, the list that it draws from.

Lists are long and the words in them interchangeable, so that a word said for the first time carries several bits,
and a model that remembers it gains as many at each mention after. A word may bring others along, always the same
ones: a girl is a she, a rabbit lives in a burrow and eats a carrot. A model can learn those too.
"""

from collections.abc import Sequence

from moe_jax.data.grammar import Word

_VOWEL_SOUNDS = "aeiou"
_SILENT_H = ("honest",)


def _word(plain: str, **forms: str) -> Word:
    """A word with its article, "an orange", and whatever other forms it has."""
    an = plain[0] in _VOWEL_SOUNDS or plain in _SILENT_H
    return {"": plain, "a": f"{'an' if an else 'a'} {plain}", **forms}


def _list(words: str) -> Sequence[Word]:
    return tuple(_word(word) for word in words.split())


def _people(names: str, child: str, he: str, him: str, his: str) -> list[Word]:
    forms = {"child": child, "he": he, "He": he.capitalize(), "him": him, "his": his, "His": his.capitalize()}
    return [_word(name, **forms) for name in names.split()]


def _animal(plain: str, sound: str, home: str, food: str) -> Word:
    return _word(plain, sound=sound, home=home, food=food)


CHILDREN = (
    *_people(
        "Lily Mia Anna Rosie Ella Nora Clara Ruby Hana Zoe Ivy Molly Tess Greta Sofia Maya Bella Lucy Freya Priya",
        *("girl", "she", "her", "her"),
    ),
    *_people(
        "Tom Ben Max Leo Sam Finn Jack Oscar Hugo Theo Noah Omar Felix Milo Ned Toby Adam Ravi Luca Kofi",
        *("boy", "he", "him", "his"),
    ),
)
ANIMALS = (
    _animal("rabbit", "Sniff", "burrow", "a carrot"),
    _animal("mouse", "Squeak", "hole", "some cheese"),
    _animal("duck", "Quack", "pond", "some bread"),
    _animal("puppy", "Woof", "kennel", "a bone"),
    _animal("kitten", "Meow", "basket", "some milk"),
    _animal("squirrel", "Chip", "oak", "a nut"),
    _animal("owl", "Hoot", "barn", "a cracker"),
    _animal("lamb", "Baa", "fold", "some clover"),
    _animal("piglet", "Oink", "sty", "a potato"),
    _animal("pony", "Neigh", "stable", "some hay"),
    _animal("chick", "Cheep", "coop", "some corn"),
    _animal("hedgehog", "Snuffle", "hedge", "a mushroom"),
    _animal("cub", "Growl", "den", "some honey"),
    _animal("sparrow", "Tweet", "nest", "a worm"),
    _animal("crow", "Caw", "treetop", "a berry"),
    _animal("goose", "Honk", "lake", "some oats"),
)
COLOURS = _list("red blue green yellow purple pink orange silver golden brown white black")
TOYS = _list(
    "kite doll boat drum train robot whistle bell cup lantern flute truck top puppet clock box mask crown lamp jar "
    "bucket horn harp trumpet"
)

SLOTS = {
    "hero": CHILDREN,
    "friend": CHILDREN,
    "elder": _list("mother father grandma grandpa aunt uncle sister brother"),
    "trait": _list(
        "kind brave clever gentle cheerful curious honest patient careful friendly helpful lively thoughtful polite "
        "sweet loyal"
    ),
    "place": _list(
        "garden park forest meadow orchard yard field valley village market playground square jungle vineyard harbor "
        "canyon"
    ),
    "weather": _list("sunny windy cloudy warm breezy misty bright mild cool foggy hazy rainy"),
    "time": _list("morning afternoon evening day"),
    "pattern": _list("striped spotted woolly patched cozy checkered flowery faded fancy fuzzy plain thick"),
    "clothes": _list("coat hat scarf boots cap mittens sweater cape gloves jacket shoes vest"),
    "chorus": _list("robins crickets bees doves larks finches pigeons swallows"),
    "toy": TOYS,
    "prize": TOYS,
    "colour": COLOURS,
    "hue": COLOURS,
    "look": _list("little old new tiny big lovely shiny funny pretty sturdy painted precious"),
    "texture": _list("mossy muddy dusty crooked broken huge low wide dark shady strange ancient"),
    "spot": _list("bush rock log bench tree fence gate wall stump cart barrel ladder shed well statue haystack"),
    "scary": _list("bridge tunnel cave tower path stairway ruin swamp mill maze cabin mine"),
    "fright": _list("scared afraid frightened nervous worried timid"),
    "sad": _list("sad lonely upset gloomy unhappy miserable sorry glum"),
    "happy": _list("happy glad proud merry joyful thrilled delighted pleased"),
    "build": _list("small thin young plump sleepy noisy shaggy gray spotless freckled shivering hungry"),
    "animal": ANIMALS,
    "flavour": _list("apple cherry lemon honey plum ginger peach carrot banana pumpkin walnut cinnamon"),
    "treat": _list("cake pie bun muffin tart cookie pancake waffle roll biscuit pudding scone"),
    "game": _list("tag catch marbles hopscotch chess checkers cards leapfrog darts dominoes bingo croquet"),
    "skill": _list("skate whistle juggle dance sing paint knit read draw sew write yodel"),
}
