"""SplitMix64 in Python's integers."""


def scattered(number: int) -> int:
    """The output function of Steele, Lea and Flood 2014."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31
