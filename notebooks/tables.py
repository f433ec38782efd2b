"""The table of methods in the README: prints it, or with --write puts it between the README's marks.

python notebooks/tables.py [--write]
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
_MARKED = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.S)


def filled(text: str, table: str) -> str:
    """A text with the table between its marks.

    Raises:
      ValueError: the text has not one pair of marks.
    """
    if len(_MARKED.findall(text)) != 1:
        raise ValueError(f"{README}: expected one pair of lines, <!-- methods --> and <!-- /methods -->")
    return _MARKED.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def main() -> None:
    """Prints or writes the table."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from book.methods import table

    if "--write" in sys.argv[1:]:
        README.write_text(filled(README.read_text(), table()))
    else:
        print(table())


if __name__ == "__main__":
    main()
