"""Bugs to plant in `foundation`, one at a time, each with the check that must catch it."""

from foundation.challenges.bugs_of_rows import BUGS_OF_ROWS
from foundation.challenges.bugs_of_systems import BUGS_OF_SYSTEMS
from foundation.challenges.bugs_of_the_model import BUGS_OF_THE_MODEL
from foundation.challenges.bugs_of_the_parts import BUGS_OF_THE_PARTS
from foundation.challenges.bugs_of_training import BUGS_OF_TRAINING

BUGS = [*BUGS_OF_THE_PARTS, *BUGS_OF_THE_MODEL, *BUGS_OF_TRAINING, *BUGS_OF_SYSTEMS, *BUGS_OF_ROWS]
"""All of them, by chapter."""
