"""pluralize: writes a number with its noun in the singular or the plural, for messages."""


def pluralize(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 document" or "2,000 documents".

    Args:
        number: Number of things.
        noun: Noun in the singular, whose plural ends in "s". Words may come before it, as in
            "held-out token".
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
