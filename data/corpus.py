"""Corpora of any size, read as a stream of documents: plain text, WikiExtractor's output, Wikipedia dumps.

    documents = Documents("enwiki-pages-articles.xml.bz2")      # lists of sentences, read afresh in every pass

A corpus is a file, or a folder that holds *.txt, *.jsonl, *.xml, or at any depth wiki_NN (each perhaps with .bz2), read
in the order of their names. How a file begins says what it is:

    <mediawiki or <?xml     Wikimedia's pages-articles dump; its articles are cleaned by `clean_wikitext`
    <doc id=                WikiExtractor's output: an article between <doc id=...> and </doc>
    {"                      WikiExtractor's --json output: an object with "text" on every line
    anything else           plain text: a blank line, the end of the file, or 4 MB without a blank line end a document

Every line of a document is running text, cut by text.split_sentences.
"""

import bz2
import html
import itertools
import json
import math
import re
from pathlib import Path
from typing import Iterator
from xml.etree import ElementTree

from data import DataError, decode
from data.text import split_sentences

LONGEST_LINE = 8 << 20              # bytes
LONGEST_DOCUMENT = 4 << 20          # characters


# ---------------------------------------------------------------- files

def corpus_files(corpus: str | Path) -> list[Path]:
    """The files of a corpus in the order in which they are read. DataError if there are none."""
    corpus = Path(corpus)
    if not corpus.exists():
        raise DataError(f"{corpus}: there is no such file or folder; give a .txt file or a folder of .txt files")
    if not corpus.is_dir():
        return [corpus]
    files = [file for file in corpus.iterdir() if re.search(r"\.(txt|jsonl|xml(-p\d+p\d+)?)(\.bz2)?$", file.name)]
    files += [file for file in corpus.rglob("wiki_*") if re.fullmatch(r"wiki_\d+(\.bz2)?", file.name)]
    if not files:
        raise DataError(f"{corpus}: this folder holds no .txt file and nothing of Wikipedia; give a folder of .txt "
                        "files or of WikiExtractor's output, or a dump (.xml.bz2)")
    return sorted(files)


def blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The decompressed content in pieces of 1 MB, each with the bytes of the file read so far."""
    try:
        with open(path, "rb") as file:
            stream = bz2.BZ2File(file) if path.suffix == ".bz2" else file
            while block := stream.read(1 << 20):
                yield block, file.tell()
    except (EOFError, OSError) as error:
        reason = "it ends too early" if isinstance(error, EOFError) else error.strerror or error
        raise DataError(f"{path}: this file cannot be read ({reason}); check it, or fetch it again") from None


def lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(number from 1, line, bytes of the file read so far). DataError names a line that is not UTF-8 or too long."""
    number, rest, position = 1, b"", 0
    for block, position in blocks(path):
        whole, newline, last = block.rpartition(b"\n")
        if newline:
            for line in decode(rest + whole + newline, path, number).split("\n")[:-1]:
                yield number, line, position
                number += 1
            rest = b""
        rest += last
        if len(rest) > LONGEST_LINE:
            raise DataError(f"{path}:{number}: this line is longer than {LONGEST_LINE >> 20} MB; expected a paragraph "
                            "on each line, and blank lines between documents")
    if rest:
        yield number, decode(rest, path, number), position


# ---------------------------------------------------------------- formats
# Each reader yields documents as they are stored, a list of lines that are not blank or the wikitext of an article,
# with the bytes of the file read so far.

def plain_documents(path: Path) -> Iterator[tuple[list[str], int]]:
    document, size, position = [], 0, 0
    for _, line, position in lines(path):
        if line.strip():
            document.append(line)
            size += len(line)
        if document and (size > LONGEST_DOCUMENT or not line.strip()):
            yield document, position
            document, size = [], 0
    if document:
        yield document, position


def extracted_documents(path: Path) -> Iterator[tuple[list[str], int]]:
    document, size, begun = [], 0, 0
    for number, line, position in lines(path):
        begins = line.startswith("<doc id=")
        if begun and (begins or size > LONGEST_DOCUMENT):
            break
        if begins:
            document, size, begun = [], 0, number
        elif begun and line.strip() == "</doc>":
            yield document, position
            begun = 0
        elif begun and line.strip():
            document.append(html.unescape(line))        # WikiExtractor escapes < > &
            size += len(line)
        elif line.strip():
            raise DataError(f"{path}:{number}: text outside of <doc id=...> and </doc>; expected WikiExtractor's "
                            "output")
    if begun:
        raise DataError(f"{path}:{begun}: this <doc> has no </doc>; the file is not whole, extract it again")


def json_documents(path: Path) -> Iterator[tuple[list[str], int]]:
    for number, line, position in lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"].encode("utf-8", "ignore").decode()      # without halves of surrogate pairs
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}:{number}: expected a JSON object with a string "text" on this line, found '
                            f"{line[:40]!r}; extract the file again") from None
        yield [html.unescape(line) for line in text.split("\n") if line.strip()], position


def dump_documents(path: Path) -> Iterator[tuple[str, int]]:
    """The wikitext of the articles: pages of namespace 0 that are no redirects."""
    parser, root = ElementTree.XMLPullParser(("start", "end")), None
    try:
        for block, position in blocks(path):
            parser.feed(block)
            for event, element in parser.read_events():
                root = element if root is None else root
                if event == "start" or not element.tag.endswith("page"):
                    continue
                space = element.tag.removesuffix("page")                # the namespace of the XML, "{http://...}"
                text = element.findtext(f"{space}revision/{space}text") or ""
                if (element.findtext(f"{space}ns", "0") == "0" and element.find(f"{space}redirect") is None
                        and element.findtext(f"{space}revision/{space}model", "wikitext") == "wikitext"
                        and text.lstrip()[:9].upper() != "#REDIRECT"):
                    yield text, position
            if root is not None:
                root.clear()        # or the tree would grow to the size of the dump
        parser.close()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: this is not a whole XML dump ({error}); fetch it again") from None


def stored_documents(path: Path) -> Iterator[tuple[list[str] | str, int]]:
    """What the reader of the file's format yields; the module's docstring says how the format is told."""
    head = next(blocks(path), (b"", 0))[0].removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, reader in ((rb"<mediawiki|<\?xml", dump_documents), (rb"<doc id=", extracted_documents),
                          (rb'\{\s*"', json_documents), (b"", plain_documents)):
        if re.match(start, head):
            return reader(path)


def sentences(document: list[str] | str) -> list[str]:
    """The sentences of a document as it is stored."""
    paragraphs = clean_wikitext(document) if isinstance(document, str) else document
    return [sentence for line in paragraphs for sentence in split_sentences(line)]


class Documents:
    """The documents of a corpus as lists of sentences, read afresh in every pass, so that they need no memory. With
    `limit`, about so many characters of them, from the beginning of every file."""

    def __init__(self, corpus: str | Path, limit: float = math.inf):
        self.files, self.limit = corpus_files(corpus), limit

    def __iter__(self) -> Iterator[list[str]]:
        sizes = [file.stat().st_size for file in self.files]
        taken = 0
        for file, passed in zip(self.files, itertools.accumulate(sizes)):
            wanted = self.limit * passed / max(1, sum(sizes))       # so far
            for document, _ in stored_documents(file) if taken < wanted else ():
                document = sentences(document)
                taken += sum(map(len, document))
                if document:
                    yield document
                if taken >= wanted:
                    break


def no_text(corpus: str | Path) -> DataError:
    return DataError(f"{corpus}: there is no text in it; expected sentences, with a blank line between documents")


def read_documents(corpus: str | Path) -> list[list[str]]:
    """All documents of a corpus that fits in memory. DataError if there is no text in it, or if it is damaged."""
    documents = list(Documents(corpus))
    if not documents:
        raise no_text(corpus)
    return documents


# ---------------------------------------------------------------- wikitext

TAGS = "ref|math|chem|gallery|timeline|syntaxhighlight|source|score|hiero|imagemap|pre|table|graph|mapframe|maplink"
EMPTY_TAG = re.compile(rf"<(?:{TAGS})\b[^<>]*/>", re.I)
NOT_TEXT = (re.compile(r"<!--|-->"), re.compile(rf"</?(?:{TAGS})\b[^<>]*>", re.I), re.compile(r"\{\{|\}\}"),
            re.compile(r"^[ \t:]*(?:\{\||\|\})", re.M))           # what lies between these is dropped
CLOSING = re.compile(r"-->|</|\}\}|[ \t:]*\|\}")
WEB_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*\s*([^\[\]]*)\]")
WIKI_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
NO_ARTICLE = re.compile(r"(?i:file|image|category|media)\s*:|[a-z]{2,3}(-[a-z]+)*:|.*\.(?i:jpe?g|png|svg|gif|og[gv])$")
MARKUP = re.compile(r"''+|</?[a-zA-Z][^<>]*>|<!--|-->|__[A-Z]+__|\{\{|\}\}|\[\[|\]\]")


def clean_wikitext(text: str) -> list[str]:
    """The paragraphs of an article in wikitext, without markup and without what BERT left out: headings, lists, tables.

    A link leaves its label. Templates are dropped, not expanded: of "{{convert|5|km}}" nothing is left. Namespaces go
    by their names in the English Wikipedia (File:, Category:).
    """
    text = EMPTY_TAG.sub("", text)
    for marks in NOT_TEXT:
        text = without_pairs(text, marks)
    text = WEB_LINK.sub(r"\1", text)
    for _ in range(5):                                          # from the inside: captions of pictures hold links
        text = WIKI_LINK.sub(_label, text)
    text = html.unescape(MARKUP.sub("", re.sub(r"<br\b[^<>]*>", " ", text))).replace("\xa0", " ")
    text = re.sub(r"\([ ,;:]+", "(", re.sub(r"\([ ,;:]*\)", "", text))      # a template was all that stood there
    text = re.sub(r" +(?=[ ,;)]|\.(?!\w)|$)", "", text, flags=re.M)
    return [line.strip() for line in text.split("\n") if line.strip() and line.strip()[0] not in "=*#:;|!{"]


def _label(link: re.Match) -> str:
    target, _, label = link[1].partition("|")
    return "" if NO_ARTICLE.match(target.strip()) else label.rpartition("|")[2] or target.strip().removeprefix(":")


def without_pairs(text: str, marks: re.Pattern) -> str:
    """text without what stands between marks that open and marks that close, the marks and nested ones included. A mark
    that has no partner stays, and so does the text around it."""
    opened, pairs = [], []
    for mark in marks.finditer(text):
        if not CLOSING.match(mark[0]):
            opened.append(mark.start())
        elif opened:
            begin = opened.pop()
            while pairs and pairs[-1][0] > begin:               # those lie inside this one
                pairs.pop()
            pairs.append((begin, mark.end()))
    begins, ends = [begin for begin, _ in pairs], [end for _, end in pairs]
    return "".join(text[end:begin] for end, begin in zip([0, *ends], [*begins, len(text)]))
