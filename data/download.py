"""The published files: SST-2, MNLI, QQP and QNLI of GLUE, SQuAD v1.1, and the text of the English Wikipedia.

    python data/download.py sst2 mnli qqp qnli squad --out DIR      # DIR is then what train.py takes as --data
    python data/download.py stsb --out DIR                          # for infer_cpu.py --evaluate --task stsb
    python data/download.py wikipedia --out DIR                     # more than 20 GB, stored as published

A file arrives as NAME.part, an archive is unpacked in FOLDER.part, and only what is whole and verified gets the name
that the readers look for. The same command again keeps what is there and goes on in the middle of what is not.
"""
import argparse
import errno
import hashlib
import http.client
import os
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

if not __package__:             # started as a file: Python then looks for modules in data/, not beside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import DataError  # noqa: E402


@dataclass(frozen=True)
class Source:
    """One published file and what becomes of it under --out: `files` in `folder`."""
    url: str
    folder: str
    files: tuple[str, ...]      # an archive: those in it that the readers need; otherwise the name of the file itself
    size: int = 0               # in bytes; 0: not known in advance
    checksum: str = ""          # "algorithm:digits"; "": none known, only the size and the archive's own CRC count
    sums: str = ""              # where the publisher lists sha1 sums under dated names
    unpacked: int = 0           # of an archive, which it marks: refused if it unpacks to more bytes than this


# Only Wikimedia publishes checksums. The others were recorded by TensorFlow Datasets and by HuggingFace's datasets 1.x,
# each from a download of its own, and agree (QQP-clean.zip: the latter only).
GLUE, SQUAD = "https://dl.fbaipublicfiles.com/glue/data", "https://rajpurkar.github.io/SQuAD-explorer/dataset"
WIKIPEDIA = "https://dumps.wikimedia.org/enwiki/latest"
SOURCES = {
    "sst2": [Source(
        f"{GLUE}/SST-2.zip", "SST-2", ("train.tsv", "dev.tsv"), size=7_439_277, unpacked=200_000_000,
        checksum="sha256:d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "mnli": [Source(
        f"{GLUE}/MNLI.zip", "MNLI", ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"), size=312_783_507,
        checksum="sha256:e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633", unpacked=4_000_000_000)],
    "qqp": [Source(
        f"{GLUE}/QQP-clean.zip", "QQP", ("train.tsv", "dev.tsv"), size=41_696_084, unpacked=1_000_000_000,
        checksum="sha256:40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")],
    "qnli": [Source(
        f"{GLUE}/QNLIv2.zip", "QNLI", ("train.tsv", "dev.tsv"), size=10_627_589, unpacked=200_000_000,
        checksum="sha256:e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "squad": [Source(
        f"{SQUAD}/train-v1.1.json", "SQuAD", ("train-v1.1.json",), size=30_288_272,
        checksum="sha256:3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"), Source(
        f"{SQUAD}/dev-v1.1.json", "SQuAD", ("dev-v1.1.json",), size=4_854_279,
        checksum="sha256:95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9")],
    "stsb": [Source(
        f"{GLUE}/STS-B.zip", "STS-B", ("dev.tsv",), size=802_872, unpacked=50_000_000,
        checksum="sha256:e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
    "wikipedia": [Source(
        f"{WIKIPEDIA}/enwiki-latest-pages-articles.xml.bz2", "Wikipedia", ("enwiki-latest-pages-articles.xml.bz2",),
        sums=f"{WIKIPEDIA}/enwiki-latest-sha1sums.txt")],
}
USER_AGENT = "prune-once-for-all/1.0 (data/download.py)"    # Wikimedia turns away clients that do not name themselves
TIMEOUT = 30        # seconds without a byte until a connection counts as dead
ATTEMPTS = 5        # in a row that bring nothing new
PAUSE = 1.0         # seconds before the second attempt, doubled before each further one
CHUNK = 1 << 16


class Interrupted(Exception):
    """An attempt failed in a way that another one may not."""


def progress_bar(name, total=None, done=0):
    """On a terminal it moves all the time, in a file a line now and then is enough."""
    return tqdm(total=total, initial=done, desc=name, unit="B", unit_scale=True,
                mininterval=0.2 if sys.stderr.isatty() else 20)


def basename(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def version_note(part: Path) -> Path:
    """Beside a .part file: the ETag (or date) of the version that it is a part of."""
    return part.with_name(part.name + ".version")


def discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    version_note(part).unlink(missing_ok=True)


def receive(url: str, part: Path, size: int) -> None:
    """One attempt to complete `part` from `url`. Interrupted if another may help, DataError if not, OSError: the disk.

    Only the rest is asked for, and only of the version that `part` began with (If-Range). A server that has another
    version, or knows no ranges, answers 200 with the whole file, which then replaces the part.
    """
    note = version_note(part)
    have = part.stat().st_size if part.is_file() and note.is_file() else 0
    if size and have == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", note.read_text("latin-1"))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:                           # there is nothing after what we have
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            discard(part)
        elif error.code < 500 and error.code not in (408, 429):
            raise DataError(f"{url}: the server answers {error.code} {error.reason}, expected the file; open the "
                            "address in a browser to see whether it has moved, or try again later") from None
        raise Interrupted(f"the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"no answer from the server ({getattr(error, 'reason', None) or error})") from None
    with response:
        if response.status == 206:
            pieces = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not pieces or int(pieces[1]) != have:
                discard(part)
                raise Interrupted("the server sent another piece than the one asked for")
            total = int(pieces[2])
        else:
            have, total = 0, size if response.length is None else response.length
        if size and total != size:
            raise DataError(f"{url}: the server offers {total} bytes, expected {size}; the published file has changed, "
                            "or something on the way answers in its place: open the address in a browser to see")
        if shutil.disk_usage(part.parent).free < total - have:
            raise OSError(errno.ENOSPC, f"no room for the {total - have} bytes to come", str(part))
        with open(part, "ab" if have else "wb") as file, progress_bar(basename(url), total or None, have) as bar:
            if not have:
                version = response.headers.get("ETag") or response.headers.get("Last-Modified") or "W/"
                note.unlink(missing_ok=True)
                if not version.startswith("W/"):        # a weak ETag does not promise the same bytes
                    note.write_text(version, "latin-1")
            while True:
                try:
                    block = response.read(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise Interrupted(f"the connection broke at byte {have} ({error})") from None
                if not block:
                    break
                file.write(block)
                have += len(block)
                bar.update(len(block))
    if have < total:
        raise Interrupted(f"the connection ended at byte {have} of {total}")


def download(url: str, part: Path, size: int = 0) -> None:
    """Complete `part` from `url`, in as many attempts as bring something new. DataError if it cannot be done."""
    failures, furthest = 0, 0
    while True:
        try:
            return receive(url, part, size)
        except Interrupted as error:
            have = part.stat().st_size if part.is_file() else 0
            failures, furthest = 1 if have > furthest else failures + 1, max(have, furthest)
            if failures == ATTEMPTS:
                raise DataError(f"{url}: {error}, and {ATTEMPTS} attempts brought no more; check the connection and "
                                "type the same command again: it goes on from what has arrived") from None
            tqdm.write(f"{basename(url)}: {error}; trying again", file=sys.stderr)
            time.sleep(PAUSE * 2 ** (failures - 1))


def dated(source: Source, part: Path) -> Source:
    """`source` with the checksum from its publisher's sums, and the address of the file they speak of.

    While Wikimedia makes a dump, files named `latest` can come from another run than the sums beside them. So the sums
    say which date, and the file comes from the folder of that date.
    """
    if not source.sums:
        return source
    listing = part.with_name(basename(source.sums) + ".part")
    download(source.sums, listing)
    name = re.escape(basename(source.url)).replace("latest", r"(\d{8})")
    found = re.search(rf"^([0-9a-f]{{40}})[ *]+{name}$", listing.read_text(errors="replace"), re.M)
    discard(listing)
    if not found:
        raise DataError(f"{source.sums}: found no line for {basename(source.url).replace('latest', 'DATE')}, expected "
                        "its sha1; the dump may still be in the making: try again in a few days")
    return replace(source, url=source.url.replace("latest", found[2]), checksum=f"sha1:{found[1]}")


def verify(source: Source, part: Path) -> None:
    """Delete `part` and raise DataError if it does not have the checksum of `source`."""
    algorithm, _, expected = source.checksum.partition(":")
    if not algorithm:
        return
    digest = hashlib.new(algorithm)
    with open(part, "rb") as file, progress_bar(f"checking {basename(source.url)}", part.stat().st_size) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        discard(part)
        raise DataError(f"{source.url}: what arrived has the {algorithm} {digest.hexdigest()}, expected {expected}; it "
                        "was deleted: type the same command again; if that fails too, the published file has changed")


def check_members(members: list[zipfile.ZipInfo], limit: int) -> None:
    """BadZipFile if a member would land elsewhere than below the folder of unpacking, or all are more than `limit`."""
    for member in members:
        path = PureWindowsPath(member.filename)         # it knows / and \ and drives, on every system
        if path.drive or path.root or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise zipfile.BadZipFile(f"the member {member.filename!r} leads out of the folder")
    total = sum(member.file_size for member in members)     # a member that is longer than it says fails its CRC
    if total > limit:
        raise zipfile.BadZipFile(f"it unpacks to {total} bytes, expected at most {limit}")


def unpack(source: Source, archive: Path, folder: Path) -> None:
    """Make `folder` from the folder of that name in `archive`, whole or not at all; other members are left alone.

    Raises DataError, and deletes the archive, if that is damaged, hostile, or without the files the readers need.
    """
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            check_members(members, source.unpacked)
            names = {member.filename for member in members}
            for file in source.files:
                if f"{folder.name}/{file}" not in names:
                    raise zipfile.BadZipFile(f"there is no {folder.name}/{file} in it")
            for member in tqdm(members, desc=f"unpacking {basename(source.url)}", unit="file"):
                if member.filename.startswith(f"{folder.name}/"):
                    content.extract(member, temporary)
        os.replace(temporary / folder.name, folder)
    except Exception as error:                          # zipfile raises many kinds for a damaged archive
        if isinstance(error, OSError) and error.errno:  # the disk, not the archive
            raise
        discard(archive)
        raise DataError(f"{source.url}: this archive was refused and deleted ({error}); type the same command again; "
                        "if that fails too, the published file has changed") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def obtain(source: Source, out: str | Path) -> bool:
    """Leave the files of `source` under the folder `out`. Returns False if they were already there.

    Raises DataError for everything that can go wrong on the way: the network, the server, the archive, the disk.
    """
    folder = Path(out) / source.folder
    missing = [file for file in source.files if not (folder / file).is_file()]
    if not missing:
        return False
    if source.unpacked and folder.exists():
        raise DataError(f"{folder}: this is there, but without {missing[0]}; move it away and type the same command "
                        "again, or choose another folder with --out")
    part = (folder.parent if source.unpacked else folder) / (basename(source.url) + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        source = dated(source, part)
        download(source.url, part, source.size)
        verify(source, part)
        if source.unpacked:
            unpack(source, part, folder)
        else:
            os.replace(part, folder / source.files[0])
        discard(part)
    except OSError as error:
        raise DataError(f"{error.filename or part}: {error.strerror or error}; make room there or get the right to "
                        "write, or choose another folder with --out") from None
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=" ".join(SOURCES))
    parser.add_argument("--out", default="out/data", help="folder to write to (default: %(default)s)")
    settings = parser.parse_args(arguments)
    try:
        for name in settings.names:
            if name not in SOURCES:
                raise DataError(f"there is no {name!r} to download; give one or more of {' '.join(SOURCES)}")
        for source in [source for name in settings.names for source in SOURCES[name]]:
            made = "wrote" if obtain(source, settings.out) else "kept"
            print(made, *[str(Path(settings.out, source.folder, file)) for file in source.files])
    except DataError as error:
        print(f"download.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("download.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
