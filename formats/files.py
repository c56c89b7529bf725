"""A file stands whole or not at all; JSON that people edit; names in a sentence."""
import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

from model import InputError

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

LFS_POINTER = b"version https://git-lfs.github.com/"


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which stands under `path` only once the block is through and the bytes are on the
    disk: a reader finds the old file or the new one, never half of it. InputError where that cannot be written."""
    path = Path(os.path.realpath(path))                     # through a link to what it names
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


def write_json(path, value):
    """Write a value as JSON that every reader takes: a number that is none, NaN or Inf, becomes null."""
    write_file(path, json.dumps(finite(value), indent=1, allow_nan=False))


def finite(value):
    """The same dicts, lists and values, with None in place of every float that is no number."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def demand_content(path):
    """InputError if a file is only git-LFS's pointer to what should stand there."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path} is a pointer of git-LFS, not the file itself; fetch that with git lfs pull, or "
                             f"download the file")


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


def lock_folder(folder, wait=False):
    """Keep other processes out of a folder until the file descriptor that is returned is closed, or this process ends,
    however it does. BlockingIOError, unless it is to wait, while another one has the folder. Returns None where the
    system or the disk has no such locks."""
    if not fcntl:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise


def unlock(descriptor):
    """Give up what `lock_folder` returned."""
    if descriptor is not None:
        os.close(descriptor)


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
    """InputError unless a file can be written to `path`, which a flag named; an empty path is none."""
    if not path:
        return
    place = Path(path).absolute()
    if place.is_dir() or not place.resolve().parent.is_dir():
        raise InputError(f"{flag} {path} is a folder, or in a folder that is not there; give a file name")
    if place.parts[1] in ("dev", "proc") or place.exists() and not place.is_file():
        raise InputError(f"{flag} {path} is no file that could be replaced as a whole; give another file name")
    try:
        with tempfile.TemporaryFile(dir=place.resolve().parent):
            pass
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}; give a file in a folder that can be written to") from None
