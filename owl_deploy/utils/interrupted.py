"""How `owl` ends after Ctrl-C. It imports nothing: Ctrl-C may come while all else is imported."""

EXIT_CODE = 130


def sentence(left: str = "") -> str:
    """What is said then; `left`: what there is to go on with, if a run left something."""
    return f"interrupted; {left or 'finished outputs are untouched'}."
