"""Training curves as an SVG file, from the log.csv that a stage leaves in its directory.

    python -m bench.draw_curves bench/tiny_prune.csv --svg docs/tiny_prune.svg
"""
import argparse
from pathlib import Path

from formats.curves import draw, read_log


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", help="a log.csv")
    parser.add_argument("--svg", required=True, type=Path, help="file to write")
    arguments = parser.parse_args()
    arguments.svg.write_text(draw(read_log(arguments.log)))


if __name__ == "__main__":
    main()
