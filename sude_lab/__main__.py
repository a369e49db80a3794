"""`python -m sude_lab` is `sude-lab`."""

import sys


def main() -> int:
    """Run the command; Ctrl-C is one sentence also while it is being imported."""
    try:
        from sude_lab.cli import main as command
    except KeyboardInterrupt:
        print("sude-lab: stopped; nothing was written.", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
