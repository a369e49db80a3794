"""`python -m sude_lab` is `sude-lab`; where the core alone is installed it says what is missing."""

import sys


def main() -> int:
    """Run one command and return its exit code; 2 where the command line's packages are missing."""
    try:
        from sude_lab.cli import main as command_line
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sude_lab"):
            raise
        print(
            f"sude-lab: the commands need the package {error.name}, which the core goes without: "
            'pip install "sude-lab[lab]", or pip install -e ".[lab]" in a clone.',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:  # while it was being imported
        print("sude-lab: stopped; nothing was written.", file=sys.stderr)
        return 130
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
