"""Answers: which option one names."""

import re


def option_letter(text: str, options: list[str]) -> str | None:
    """The letter of the option that an answer names, or None: "B", "b", "B.", "B. red box" or its words, "red box".

    options   each "B. red box"; one without ". " has no letter: it is named by all its text, which is what comes back
    """
    for option in options:
        letter, _, words = option.partition(". ")
        if text.strip().lower() == (words or option).lower():
            return letter
    found = re.fullmatch(r"\s*([A-Za-z])(?:[.)].*)?\s*", text, re.DOTALL)
    return found[1].upper() if found else None
