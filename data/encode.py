"""What a person types, or a task's files, as batches for the model in a directory; and what its outputs answer."""
import math

import torch

from data import tiny
from data.metrics import best_span
from data.tasks import TASKS, TaskData
from data.wordpiece import load_tokenizer, vocabulary_rows
from formats.command import to_stderr
from formats.config import compression_of, read_config
from formats.files import write_file
from formats.heads import class_names, class_order, probabilities
from formats.model_directory import kind_of
from formats.sentence import sentence_of_encoder
from model import PRESETS, InputError

ROWS_AT_ONCE = 32       # of what a person types, in a forward pass
NO_NUMBER = "{} answers with what is no number: its weights are so large that sums of them overflow; give another model"


def tokenizer_of(directory):
    """The tokenizer of a model directory. InputError if it has ids that the model has not."""
    tokenizer, config = load_tokenizer(directory), read_config(directory)[0]
    if vocabulary_rows(tokenizer) > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {vocabulary_rows(tokenizer)} ids and the model "
                         f"{config.vocab_size}; they do not belong together")
    return tokenizer


def longest_row(directory, config):
    """How many tokens of a row the tokenizer of a directory keeps where it is asked to truncate; where it does not say,
    or there is none (None), as many as the model has positions."""
    said = sentence_of_encoder(directory).max_length if directory else None
    return min(said or config.max_position_embeddings, config.max_position_embeddings)


def encoder_for(directory, kind, max_len, task=None, folder=None, split="dev", tokenizer=None):
    """A TaskData of the model's tokenizer and row length: with `folder` it has the split, without it only encodes.
    Where neither max_len nor the model's training says how long a row is, the task does; for texts of no task, only the
    model's positions."""
    config = read_config(directory)[0]
    name = task or ("squad" if kind == "span" else "sst2")
    usual = TASKS[name].max_length if task or kind == "span" else config.max_position_embeddings
    length = max_len or compression_of(directory).get("max_len") or min(usual, config.max_position_embeddings)
    if not isinstance(length, int) or not 8 <= length <= config.max_position_embeddings:
        raise InputError(f"rows of {length} tokens do not fit {directory}, which takes 8 to "
                         f"{config.max_position_embeddings}; give another --max-len")
    tokenizer = tokenizer or tokenizer_of(directory)
    return TaskData(name, folder or ".", tokenizer, length, splits=(split,) if folder else ())


def encoder_of(engine, max_len):
    """encoder_for the model of an infer_cpu.Engine, which keeps the tokenizer: to read it takes longer than to answer."""
    engine.tokenizer = engine.tokenizer or tokenizer_of(engine.directory)
    return encoder_for(engine.directory, engine.model.kind, max_len, tokenizer=engine.tokenizer)


def strings(texts, name="texts"):
    """Any sequence of str as a list of them. InputError for anything else, a single str above all."""
    if isinstance(texts, str):
        raise InputError(f"{name} is one text; give a list of them: [{texts[:20]!r}]")
    texts = list(texts)
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise InputError(f"{name} holds {len(strange)} things that are no str, {strange[0]!r} to begin with")
    return texts


def check_texts(settings, kind, task):
    """InputError unless --text-pair or --context go with --text as this model wants them."""
    texts, pairs, contexts = len(settings.text), len(settings.text_pair), len(settings.context)
    if kind == "span":
        if pairs or contexts not in (1, texts):
            raise InputError(f"this model answers questions: --text is the question, --context its passage, once or "
                             f"once per --text; found {contexts} for {texts}, and {pairs} --text-pair")
        return
    if contexts:
        raise InputError("--context is for a model that answers questions, and this one classifies; use --text-pair")
    allowed = (0, texts) if task not in TASKS else (texts,) if TASKS[task].pairs else (0,)
    if pairs not in allowed:
        raise InputError(f"this model{f' ({task})' if task in TASKS else ''} wants {' or '.join(map(str, allowed))} "
                         f"--text-pair for {texts} --text, the n-th to go with the n-th; found {pairs}")


def random_batch(config, batch_size, length):
    """A full batch of random tokens."""
    length = min(length, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def check_pairs(config, pairs, where):
    """InputError if rows are pairs of texts and the model cannot tell the second from the first."""
    if pairs and config.type_vocab_size == 1:
        raise InputError(f"{where} has one token type, and pairs of texts need two; give another model, or one text")


def as_inputs(batch, model):
    """What a caller passes to an engine -> int64 (B, T) input_ids, attention_mask and token_type_ids.

    Arrays of any kind of number; without a mask every token is real, without types all are of the first. InputError
    for an id that an embedding does not have, and for a row that is padding alone or, where the model reads the first
    token of a row, begins with it.
    """
    config, ids = model.config, torch.as_tensor(batch["input_ids"]).long().cpu()
    mask, types = (torch.as_tensor(batch[name] if name in batch else fill(ids)).long().cpu() for name, fill in
                   (("attention_mask", torch.ones_like), ("token_type_ids", torch.zeros_like)))
    if ids.ndim != 2 or not ids.shape == mask.shape == types.shape or not ids.shape[1]:
        raise InputError(f"a batch of shapes {list(ids.shape)}, {list(mask.shape)} and {list(types.shape)}; expected "
                         f"rows of tokens, their mask and their types, all of one shape")
    for name, numbers, count in (("token", ids, config.vocab_size), ("type", types, config.type_vocab_size)):
        if numbers.numel() and count and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise InputError(f"the {name} ids of a batch, {int(numbers.min())} to {int(numbers.max())}, are not all in "
                             f"an embedding of {count} rows")
    real = mask != 0
    if not bool(real.any(1).all()):
        raise InputError("a row of the batch is padding alone; leave it out")
    if model.kind == "classification" and not bool(real[:, 0].all()):
        raise InputError("a row of the batch begins with padding, and the classifier reads its first token; pad at the "
                         "end")
    return ids, mask, types


def answer(engine, texts, pairs, contexts, max_len):
    """What infer_cpu.Engine.answer returns, of an infer_cpu.Engine and the arguments that are described there."""
    encoder, results = encoder_of(engine, max_len), []
    texts, pairs, contexts = strings(texts), strings(pairs, "pairs"), strings(contexts, "contexts")
    span = engine.model.kind == "span"
    others, name = (contexts, "contexts") if span else (pairs, "pairs")
    if pairs if span else contexts:
        raise InputError(f"this model {'answers questions' if span else 'classifies'}: it takes texts and {name} alone")
    if len(others) != len(texts) and (others or span):
        raise InputError(f"{len(texts)} texts and {len(others)} {name}; expected as many")
    if span:
        for question, context in zip(texts, contexts, strict=True):
            rows = encoder.encode_question(question, context)
            if not any(len(row["offsets"]) for row in rows):
                raise InputError(f"the context of {question!r} has no word in it; give --context the text in which the "
                                 f"answer stands")
            starts, ends = [], []
            for begin in range(0, len(rows), ROWS_AT_ONCE):
                for logits, found in zip((starts, ends), engine(encoder.collate(rows[begin:begin + ROWS_AT_ONCE]))):
                    logits += list(found.numpy())
            text, _, _, score = best_span(rows, starts, ends)
            if not math.isfinite(score):
                raise InputError(NO_NUMBER.format(engine.directory))
            results.append((text, score))
        return results
    check_pairs(engine.model.config, pairs, engine.directory)
    rows, raw = encoder.encode(texts, pairs or None), read_config(engine.directory)[1]
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        shares = probabilities(raw, engine(encoder.collate(rows[begin:begin + ROWS_AT_ONCE])))
        if not bool(shares.isfinite().all()):
            raise InputError(NO_NUMBER.format(engine.directory))
        names = class_names(raw, shares.shape[1])
        results += [(names[int(row.argmax())], float(row.max())) for row in shares]
    return results


def run_text(settings, load):
    """--text: what a model answers, a line each; the same for --json. load: infer_cpu.load."""
    kind, *_ = kind_of(settings.model)
    if kind in ("encoder", "pretraining"):
        raise InputError(f"{settings.model} is a pre-trained model without a task; fine-tune it first: python train.py "
                         f"--stage finetune --task TASK" + ", or take its vectors: --embed FILE" * (kind == "encoder"))
    check_texts(settings, kind, compression_of(settings.model).get("task"))
    engine = load(settings.model, settings.engine, settings.threads, say=to_stderr)
    contexts = settings.context * (len(settings.text) if len(settings.context) == 1 else 1)
    results = engine.answer(settings.text, settings.text_pair, contexts, settings.max_len)
    value_is = "score" if kind == "span" else "probability"
    others = settings.text_pair or [None] * len(results)
    for text, other, (found, value) in zip(settings.text, others, results):
        print(found, f"{value:.4g}" if 0 < value < 1e-4 else f"{value:.4f}", text, *filter(None, [other]), sep="\t")
    return {"engine": engine.name, "answers": [
        {"text": text, **({} if other is None else {"text_pair": other}), "answer": found, value_is: value}
        for text, other, (found, value) in zip(settings.text, others, results)]}


def evaluation_data(directory, kind, task, folder, max_len, split="dev"):
    """(task, its TaskData) to evaluate a model of this kind on. task: None for the one it was trained on; folder: ""
    for the tiny world. InputError if model and task do not go together; `match_classes` looks at the rest."""
    task = task or compression_of(directory).get("task")
    if kind == "encoder":
        raise InputError(f"{directory} is an encoder without a task; measure its vectors with --task retrieval or "
                         f"stsb, or fine-tune it first: python train.py --stage finetune --task TASK --init {directory}")
    if task not in list(TASKS):
        raise InputError(f"{directory} does not say which task it was trained on; give --task, one of "
                         f"{', '.join(TASKS)}")
    if TASKS[task].kind != kind:
        raise InputError(f"--task {task} needs a {TASKS[task].kind} model, and {directory} is a {kind} model")
    check_pairs(read_config(directory)[0], TASKS[task].pairs, directory)
    return task, encoder_for(directory, kind, max_len, task, folder or tiny_world(directory, "--data FOLDER"), split)


def tiny_world(directory, flag):
    """The folder of the tiny world, for a model that may belong to it; InputError asks for a flag in its place."""
    config, size = read_config(directory)[0], PRESETS["tiny"]
    if (config.hidden_size, config.num_hidden_layers) != (size.hidden_size, size.num_hidden_layers):
        raise InputError(f"{directory} is not of the tiny world's size, and without {flag} its files would be taken; "
                         f"give {flag}")
    return tiny.ensure()


def match_classes(data, model, directory):
    """Tell a TaskData in which order a model has the task's classes. InputError if they are not the task's."""
    if model.kind == "classification":
        data.class_order = class_order(read_config(directory)[1], model.classifier.out_features, data.task, directory)


def write_predictions(data, predictions, folder):
    """Files as GLUE's server and SQuAD's script take them."""
    for name, content in data.prediction_files(predictions).items():
        write_file(folder / name, content)
        print(f"wrote {folder / name}")
