"""Our own word lists, from which the prose rendering builds names and filler sentences."""

from __future__ import annotations

ADJECTIVES = (
    "amber", "brisk", "calm", "copper", "crooked", "dusty", "early", "faint", "gentle",
    "golden", "hidden", "hollow",
    "icy", "ivory", "late", "little", "lonely", "mellow", "mossy", "narrow", "old", "pale",
    "patient", "plain",
    "proud", "quiet", "rusty", "scarlet", "silver", "sleepy", "steady", "tidy", "upper",
    "velvet", "violet", "wooden",
)  # fmt: skip
NOUNS = (
    "anchor", "attic", "badger", "barrel", "basket", "beacon", "bridge", "candle", "canyon",
    "cellar", "chapel", "cliff",
    "compass", "cottage", "falcon", "ferry", "forge", "fountain", "garden", "harbour", "hedge",
    "heron", "kettle", "ladder",
    "lantern", "marble", "meadow", "mill", "orchard", "otter", "paddle", "parlour", "pebble",
    "pillar", "quarry", "ribbon",
    "river", "saddle", "shed", "sparrow", "spindle", "stable", "thistle", "tower", "tunnel",
    "valley", "wagon", "willow",
)  # fmt: skip

FILLER_SUBJECTS = (
    "the baker", "a neighbour", "the doctor", "our teacher", "the postman", "a cousin",
    "the painter", "the mayor",
    "a traveller", "the librarian", "the tailor", "an aunt", "the gardener's son",
    "the night watchman",
)  # fmt: skip
FILLER_VERBS = (
    "walked past", "talked about", "waited near", "looked for", "forgot", "described",
    "repaired", "admired",
    "carried home", "asked about", "laughed at", "sketched", "counted on", "argued over",
)  # fmt: skip
FILLER_OBJECTS = (
    "the market stalls", "a warm loaf", "the weather", "an umbrella", "the school play",
    "a letter", "the bus stop",
    "a bowl of soup", "the long road", "a new coat", "the evening news", "a row of chairs",
    "the open window",
)  # fmt: skip
FILLER_ENDINGS = (
    "before breakfast", "on the way back", "without a word", "for most of the day",
    "as everyone had hoped",
    "while it rained", "in no great hurry", "and thought nothing of it",
    "until the lamps were lit", "once again",
)  # fmt: skip
