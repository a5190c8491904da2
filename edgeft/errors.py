"""The one exception a user is meant to see."""


class UserError(Exception):
    """A failure that the user can mend: one line, what was wrong and what to do. Exit code 2."""


def near(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'lora'?"`` or the list of what there is, to end an unknown-name line."""
    import difflib

    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "; there are: " + ", ".join(sorted(known))
