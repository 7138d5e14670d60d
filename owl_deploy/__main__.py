"""The command `owl`, which Ctrl-C may end as soon as it has begun.

Its other modules take most of half a second to import, within `main`; what Ctrl-C makes of them
then, nothing but this one is sure to survive.
"""

import sys

from owl_deploy.utils import interrupted


def main() -> None:
    """Run `owl`: see `cli.main`."""
    try:
        from owl_deploy import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write(f"owl: {interrupted.sentence()}\n")
        sys.exit(interrupted.EXIT_CODE)


if __name__ == "__main__":
    main()
