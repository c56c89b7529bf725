"""Texts as vectors: the hidden states of an encoder, pooled, for lines, files and streams of any length."""
import contextlib
import json
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.encode import encoder_of, strings, tiny_world
from data.metrics import spearman
from data.tasks import TASKS, Task, file_of, read_questions, read_table
from formats.files import check_place, whole_file
from formats.sentence import sentence_of_encoder
from model import InputError

LINES_AT_ONCE = 4096          # of a stream, or fewer if they are long: sorted by length, in memory at one time
BYTES_AT_ONCE = 2 ** 20       # of text; its tokens take a hundred times as many
LONGEST_LINE = 2 ** 20        # bytes; what is longer is no text in a line
TEXTS_AT_ONCE = 256         # of a list that is held in memory anyway: how often its bar moves
TOKENS_AT_ONCE = 2048       # of a forward pass
STSB = Task("stsb", "STS-B", "similarity", "spearman", text_columns=("sentence1", "sentence2", "score"))


class Embedder:
    """engine (an infer_cpu.Engine of an encoder) -> function from a list of str to float32 (texts, H) numpy rows, in
    the order of the texts. InputError for a model with a head, or an odd length. max_len: tokens of a row at most."""

    def __init__(self, engine, max_len=None):
        if engine.model.kind != "encoder":
            raise InputError(f"{engine.directory} has a head for a task; --embed wants an encoder, such as --stage prune "
                             f"--kd-target hidden writes")
        self.engine, self.sentence = engine, engine.model.sentence or sentence_of_encoder(engine.directory)
        config = engine.model.config
        length = max_len or min(self.sentence.max_length or config.max_position_embeddings,
                                config.max_position_embeddings)
        self.encoder = encoder_of(engine, length)

    def __call__(self, texts):
        texts = strings(texts)
        vectors = np.zeros((len(texts), self.engine.model.config.hidden_size), np.float32)
        for begin in range(0, len(texts), LINES_AT_ONCE):
            self.fill(vectors[begin:begin + LINES_AT_ONCE], texts[begin:begin + LINES_AT_ONCE])
        if not np.isfinite(vectors).all():
            raise InputError(f"{self.engine.directory} answers with what is no number; give another model")
        return vectors

    def fill(self, vectors, texts):
        """Vectors of texts, written into float32 (texts, H)."""
        rows = self.encoder.encode(texts)
        lengths = [len(row["input_ids"]) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)      # neighbours of like length: next to no padding
        while order:
            size = max(1, TOKENS_AT_ONCE // lengths[order[-1]])
            chosen, order = order[-size:], order[:-size]
            batch = self.encoder.collate([rows[i] for i in chosen])
            vectors[chosen] = self.sentence.pool(self.engine(batch), batch["attention_mask"]).numpy()


def lines_of(path):
    """Yields lists of at most LINES_AT_ONCE lines of a file, '-' for standard input, without their ends."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            lines, size = [], 0
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise InputError(f"line {number} of {path} has {LONGEST_LINE:,} bytes or more; --embed reads a "
                                     f"text in every line")
                lines.append(line.rstrip(b"\r\n").decode("utf-8"))
                size += len(line)
                if len(lines) == LINES_AT_ONCE or size >= BYTES_AT_ONCE:
                    yield lines
                    lines, size = [], 0
            if lines:
                yield lines
    except UnicodeDecodeError:
        raise InputError(f"line {number} of {path} is not UTF-8; --embed reads UTF-8, a text in every line") from None
    except OSError as error:
        raise InputError(f"--embed {path}: {error.strerror}; give a file with a text in every line, or -") from None


def write_header(file, rows, columns):
    """The head of a .npy file of float32, which takes as many bytes for any number of rows."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)})


def run_embed(settings, engine):
    """--embed FILE --to FILE.npy or FILE.jsonl (default: JSON lines on standard output), in bounded memory."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # like Ctrl-C: nothing half-written is left
    embed, count, columns = Embedder(engine, settings.max_len), 0, engine.model.config.hidden_size
    check_place("--to", settings.to)
    packed = (settings.to or "").endswith(".npy")
    output = whole_file(settings.to) if settings.to else contextlib.nullcontext(sys.stdout.buffer)
    with output as file, tqdm(unit="line") as bar:
        if packed:
            write_header(file, 0, columns)
        for lines in lines_of(settings.embed):
            vectors = embed(lines)
            file.write(vectors.astype("<f4").tobytes() if packed else "".join(
                json.dumps([round(float(value), 7) for value in row]) + "\n" for row in vectors).encode())
            file.flush()
            count += len(lines)
            bar.update(len(lines))
        if packed:
            file.seek(0)
            write_header(file, count, columns)
    return {"engine": engine.name, "lines": count}


def evaluate_vectors(settings, engine, against=None):
    """--evaluate --task retrieval or stsb, for an encoder. against: a second engine; then also its figures, and the
    cosines of its vectors with ours."""
    embedders = [Embedder(each, settings.max_len) for each in (engine, against) if each]
    sizes = [each.model.config.hidden_size for each in (engine, against) if each]
    if len(set(sizes)) > 1:
        raise InputError(f"--against {settings.against}: its vectors have {sizes[1]} numbers, and those of "
                         f"{settings.model} {sizes[0]}; give the encoder that it was made of")
    folder = Path(settings.data or tiny_world(engine.directory, "--data FOLDER"))
    texts, measure = (retrieval if settings.task == "retrieval" else similarity)(folder, settings.limit)
    vectors = [torch.from_numpy(embed_all(embed, texts)) for embed in embedders]
    ours, *others = [measure(F.normalize(each, dim=-1) if embed.sentence.similarity == "cosine" else each)
                     for each, embed in zip(vectors, embedders)]
    metrics = ours | {f"against_{name}": value for other in others for name, value in other.items()}
    if against:
        cosines = F.cosine_similarity(*vectors)
        metrics |= {"cosine_mean": float(cosines.mean()), "cosine_worst_percentile": float(cosines.quantile(0.01))}
    print(f"{settings.task}, engine {engine.name}, {len(texts):,} texts: "
          + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return {"engine": engine.name, "task": settings.task, "metrics": metrics}


def retrieval(folder, limit=None):
    """For what share of SQuAD's questions the paragraph that answers them is the nearest of all, or among the nearest
    ten; of paragraphs that are as near as it, half count as nearer.

    Returns (texts, function from their vectors, float32 (texts, H), to {metric: share})."""
    path = file_of(folder, TASKS["squad"], "dev-v1.1.json")
    questions = read_questions(path)
    paragraphs = list(dict.fromkeys(question.context for question in questions))
    places = {paragraph: place for place, paragraph in enumerate(paragraphs)}
    questions = questions[:limit]

    def measure(vectors):
        asked, found = vectors.tensor_split([len(questions)])
        ranks = []
        for question, vector in zip(questions, asked):
            scores = found @ vector
            own = scores[places[question.context]]
            ranks.append(int((scores > own).sum()) + (int((scores == own).sum()) - 1) / 2)
        return {f"recall_at_{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 10)}
    return [*(question.question for question in questions), *paragraphs], measure


def similarity(folder, limit=None):
    """How well the vectors' products order the pairs of sentences of STS-B's dev set as people do (arXiv 1708.00055).
    Returns what `retrieval` does."""
    path = file_of(folder, STSB, "dev.tsv")
    first, second, scores = (column[:limit] for column in read_table(path, STSB, labelled=False)[0])
    try:
        scores = [float(score) for score in scores]
    except ValueError as error:
        raise InputError(f"{path}: the column score holds what is no number ({error}); give the file as "
                         f"published") from None
    return [*first, *second], lambda vectors: {
        "spearman": spearman((vectors[:len(first)] * vectors[len(first):]).sum(-1).numpy(), scores)}


def embed_all(embed, texts):
    """An Embedder over any number of texts, with a bar."""
    vectors = []
    with tqdm(total=len(texts), unit="text") as bar:
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            vectors.append(embed(texts[begin:begin + TEXTS_AT_ONCE]))
            bar.update(len(vectors[-1]))
    return np.concatenate(vectors)
