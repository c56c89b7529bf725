"""A command line: what it takes, and the one sentence that it answers a mistake with."""
import argparse
import dataclasses
import difflib
import inspect
import re
import sys


MOST_THREADS = 1024         # more than any machine has cores for; PyTorch starts them all at once


class Parser(argparse.ArgumentParser):
    """argparse that knows no abbreviations and whose error is one sentence and exit code 2. program: its name there."""

    def __init__(self, program, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.program = program

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {close[0]}?" if close else
                                                      f"; python {self.program} --help lists them all")
        print(f"{self.program}: {message}", file=sys.stderr)
        sys.exit(2)


def positive_int(text, most=2 ** 31 - 1):
    """argparse type: a whole number from 1."""
    if not re.fullmatch("0*[1-9][0-9]{0,9}", text) or int(text) > most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
    return int(text)


def thread_count(text):
    """argparse type: how many threads."""
    return positive_int(text, MOST_THREADS)


def positive_ints(text):
    """argparse type: '1,16' -> [1, 16]."""
    return [positive_int(part) for part in text.split(",")]


def add_settings(parser, settings, choices):
    """One flag per field of a dataclass: its type, its default and, from its source, the trailing comment as help. A
    comment on a line of its own heads the group of the fields below it. choices: {field: its values}."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    group = parser
    for line in inspect.getsource(settings).splitlines():
        heading, line_of_field = re.match(r"    # (.*)", line), re.match(r"    (\w+): .*?  # (.*)", line)
        if heading:
            group = parser.add_argument_group(heading[1])
        elif line_of_field:
            add_flag(group, fields[line_of_field[1]], line_of_field[2], choices.get(line_of_field[1]))


def add_flag(group, field, comment, choices):
    """--field-name with the type in its annotation, int, float, str or bool, and None until it is typed."""
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool:
        group.add_argument(flag, action="store_true", default=None, help=comment)
        return
    kind = next(kind for kind in (int, float, str) if kind is field.type or kind in getattr(field.type, "__args__", ()))
    default = "" if field.default in ("", None) else f" [{field.default}]"
    group.add_argument(flag, type=kind, choices=choices, metavar=None if choices else kind.__name__.upper(),
                       help=comment.replace("%", "%%") + default)


def show_any_letter():
    """Where the terminal, or the file that takes its place, is not UTF-8, what it cannot show becomes a question mark
    and not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def to_stderr(line):
    print(line, file=sys.stderr)
