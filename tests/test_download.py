"""data/download.py against a server of our own: every layout, bad connections, bad servers, hostile archives."""
import builtins
import hashlib
import http.server
import io
import os
import random
import re
import stat
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import DataError, download, embed, tasks, tiny

BODY = random.Random(0).randbytes(300_000)      # of several chunks, so that a broken connection leaves some of them
SOURCE = download.Source("http://to.be.replaced/files/book.txt", "Books", ("book.txt",))
ZIPPED = download.Source("http://to.be.replaced/files/SST-2.zip", "SST-2", ("train.tsv", "dev.tsv"), unpacked=10_000)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour = self.server.behaviour
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        behaviour.requests.append(SimpleNamespace(path=self.path, range=wanted, condition=condition))
        status = behaviour.statuses.pop(0) if behaviour.statuses else 200
        body = behaviour.files.get(self.path)
        if body is None or status != 200:
            self.send_error(404 if body is None else status)
            return
        header, version = behaviour.version[0], behaviour.version[1].format(hashlib.md5(body).hexdigest())
        start = 0
        if wanted and behaviour.ranges and condition == version:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206 if start < len(body) else 416)
            self.send_header("Content-Range", f"bytes {start - behaviour.shift}-{len(body) - 1}/{len(body)}"
                             if start < len(body) else f"bytes */{len(body)}")
        else:
            self.send_response(200)
        self.send_header(header, version)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = behaviour.cuts.pop(0) if behaviour.cuts else None
        self.wfile.write(body[start:end])
        self.wfile.flush()
        if end is not None and behaviour.stalls:
            behaviour.released.wait(10)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server's behaviour: `files` {path: bytes}, `cuts` [place in the file where the next answer ends, …], `stalls`
    (an answer that is cut goes silent, not away), `ranges` (it knows them), `shift` (it starts them too early),
    `statuses` [of the next answers], `version` (header, format of its value); `requests` tells what was asked."""
    monkeypatch.setattr(download, "TIMEOUT", 5)
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    behaviour = SimpleNamespace(files={}, cuts=[], stalls=False, ranges=True, shift=0, statuses=[], requests=[],
                                version=("ETag", '"{}"'), released=threading.Event())
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads, running.behaviour = True, behaviour
    behaviour.address = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield behaviour
    behaviour.released.set()
    running.shutdown()
    running.server_close()


def publish(server, source, content, checksum=True):
    """Serve `content` at the path of the source's address; returns the source with the local address."""
    path = re.sub(r"https?://[^/]+", "", source.url)
    server.files[path] = content
    return replace(source, url=server.address + path, size=len(content) if checksum else 0,
                   checksum="sha256:" + hashlib.sha256(content).hexdigest() if checksum else "")


def zip_of(members, compression=zipfile.ZIP_DEFLATED):
    """The bytes of an archive with members {name: content}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def sentence(error):
    """The message of a DataError, which is one line."""
    message = str(error.value)
    assert "\n" not in message and len(message) > 40
    return message


# ---------------------------------------------------------------- what is there in the end

def test_table_agrees_with_the_readers():
    assert list(download.SOURCES) == [*tasks.TASKS, "stsb", "wikipedia"]
    assert [(source.folder, source.files) for source in download.SOURCES["stsb"]] == [(embed.STSB.folder, ("dev.tsv",))]
    for name, task in tasks.TASKS.items():
        sources = download.SOURCES[name]
        assert {source.folder for source in sources} == {task.folder}
        assert [file for source in sources for file in source.files] == [task.train, *task.dev.values()]
    for source in [source for sources in download.SOURCES.values() for source in sources]:
        assert source.url.startswith("https://")
        assert source.sums or (re.fullmatch("sha256:[0-9a-f]{64}", source.checksum) and source.size)
        assert bool(source.unpacked) == source.url.endswith(".zip") and source.unpacked >= 10 * source.size * (
            source.unpacked > 0)
        assert source.unpacked or source.files == (download.basename(source.url),)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_tasks(folder, random.Random(0), train=12, dev=12)
    return folder


@pytest.mark.parametrize("name", tasks.TASKS)
def test_layout_is_what_the_readers_expect(name, server, world, tmp_path):
    """Served as published (with what zip programs add), fetched, and read by the project's readers."""
    task, out = tasks.TASKS[name], tmp_path / "new" / "out"
    for source in download.SOURCES[name]:
        if source.unpacked:
            members = {f"{task.folder}/{path.name}": path.read_bytes() for path in (world / task.folder).iterdir()}
            content = zip_of({f"{task.folder}/": "", **members, f"{task.folder}/original/Icon\r": "x",
                              f"__MACOSX/{task.folder}/._train.tsv": "x"})
        else:
            content = (world / task.folder / source.files[0]).read_bytes()
        assert download.obtain(publish(server, source, content), out)
    for file in (task.train, *task.dev.values()):
        path = out / task.folder / file
        assert path.read_bytes() == (world / task.folder / file).read_bytes()
        assert tasks.read_questions(path) if task.kind == "span" else tasks.read_table(path, task)
    assert os.listdir(out) == [task.folder]         # no archive, no part, no __MACOSX


def wikipedia(server, listed=BODY, line="{sha1}  enwiki-20260601-pages-articles.xml.bz2"):
    """The table's entry, with a server that has a dump of June and says the sha1 of `listed` in `line`."""
    source, = download.SOURCES["wikipedia"]
    other = "{}  enwiki-20260601-pages-articles-multistream.xml.bz2\n".format("0" * 40)
    sums = other + line.format(sha1=hashlib.sha1(listed).hexdigest()) + "\n"
    server.files["/enwiki/20260601/enwiki-20260601-pages-articles.xml.bz2"] = BODY
    server.files["/enwiki/latest/enwiki-latest-pages-articles.xml.bz2"] = b"of another run than the sums"
    server.files["/enwiki/latest/enwiki-latest-sha1sums.txt"] = sums.encode()
    return replace(source, **{name: getattr(source, name).replace("https://dumps.wikimedia.org", server.address)
                              for name in ("url", "sums")})


def test_wikipedia_is_the_dump_that_its_sums_speak_of(server, tmp_path):
    assert download.obtain(wikipedia(server), tmp_path)
    assert files_below(tmp_path) == ["Wikipedia/enwiki-latest-pages-articles.xml.bz2"]
    assert (tmp_path / "Wikipedia/enwiki-latest-pages-articles.xml.bz2").read_bytes() == BODY


def test_wikipedia_with_other_sums(server, tmp_path):
    with pytest.raises(DataError) as error:
        download.obtain(wikipedia(server, line="{sha1}  enwiki-20260601-pages-meta.xml.bz2"), tmp_path)
    assert "enwiki-DATE-pages-articles.xml.bz2" in sentence(error) and len(server.requests) == 1
    with pytest.raises(DataError) as error:
        download.obtain(wikipedia(server, listed=b"something else"), tmp_path)
    assert hashlib.sha1(BODY).hexdigest() in sentence(error) and not files_below(tmp_path)


def test_second_run_does_nothing(server, tmp_path, monkeypatch, capsys):
    content = zip_of({"SST-2/train.tsv": "a", "SST-2/dev.tsv": "b"})
    monkeypatch.setattr(download, "SOURCES", {"sst2": [publish(server, ZIPPED, content)],
                                              "book": [publish(server, SOURCE, BODY)]})
    download.main(["sst2", "book", "--out", str(tmp_path)])
    assert len(server.requests) == 2 and capsys.readouterr().out.count("wrote ") == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    download.main(["sst2", "book", "sst2", "--out", str(tmp_path)])
    assert len(server.requests) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    printed = capsys.readouterr().out
    assert printed.count("kept ") == 3 and str(tmp_path / "SST-2" / "dev.tsv") in printed


# ---------------------------------------------------------------- connections

def fetched(source, folder):
    download.obtain(source, folder)
    assert files_below(folder) == ["Books/book.txt"]
    return (folder / "Books" / "book.txt").read_bytes()


def start_of(request):
    return int(request.range.removeprefix("bytes=").removesuffix("-")) if request.range else 0


@pytest.mark.parametrize("stalls", [False, True])
def test_broken_connection_goes_on_where_it_ended(stalls, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server.cuts, server.stalls = [100_000, 200_000], stalls
    assert fetched(publish(server, SOURCE, BODY), tmp_path) == BODY
    starts = [start_of(request) for request in server.requests]
    assert len(starts) == 3 and starts[0] == 0 and 0 < starts[1] <= 100_000 < starts[2] <= 200_000
    assert server.requests[1].condition == f'"{hashlib.md5(BODY).hexdigest()}"'


def test_progress_is_not_counted_as_failure(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.cuts = [70_000, 140_000, 210_000, 280_000]
    assert fetched(publish(server, SOURCE, BODY), tmp_path) == BODY


def test_next_run_goes_on_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    source, server.cuts = publish(server, SOURCE, BODY), [200_000]
    with pytest.raises(DataError) as error:
        download.obtain(source, tmp_path)
    assert "goes on" in sentence(error)
    assert fetched(source, tmp_path) == BODY and start_of(server.requests[1]) > 100_000


@pytest.mark.parametrize("version, resumes", [(("Last-Modified", "Mon, 01 Jun 2026 00:00:00 GMT"), True),
                                               (("ETag", 'W/"{}"'), False), (("Server", "says nothing"), False)])
def test_resumes_only_what_is_surely_the_same_version(version, resumes, server, tmp_path):
    server.version, server.cuts = version, [100_000]
    assert fetched(publish(server, SOURCE, BODY), tmp_path) == BODY
    assert [bool(request.range) for request in server.requests] == [False, resumes]


@pytest.mark.parametrize("known", [False, True])
def test_part_that_is_already_whole(known, server, tmp_path, monkeypatch):
    """The program ended between the last byte and the new name. If the size is known, nobody has to be asked."""
    source = publish(server, SOURCE, BODY, checksum=known)
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", lambda *paths: sys.exit("stopped"))
        with pytest.raises(SystemExit):
            download.obtain(source, tmp_path)
    assert fetched(source, tmp_path) == BODY
    assert [start_of(request) for request in server.requests] == ([0] if known else [0, len(BODY)])


@pytest.mark.parametrize("length", [300_000, 100_000])
def test_file_that_changed_meanwhile_starts_over(length, server, tmp_path, monkeypatch):
    """Also if the new one is shorter than what has arrived of the old one."""
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cuts = [200_000]
    with pytest.raises(DataError):
        download.obtain(publish(server, SOURCE, BODY, checksum=False), tmp_path)
    other = BODY[::-1][:length]
    assert fetched(publish(server, SOURCE, other, checksum=False), tmp_path) == other


def test_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.cuts = False, [100_000, 200_000]
    assert fetched(publish(server, SOURCE, BODY, checksum=False), tmp_path) == BODY
    assert len(server.requests) == 3


def test_server_that_sends_another_piece_starts_over(server, tmp_path):
    server.shift, server.cuts = 10, [100_000]
    assert fetched(publish(server, SOURCE, BODY, checksum=False), tmp_path) == BODY
    assert [bool(request.range) for request in server.requests] == [False, True, False]


def test_range_that_the_server_does_not_have_starts_over(server, tmp_path):
    """It answers 416, but not because all is here."""
    source, server.cuts = publish(server, SOURCE, BODY, checksum=False), [100_000]
    server.statuses = [200, 416]
    assert fetched(source, tmp_path) == BODY
    assert [bool(request.range) for request in server.requests] == [False, True, False]


@pytest.mark.parametrize("ranges, stalls", [(True, False), (False, False), (True, True)])
def test_body_that_never_ends_is_no_file(ranges, stalls, server, tmp_path, monkeypatch):
    """Cut at the same byte, or silent after it, whenever it is asked."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2 if stalls else 5)
    server.ranges, server.stalls, server.cuts = ranges, stalls, [100_000] * 99
    with pytest.raises(DataError) as error:
        download.obtain(publish(server, SOURCE, BODY, checksum=False), tmp_path)
    assert ("timed out" if stalls else "of 300000") in sentence(error) and server.address in sentence(error)
    assert files_below(tmp_path) == ["Books/book.txt.part", "Books/book.txt.part.version"]


def test_no_server(server, tmp_path):
    source = replace(publish(server, SOURCE, BODY), url="http://127.0.0.1:9/book.txt")      # discard: never served
    with pytest.raises(DataError) as error:
        download.obtain(source, tmp_path)
    assert "refused" in sentence(error) and "5 attempts" in sentence(error) and not files_below(tmp_path)


# ---------------------------------------------------------------- answers

def test_error_of_the_person_is_not_repeated(server, tmp_path):
    with pytest.raises(DataError) as error:
        download.obtain(replace(publish(server, SOURCE, BODY), url=server.address + "/gone.txt"), tmp_path)
    assert "404 Not Found" in sentence(error) and "/gone.txt" in sentence(error) and len(server.requests) == 1


def test_error_of_the_server_is_repeated(server, tmp_path):
    source = publish(server, SOURCE, BODY)
    server.statuses = [500] * download.ATTEMPTS
    with pytest.raises(DataError) as error:
        download.obtain(source, tmp_path)
    assert "500 Internal Server Error" in sentence(error) and len(server.requests) == download.ATTEMPTS
    server.statuses = [503, 429, 500]
    assert fetched(source, tmp_path) == BODY


def test_wrong_checksum_deletes_the_file(server, tmp_path):
    source = publish(server, SOURCE, BODY)
    server.files["/files/book.txt"] = BODY[::-1]
    with pytest.raises(DataError) as error:
        download.obtain(source, tmp_path)
    assert "was deleted" in sentence(error) and not files_below(tmp_path)
    assert hashlib.sha256(BODY[::-1]).hexdigest() in sentence(error) and source.checksum[7:] in sentence(error)


def test_wrong_size_is_refused_before_it_is_fetched(server, tmp_path):
    """A page of a hotel's network instead of the file."""
    source = publish(server, SOURCE, BODY)
    server.files["/files/book.txt"] = b"<html>Please log in.</html>"
    with pytest.raises(DataError) as error:
        download.obtain(source, tmp_path)
    assert "27 bytes, expected 300000" in sentence(error) and not files_below(tmp_path)


# ---------------------------------------------------------------- archives

GOOD = {"SST-2/train.tsv": "sentence\tlabel\na\t1\n", "SST-2/dev.tsv": "sentence\tlabel\nb\t0\n"}
LINK = zipfile.ZipInfo("SST-2/link")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
DAMAGED = zip_of(GOOD, zipfile.ZIP_STORED).replace(b"label\na", b"label\nA")


@pytest.mark.parametrize("content, told", [
    (zip_of({**GOOD, "../evil": "x"}), "leads out"), (zip_of({**GOOD, "SST-2/../../evil": "x"}), "leads out"),
    (zip_of({**GOOD, "/evil": "x"}), "leads out"), (zip_of({**GOOD, "SST-2\\..\\..\\evil": "x"}), "leads out"),
    (zip_of({**GOOD, "C:evil": "x"}), "leads out"), (zip_of({**GOOD, "\\\\host\\share\\evil": "x"}), "leads out"),
    (zip_of({**GOOD, LINK: "/etc"}), "leads out"), (zip_of({**GOOD, "SST-2/zeros": bytes(20_000)}), "at most 10000"),
    (DAMAGED, "CRC"), (zip_of(GOOD)[:-30], "not a zip"), (BODY, "not a zip"),
    (zip_of({"SST-2/train.tsv": "x"}), "no SST-2/dev.tsv"),
], ids="parent inside-parent absolute backslash drive share symlink bomb damaged cut noise incomplete".split())
def test_bad_archive_leaves_nothing(content, told, server, tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(DataError) as error:
        download.obtain(publish(server, ZIPPED, content), out)
    assert told in sentence(error) and "deleted" in sentence(error)
    assert os.listdir(out) == [] and files_below(tmp_path) == []


def test_member_that_is_longer_than_it_says(server, tmp_path):
    """The bomb that lies about its size: no more than it says is written, and the CRC tells."""
    content = bytearray(zip_of({**GOOD, "SST-2/zeros": bytes(5_000_000)}))
    for signature, place in ((b"PK\3\4", 22), (b"PK\1\2", 24)):     # its size, in its own and in the central header
        start = content.rfind(signature) + place
        assert int.from_bytes(content[start:start + 4], "little") == 5_000_000
        content[start:start + 4] = (100).to_bytes(4, "little")
    with pytest.raises(DataError) as error:
        download.obtain(publish(server, ZIPPED, bytes(content)), tmp_path)
    assert "CRC" in sentence(error) and os.listdir(tmp_path) == []


def test_interrupted_unpacking_is_done_again(server, tmp_path, monkeypatch):
    source = publish(server, ZIPPED, zip_of(GOOD))

    def stop(archive, member, folder):
        (folder / "SST-2").mkdir(parents=True)
        (folder / "SST-2" / "train.tsv").write_text("half")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", stop)
        with pytest.raises(KeyboardInterrupt):
            download.obtain(source, tmp_path)
    assert not (tmp_path / "SST-2").exists()
    (tmp_path / "SST-2.part" / "SST-2").mkdir(parents=True)            # what a killed process cannot remove
    (tmp_path / "SST-2.part" / "SST-2" / "stray").touch()
    assert download.obtain(source, tmp_path) and len(server.requests) == 1
    assert files_below(tmp_path) == ["SST-2/dev.tsv", "SST-2/train.tsv"]


# ---------------------------------------------------------------- the disk and the person

def test_folder_that_is_there_without_a_file(server, tmp_path):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("mine")
    with pytest.raises(DataError) as error:
        download.obtain(publish(server, ZIPPED, zip_of(GOOD)), tmp_path)
    assert "without dev.tsv" in sentence(error) and "move it away" in sentence(error)
    assert files_below(tmp_path) == ["SST-2/train.tsv"] and not server.requests


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError) as error:
        download.obtain(publish(server, SOURCE, BODY), tmp_path / "out")
    assert str(tmp_path / "out") in sentence(error) and "Not a directory" in sentence(error)
    assert "--out" in sentence(error)


def test_folder_without_the_right_to_write(server, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(DataError) as error:
        download.obtain(publish(server, SOURCE, BODY), tmp_path)
    assert "Permission denied" in sentence(error)


@pytest.mark.parametrize("early", [True, False])
def test_full_disk(early, server, tmp_path, monkeypatch):
    """Noticed before the first byte, and if something else fills the disk, at the write that fails."""
    source = publish(server, SOURCE, BODY)
    if early:
        monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(BODY) - 1))
    else:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        monkeypatch.setattr(download, "open", lambda path, mode: builtins.open("/dev/full", mode), raising=False)
    with pytest.raises(DataError) as error:
        download.obtain(source, tmp_path)
    assert ("no room for the 300000 bytes" if early else "No space left") in sentence(error)
    assert str(tmp_path / "Books" / "book.txt.part") in sentence(error) and len(server.requests) == 1


def test_mistakes_are_one_sentence(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "SOURCES", {"book": [publish(server, SOURCE, BODY)]})
    with pytest.raises(SystemExit) as stop:
        download.main(["book", "bok", "--out", str(tmp_path)])
    assert stop.value.code == 2 and not server.requests                 # nothing is fetched before all is understood
    assert capsys.readouterr().err == "download.py: there is no 'bok' to download; give one or more of book\n"
    monkeypatch.setattr(download, "obtain", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        download.main(["book", "--out", str(tmp_path)])
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", [[str(Path("data", "download.py"))], ["-m", "data.download"]])
def test_both_ways_to_start_it(command):
    result = subprocess.run([sys.executable, *command, "sst3"], capture_output=True, text=True,
                            cwd=Path(download.__file__).resolve().parent.parent)
    assert result.returncode == 2 and result.stderr.startswith("download.py: there is no 'sst3'")
    assert result.stderr.count("\n") == 1
