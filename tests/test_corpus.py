"""Text files, WikiExtractor's output and Wikipedia dumps, read as documents."""

import bz2
import itertools
import json
import random
import time
import tracemalloc

import pytest
from test_shards import TOKENIZER, message

from data import corpus, shards
from data.corpus import clean_wikitext, read_documents

# ---------------------------------------------------------------- formats

EXTRACTED = """<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="Anarchism">
Anarchism

Anarchism is a philosophy. It is old, e.g. Dr. Who knew it.
Etymology.
AT&amp;T &lt;b&gt; stays.

</doc>
<doc id="25" url="https://en.wikipedia.org/wiki?curid=25" title="Autism">
Autism

It is not.
</doc>
"""
EXPECTED = [["Anarchism", "Anarchism is a philosophy.", "It is old, e.g. Dr. Who knew it.", "Etymology.",
             "AT&T <b> stays."], ["Autism", "It is not."]]


def test_extracted_articles_are_documents_whatever_the_folders(tmp_path):
    for folder, name, write in (("AB", "wiki_00.bz2", bz2.compress), ("AA", "wiki_01", bytes),
                                ("AA", "wiki_00", bytes)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(write(EXTRACTED.replace("Autism", f"{folder} {name[:7]}").encode()))
    (tmp_path / "AA" / "wiki_00.log").write_text("not this")
    found = read_documents(tmp_path)
    assert [document[0] for document in found] == ["Anarchism", "AA wiki_00", "Anarchism", "AA wiki_01", "Anarchism",
                                                   "AB wiki_00"]
    assert found[::2] == [EXPECTED[0]] * 3 and found[5] == ["AB wiki_00", "It is not."]


def test_json_articles_are_documents(tmp_path):
    lines = [{"id": "12", "title": "Anarchism", "text": "Anarchism\n\nAnarchism is a philosophy. It is old, e.g. Dr. "
              "Who knew it.\nEtymology.\nAT&amp;T &lt;b&gt; stays."}, {"id": "13", "text": ""},
             {"text": "Autism\n \nIt\ud800 is not."}]
    (tmp_path / "wiki_00").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_documents(tmp_path) == EXPECTED


def dump(pages):
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">\n  <siteinfo>' \
           '<sitename>Wikipedia</sitename><namespaces><namespace key="0" /></namespaces></siteinfo>\n'
    return head + "".join(f"""  <page>
    <title>{title}</title>
    <ns>{namespace}</ns>
    <id>7</id>{redirect}
    <revision><id>8</id><model>{model}</model><format>text/x-wiki</format>
      <text bytes="99" xml:space="preserve">{body}</text></revision>
  </page>
""" for title, namespace, redirect, model, body in pages) + "</mediawiki>\n"


ARTICLE = """{{Infobox | name = Alan {{nowrap|Turing}}}}
'''Alan Turing''' ({{IPA|x}}; 1912&amp;nbsp;– 1954) was an [[English people|English]] [[mathematician]].&lt;ref
name="a"&gt;{{cite}}&lt;/ref&gt; He ran.

== Life ==
* a list
Born in [[London]]."""
DUMP = dump([("Turing", 0, "", "wikitext", ARTICLE), ("Talk:Turing", 1, "", "wikitext", "Talk."),
             ("A. Turing", 0, '<redirect title="Turing" />', "wikitext", "#WEITERLEITUNG [[Turing]]\nNo."),
             ("Old", 0, "", "wikitext", "#redirect [[Turing]]\nNo."), ("Style", 0, "", "css", "a { b: c }"),
             ("Empty", 0, "", "wikitext", ""), ("Later", 0, "", "wikitext", "Later &lt;b&gt;on&lt;/b&gt;.")])
READ = [["Alan Turing (1912 – 1954) was an English mathematician.", "He ran.", "Born in London."], ["Later on."]]


def line_of(position):
    return DUMP[:position].count("\n") + 1


@pytest.mark.parametrize("name, write", [("enwiki-pages-articles.xml", bytes), ("enwiki.xml.bz2", bz2.compress), (
    "enwiki-pages-articles1.xml-p1p41242.bz2", lambda raw: bz2.compress(raw[:900]) + bz2.compress(raw[900:]))])
def test_articles_of_a_dump_are_documents(tmp_path, name, write):
    (tmp_path / name).write_bytes(write(DUMP.encode()))
    assert read_documents(tmp_path) == read_documents(tmp_path / name) == READ


@pytest.mark.parametrize("wikitext, paragraphs", [
    ("a {{b|{{c}}\n|d}} e", ["a e"]), ("{{b}}c}} d {{e", ["c d e"]), ("{{a {{b}} c", ["a c"]),
    ("x\n{| class=a\n| 1 {{!}} 2\n{|\n| 3\n|}\n|}\ny", ["x", "y"]), ("x\n{| open\n| cell\ny", ["x", "y"]),
    ("[[A]] [[b|c]] [[:d|e]] [[:Category:F]]s [[G: The H|]]", ["A c e Category:Fs G: The H"]),
    ("[[File:a.jpg|thumb|[[b|c]] [[d]]. [http://e.f g]]]h [[Image:i.png]][[Category:J]]\n[[de:K]]", ["h"]),
    ("[[Datei:a.svg|mini|b]]c [[Star Trek: Next]]", ["c Star Trek: Next"]),
    ("a [https://b.c/d e f] g [//h.i].", ["a e f g."]), ("''a'' '''b''' '''''c''''' d's", ["a b c d's"]),
    ("a<ref name=x>b {{c}} [[d]]</ref>.<ref name='y/z' /> e<REF>f</ref>", ["a. e"]),
    ("a <ref>b, c <ref>d</ref>.", ["a b, c."]), ("a<!-- b\n\nc -->d <!-- e", ["ad e"]),
    ("<math>x_{1}}</math>a<br/>b<sub>2</sub> <gallery>\nc.jpg|d\n</gallery>", ["a b2"]),
    ("== a ==\n* b\n# c\n: d\n; e\n| f\n! g\n h \n__NOTOC__", ["h"]), ("a &lt;b&gt; &amp;&nbsp;c", ["a <b> & c"]),
    ("a ({{b}}; c) ({{d}}, {{e}}) f {{g}}, h .5 {{i}}.", ["a (c) f, h .5."])])
def test_wikitext_becomes_paragraphs(wikitext, paragraphs):
    assert clean_wikitext(wikitext) == paragraphs


def test_hostile_wikitext_does_not_hang():
    started = time.process_time()
    for part in ("{{", "[[", "<ref>", "<!--", "[//a ", "{|\n", "<ref ", "( ", "[[a|", "..", "'"):
        clean_wikitext(part * 10_000)
        corpus.split_sentences(part * 10_000)
    assert time.process_time() - started < 2        # several seconds each, were one of the patterns quadratic


def test_long_files_are_read_as_short_ones(tmp_path):
    generator = random.Random(0)        # lines end, and letters of two and three bytes stand, at any place of a block
    lines = ["".join(generator.choices("aé中 .", k=generator.randint(0, 300))) for _ in range(12_000)]
    for end in ("\n", "\r\n"):
        (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
        assert (tmp_path / "a.txt").stat().st_size > 2 << 20
        groups = [list(group) for filled, group in itertools.groupby(lines, lambda line: bool(line.strip())) if filled]
        assert [document for document, _ in corpus.plain_documents(tmp_path / "a.txt")] == groups
    whole = dump([(f"t{n}", 0, "", "wikitext", f"Article {n}." + " x" * 9000) for n in range(200)])
    (tmp_path / "a.xml").write_text(whole)
    assert [document[0] for document in read_documents(tmp_path / "a.xml")] == [f"Article {n}." + " x" * 9000
                                                                                for n in range(200)]


def test_a_dump_is_read_without_keeping_it(tmp_path):
    whole = dump([("t", 0, "", "wikitext", "Article. " * 1000)] * 1200).encode()
    (tmp_path / "a.xml.bz2").write_bytes(bz2.compress(whole))
    size, whole = len(whole), None
    tracemalloc.start()
    try:
        assert sum(1 for _ in corpus.dump_documents(tmp_path / "a.xml.bz2")) == 1200
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 11e6 and peak < 8e6


def test_long_documents_are_cut_and_long_lines_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(f"Line {n}." for n in range(9)) + "\n\nNext.\n")
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 30)
    assert [len(document) for document in read_documents(tmp_path)] == [5, 4, 1]
    monkeypatch.setattr(corpus, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.txt").write_text("a\nb\n" + "c" * (2 << 20))
    assert message(read_documents, tmp_path).startswith(f"{tmp_path / 'a.txt'}:3: this line is longer than 1 MB")


@pytest.mark.parametrize("name, raw, place, part", [
    ("wiki_00", b'{"text": "a"}\n{"text": "b\n', ":2", "expected a JSON object"),
    ("wiki_00", b'{"text": "a"}\n\n["text"]\n', ":3", "expected a JSON object"),
    ("wiki_00", b'{"id": 1}\n', ":1", """found '{"id": 1}'"""),
    ("wiki_00", b'{"text": null}\n', ":1", "expected a JSON object"),
    ("wiki_00", b'<doc id="1">\nA\n\n</doc>\nB\n', ":5", "text outside of <doc"),
    ("wiki_00", b'<doc id="1">\nA\n</doc>\n<doc id="2">\nB\n', ":4", "no </doc>"),
    ("wiki_00", b'<doc id="1">\nA\n<doc id="2">\nB\n</doc>\n', ":1", "no </doc>"),
    ("a.xml", DUMP[:900].encode(), f":{line_of(900)}", "not a whole XML dump"),
    ("a.xml", DUMP.replace("</ns>", "</nt>", 1).encode(), ":5", "not a whole XML dump"),
    ("a.xml", DUMP.replace("Later &lt;", "\u00e9").encode("latin-1", "replace"), f":{line_of(DUMP.index('Later &'))}",
     "not a whole XML dump"),
    ("a.xml.bz2", bz2.compress(DUMP.encode())[:-20], "", "it ends too early"),
    ("a.xml.bz2", b"BZh9 not this", "", "Invalid data stream"),
    ("a.txt", b"a\n" * 900_000 + b"b\xff\n", ":900001", "the byte 0xff is not UTF-8"),
    ("a.txt", b"a\n\nb \xc3", ":3", "the byte 0xc3 is not UTF-8"),
    ("a.txt", b"\n \n", None, "there is no text in it"), ("a.txt", b"", None, "there is no text in it"),
    ("a.xml", dump([]).encode(), None, "there is no text in it"), ("a.md", b"a", None, "holds no .txt file"),
    ("a.txt", b"\x01\x02 \x03", None, "there is no text in it")])
def test_bad_text_is_one_sentence_and_leaves_nothing(tmp_path, name, raw, place, part):
    folder, out = tmp_path / "text", tmp_path / "out"
    folder.mkdir()
    (folder / name).write_bytes(raw)
    start = f"{folder}:" if place is None else f"{folder / name}{place}: "
    calls = [lambda: shards.prepare(folder, TOKENIZER, out), lambda: shards.open_corpus(folder, TOKENIZER)]
    if name != "a.txt" or raw[:1] != b"\x01":           # letters of which the tokenizer makes nothing
        calls += [lambda: read_documents(folder),
                  lambda: shards.corpus_tokenizer(folder, 50)]
    for call in calls:
        found = message(call)
        assert found.startswith(start) and part in found
    assert not out.exists() or raw[:1] == b"\x01"
