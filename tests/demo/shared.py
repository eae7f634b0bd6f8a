"""What the tests of the tabs share."""

from vlm_fix.demo import compare

PROMPT = compare.CAPTION_PROMPT
SMALL = ("picto-llava", "all", "shift", 3, ["vhr:alpha=3+hiprune:keep=32"], 3)


def last(made_of):
    for made in made_of:
        result = made
    return result
