"""Texts as vectors: the hidden states of an encoder, pooled, for lines, files and streams of any length."""
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.encode import encoder_of, tiny_world
from data.tasks import read_questions
from formats.files import check_place, whole_file
from formats.sentence import Sentence
from model import InputError

LINES_AT_ONCE = 4096        # of a stream: sorted by length among themselves, in memory at one time
TEXTS_AT_ONCE = 256         # of a list that is held in memory anyway: how often its bar moves
TOKENS_AT_ONCE = 2048       # of a forward pass


def pool(hidden, mask, sentence):
    """Hidden states (B, T, H) and their mask (B, T) -> vectors (B, H), as a formats.sentence.Sentence says."""
    real = mask.bool()[..., None]
    if sentence.pooling == "cls":
        vectors = hidden[:, 0]
    elif sentence.pooling == "max":
        vectors = hidden.masked_fill(~real, -torch.inf).amax(1)
    else:
        vectors = (hidden * real).sum(1) / real.sum(1)
    return F.normalize(vectors, dim=-1) if sentence.normalize else vectors


class Embedder:
    """engine (an infer_cpu.Engine of an encoder) -> function from a list of str to float32 (texts, H) numpy rows, in
    the order of the texts. InputError for a model with a head, or an odd length. max_len: tokens of a row at most."""

    def __init__(self, engine, max_len=None):
        if engine.model.kind != "encoder":
            raise InputError(f"{engine.directory} has a head for a task; --embed wants an encoder, such as --stage prune "
                             f"--kd-target hidden writes")
        self.engine, self.sentence = engine, engine.model.sentence or Sentence()
        config = engine.model.config
        length = max_len or min(self.sentence.max_length or config.max_position_embeddings,
                                config.max_position_embeddings)
        self.encoder = encoder_of(engine, length)

    def __call__(self, texts):
        vectors = np.zeros((len(texts), self.engine.model.config.hidden_size), np.float32)
        rows = self.encoder.encode(list(texts)) if texts else []
        lengths = [len(row["input_ids"]) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)      # neighbours of like length: next to no padding
        while order:
            size = max(1, TOKENS_AT_ONCE // lengths[order[-1]])
            chosen, order = order[-size:], order[:-size]
            batch = self.encoder.collate([rows[i] for i in chosen])
            vectors[chosen] = pool(self.engine(batch), batch["attention_mask"], self.sentence).numpy()
        if not np.isfinite(vectors).all():
            raise InputError(f"{self.engine.directory} answers with what is no number; give another model")
        return vectors


def lines_of(path):
    """Yields lists of at most LINES_AT_ONCE lines of a file, '-' for standard input, without their ends."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            lines = []
            for number, line in enumerate(file, 1):
                lines.append(line.rstrip(b"\r\n").decode("utf-8"))
                if len(lines) == LINES_AT_ONCE:
                    yield lines
                    lines = []
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
            count += len(lines)
            bar.update(len(lines))
        if packed:
            file.seek(0)
            write_header(file, count, columns)
    return {"engine": engine.name, "lines": count}


def evaluate_retrieval(settings, engine, against=None):
    """--evaluate --task retrieval: for what share of SQuAD's questions the paragraph that answers them is the nearest
    of all, or among the nearest ten. against: a second engine; then also the cosines of its vectors with ours."""
    path = Path(settings.data or tiny_world(engine.directory, "--data FOLDER")) / "SQuAD" / "dev-v1.1.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; give (--data) the folder that holds SQuAD/ with {path.name} in it")
    questions = read_questions(path)
    paragraphs = list(dict.fromkeys(question.context for question in questions))
    places = {paragraph: place for place, paragraph in enumerate(paragraphs)}
    questions = questions[:settings.limit]
    texts = [*(question.question for question in questions), *paragraphs]
    ours = torch.from_numpy(embed_all(Embedder(engine, settings.max_len), texts))
    asked, found = F.normalize(ours, dim=-1).tensor_split([len(questions)])
    ranks = []
    for number, row in enumerate(asked):
        scores = found @ row
        ranks.append(int((scores > scores[places[questions[number].context]]).sum()))
    metrics = {f"recall_at_{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 10)}
    if against:
        cosines = F.cosine_similarity(ours, torch.from_numpy(embed_all(Embedder(against, settings.max_len), texts)))
        metrics |= {"cosine_mean": float(cosines.mean()), "cosine_worst_percentile": float(cosines.quantile(0.01))}
    print(f"retrieval, engine {engine.name}, {len(questions):,} questions and {len(paragraphs):,} paragraphs: "
          + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return {"engine": engine.name, "task": "retrieval", "metrics": metrics}


def embed_all(embed, texts):
    """An Embedder over any number of texts, with a bar."""
    vectors = []
    with tqdm(total=len(texts), unit="text") as bar:
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            vectors.append(embed(texts[begin:begin + TEXTS_AT_ONCE]))
            bar.update(len(vectors[-1]))
    return np.concatenate(vectors)
