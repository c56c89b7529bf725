"""A command line: what it takes, and the one sentence that it answers a mistake with."""
import argparse
import dataclasses
import difflib
import inspect
import re
import sys


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


def positive_int(text):
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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


def to_stderr(line):
    print(line, file=sys.stderr)
