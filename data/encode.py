"""What a person types, or a task's files, as batches for the model in a directory."""
import torch

from data import tiny
from data.tasks import TASKS, TaskData
from data.text import load_tokenizer
from formats.config import compression_of, kind_of, read_config
from formats.files import write_file
from model import InputError


def encoder_for(directory, kind, max_len, task=None, folder=None, split="dev"):
    """A TaskData of the model's tokenizer and row length: with `folder` it has the split, without it only encodes."""
    config = read_config(directory)[0]
    name = task or ("squad" if kind == "span" else "sst2")
    length = max_len or compression_of(directory).get("max_len") or min(TASKS[name].max_length,
                                                                         config.max_position_embeddings)
    if not isinstance(length, int) or not 8 <= length <= config.max_position_embeddings:
        raise InputError(f"rows of {length} tokens do not fit {directory}, which takes 8 to "
                         f"{config.max_position_embeddings}; give another --max-len")
    tokenizer = load_tokenizer(directory)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {tokenizer.get_vocab_size()} tokens and the model "
                         f"{config.vocab_size}; they do not belong together")
    return TaskData(name, folder or ".", tokenizer, length, splits=(split,) if folder else ())


def label_names(directory, count):
    """The names of the classes, from config.json's id2label; their numbers if it has none."""
    names = kind_of(directory)[2].get("id2label")
    return [str(names.get(str(number), number)) if isinstance(names, dict) else str(number) for number in range(count)]


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
    allowed = (0, texts) if task not in TASKS else (texts,) if len(TASKS[task].text_columns) == 2 else (0,)
    if pairs not in allowed:
        raise InputError(f"this model{f' ({task})' if task in TASKS else ''} wants {' or '.join(map(str, allowed))} "
                         f"--text-pair for {texts} --text, the n-th to go with the n-th; found {pairs}")


def random_batch(config, batch_size, length):
    """A full batch of random tokens."""
    length = min(length, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def evaluation_data(settings, kind):
    """(task, its TaskData) for --evaluate of a model of this kind. InputError if the two do not go together."""
    task = settings.task or compression_of(settings.model).get("task")
    if task not in TASKS:
        raise InputError(f"{settings.model} does not say which task it was trained on; give --task, one of "
                         f"{', '.join(TASKS)}")
    if TASKS[task].kind != kind:
        raise InputError(f"--task {task} needs a {TASKS[task].kind} model, and {settings.model} is a {kind} model")
    folder = settings.data or tiny.ensure()
    return task, encoder_for(settings.model, kind, settings.max_len, task, folder, settings.split)


def write_predictions(data, predictions, folder):
    """Files as GLUE's server and SQuAD's script take them."""
    for name, content in data.prediction_files(predictions).items():
        write_file(folder / name, content)
        print(f"wrote {folder / name}")
