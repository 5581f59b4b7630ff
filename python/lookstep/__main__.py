"""`python -m lookstep`: the demonstration."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from . import __version__


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: what follows `python -m lookstep`; by default, what this process was started with.

    Raises:
        SystemExit: if the arguments are wrong, something that the demonstration needs is missing, or after `--help`.
    """
    parser = argparse.ArgumentParser("python -m lookstep", description="Lookahead for plain arrays.")
    parser.add_argument("--version", action="version", version=f"lookstep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train on handwritten digits with and without Lookahead, and report",
        description="Trains a small network on scikit-learn's handwritten digits with RAdam, Adam and SGD, alone and "
        "inside Lookahead, at learning rates from too low to too high. Nothing is downloaded.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="where to write (default: report/)"
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds: fewer seeds and epochs, so rougher numbers")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="of every random number (default: 0)")
    demo.add_argument("--gpu", action="store_true", help="train on a GPU by compute shaders, beside NumPy")
    options = parser.parse_args(arguments)

    try:
        run = import_module(".gpu.demo" if options.gpu else ".demo", __package__).run
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        extras = "demo,gpu" if options.gpu else "demo"
        sys.exit(f'the demonstration needs {missing}: pip install "lookstep[{extras}]"')
    try:
        run(options.out, quick=options.quick, seed=options.seed)
    except OSError as error:
        sys.exit(f"cannot write {error.filename}: {error.strerror}")
    except RuntimeError as error:
        if not options.gpu:
            raise
        sys.exit(str(error))  # there is no adapter


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer in [0, 2**32), got {text!r}")


if __name__ == "__main__":
    main()
