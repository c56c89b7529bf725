"""A file stands whole or not at all; JSON that people edit; names in a sentence."""
import contextlib
import json
import os
import tempfile
from pathlib import Path

from model import InputError


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which stands under `path` only once the block is through and the bytes are on the
    disk: a reader finds the old file or the new one, never half of it. InputError where that cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # Of a full disk, torch.save tells by an error of its own, in whose context the system's stands.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path} cannot be written ({reason.strerror}); make room there, or write elsewhere") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path, content):
    """Write bytes or text, whole or not at all (see whole_file)."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_json(path):
    """The object in a JSON file; InputError names a file that is missing or is not a JSON object."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, and holds a {type(value).__name__}")
    return value


def names_in_short(names, limit=6):
    """'a, b, c and 4 more'."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def make_folder(path):
    """The folder of --predictions, made if it is not there; InputError if nothing can be written to it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"--predictions {path}: {error.strerror}; give a folder that can be written to") from None


def check_place(flag, path):
    """InputError unless a file can stand at `path`, which a flag named; an empty path is none."""
    if path and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
        raise InputError(f"{flag} {path} is a folder, or in a folder that is not there; give a file name")
