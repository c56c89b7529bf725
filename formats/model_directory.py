"""A model directory in HuggingFace's layout: read in all its variants, written in one.

    config.json, model.safetensors    as HuggingFace's tools read them; zeros burned in
    compression.safetensors           ours beside it: masks as bits, activation ranges
"""
import re
from pathlib import Path

import torch

from formats.config import compression_of, config_json, read_config
from formats.files import demand_content, names_in_short, read_json, write_json
from formats.heads import class_order
from formats.names import ARCHITECTURES, NAMES, TIED_DECODER, is_head, published_name
from formats.safetensors import read_safetensors, write_safetensors
from formats.sentence import read_sentence, write_sentence
from model import InputError, build, linears
from quant import pack_bits, unpack_bits

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",       # the first that is there is read
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def save(model, directory, labels=None, compression=None):
    """Write config.json, model.safetensors (zeros burned in) and compression.safetensors (masks, activation ranges).

    The masks are stored as bits, eight to a byte, row after row: the name of the weight with `mask_bits` in place of
    `weight`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if model.kind == "classification" and labels is None:      # without names, HuggingFace's tools expect two classes
        labels = [f"LABEL_{i}" for i in range(model.classifier.out_features)]
    masked = {name + ".weight": layer for name, layer in linears(model)}
    weights, extra = {}, {}
    for name, tensor in model.state_dict().items():
        theirs = published_name(model.config.model_type, name)
        weights[theirs] = tensor * masked[name].mask if name in masked else tensor
        if name in masked:
            stem = theirs.removesuffix("weight")
            extra[stem + "mask_bits"] = pack_bits(masked[name].mask)
            if masked[name].fake_quant is not None and masked[name].act_range[0] <= masked[name].act_range[1]:
                extra[stem + "act_range"] = masked[name].act_range
    write_safetensors(directory / "model.safetensors", weights)
    write_safetensors(directory / "compression.safetensors", extra)
    write_json(directory / "config.json", config_json(model.config, model.kind, labels, compression))
    if model.kind == "encoder" and model.sentence:
        write_sentence(model.sentence, model.config.hidden_size, directory)


def read_tensors(directory):
    """The tensors of the first of WEIGHT_FILES that is there, by the names they have in it; an index stands for all the
    files that it lists. Returns (dict, path). InputError names what is missing or damaged."""
    path = next((path for path in (Path(directory) / name for name in WEIGHT_FILES) if path.is_file()), None)
    if path is None:
        raise InputError(f"{directory} holds neither model.safetensors nor pytorch_model.bin, whole or with an index")
    if path.suffix != ".json":
        return read_weight_file(path), path
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and file and Path(file).name == file
                                              for file in files.values()):
        raise InputError(f"{path} has no weight_map from names of tensors to files of its own folder")
    tensors = {}
    for file in sorted(set(files.values())):
        tensors.update(read_weight_file(path.with_name(file)))
    lost = [name for name in files if name not in tensors]
    if lost:
        raise InputError(f"{path} lists {len(lost)} tensors that its files do not hold: {names_in_short(lost)}")
    return tensors, path


def read_weight_file(path):
    """A .safetensors file, or one that torch.save wrote, as a dict of tensors; of a pickle nothing else is loaded."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if not path.is_file():
        raise InputError(f"{path} is missing")
    demand_content(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()):
            raise TypeError("not every entry is a tensor with a name")
    except Exception as error:          # torch raises many kinds here, and all mean: no plain checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a dictionary of tensors: {reason}") from None
    return tensors


# What training with the paper's reference code leaves in a file beside the model: its teacher (distiller.py there), and
# the state of its fake quantization (quantization/qat.py).
WRAPPERS = ("module.", "_orig_mod.")        # before every name: of DataParallel, and of a model that torch.compile took
LEFTOVERS = re.compile(r"_?teacher\.|.*\.(weight|input|output)_fake_quant\.|.*\.(_step|fake_quant_enabled)$")


def read_weights(directory, say=print):
    """All weights of a model directory by their published names: prefixes and old spellings normalized, masks
    multiplied in, what training left there, buffers and copies of the tied decoder removed. InputError names a tensor
    with a number that is none.

    say: told what was left out or changed. Returns (dict, path of the file).
    """
    model_type = read_config(directory)[0].model_type
    tensors, path = read_tensors(directory)
    for wrapper in 2 * WRAPPERS:                # each may be inside the other
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    prefix = model_type + "."
    bare = not any(name.startswith(prefix) for name in tensors)
    found, leftovers = {}, []
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if bare and name.split(".")[0] in ("embeddings", "encoder", "transformer", "pooler"):
            name = prefix + name
        if LEFTOVERS.match(name):
            leftovers.append(name)
        elif not name.endswith(("position_ids", "token_type_ids")):             # buffers of some versions
            found[name] = tensor
    if leftovers:
        say(f"{path}: leaves out {len(leftovers)} tensors that training left there: {names_in_short(leftovers, 3)}")
    strange = [name for name, tensor in found.items() if tensor.layout != torch.strided
               or not (tensor.is_floating_point() or name.endswith("_mask"))]
    if strange:
        raise InputError(f"{path}: {names_in_short(strange)} should hold floating-point numbers, and '{strange[0]}' "
                         f"holds {found[strange[0]].dtype}")
    broken = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(f"{path}: {names_in_short(broken)} holds a NaN or an Inf; the file was made by a training "
                         f"that failed, or lost it in 16 bits; give another model")
    multiply_masks(found, path, say)
    drop_tied_copies(found, model_type)
    others = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.values()} - {"float32"})
    if others:
        say(f"{path}: holds {' and '.join(others)} numbers; the model computes with them in float32")
    return found, path


def multiply_masks(found, path, say):
    """W = W_original * W_mask: so the paper's reference code stores a weight while it is being pruned
    (pruning/methods/method.py there). In place. A mask beside a plain W is multiplied into that."""
    masked = [name.removesuffix("_mask") for name in found if name.endswith("_mask")]
    for name in masked:
        mask = found.pop(name + "_mask")
        weight = found.pop(name + "_original", found.get(name))
        if weight is None or weight.shape != mask.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"{path}: '{name}_mask' does not hold a 0 or 1 for each number of '{name}'")
        found[name] = weight * mask
    if masked:
        say(f"{path}: was saved while it was being pruned; {len(masked)} weights are taken times their masks")


def drop_tied_copies(found, model_type):
    """Remove the decoder's copies of the word embeddings and of the bias. In place; a decoder that differs stays."""
    word = found.get(published_name(model_type, "encoder.word.weight"))
    bias = published_name(model_type, "bias")
    weight_copy, bias_copy = TIED_DECODER[model_type]
    if weight_copy in found and word is not None and torch.equal(found[weight_copy], word):
        del found[weight_copy]
    if bias_copy in found:
        found.setdefault(bias, found.pop(bias_copy))


def load(directory, kind, num_labels=None, fresh_head=False, say=print, task=None):
    """Read a model directory into a model of the given kind, on the CPU, in float32.

    Strict: every tensor of the encoder must be there with its shape, and nothing unknown may be; only heads (and the
    pooler, which masked-language-model files leave out) may be missing, if fresh_head, and then `say` is told.
    num_labels: classes of a classification head; None takes the directory's. task: as in heads.class_order; the head's
    outputs are put into its order, and one that is another task's counts as missing if fresh_head.
    Raises InputError naming the file and the tensors.
    """
    config, raw = read_config(directory)
    found, path = read_weights(directory, say)
    check_plausible_size(config, found, path)
    decoder = TIED_DECODER[config.model_type][0]
    if kind == "pretraining" and (decoder in found or raw.get("tie_word_embeddings") is False):
        raise InputError(f"{path}: '{decoder}' differs from the word embeddings, or config.json says that it may; this "
                         f"network ties the two")
    if kind == "classification" and task is not None:
        num_labels = len(task.classes)
        order_classes(found, raw, task, directory, fresh_head, say)
    if kind == "classification" and num_labels is None:
        head = found.get("classifier.weight")
        if head is None or head.ndim != 2:
            raise InputError(f"{path} has no classifier; give a directory that was fine-tuned on a classification task")
        num_labels = head.shape[0]
    model = build(config, kind, num_labels or 2)
    if kind == "encoder" and not any("pooler" in name for name in found):
        model.encoder.pooler = None                     # as in a file of a masked language model
    wanted = {published_name(config.model_type, name): tensor for name, tensor in model.state_dict().items()}
    if fresh_head:                              # a head for another task (another shape) counts as missing
        found = {name: tensor for name, tensor in found.items()
                 if not (name in wanted and name.startswith("classifier.") and tensor.shape != wanted[name].shape)}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    fatal = [name for name in missing if not (fresh_head and is_head(name, config.model_type))]
    if fatal:
        raise InputError(f"{path} lacks {len(fatal)} of the model's {len(wanted)} tensors: {names_in_short(fatal)}")
    strange = [name for name in unexpected if not is_head(name, config.model_type)]
    if strange:
        raise InputError(f"{path} holds {len(strange)} tensors that this model has no place for: "
                         f"{names_in_short(strange)}")
    for name in (name for name in wanted if name in found):
        if found[name].shape != wanted[name].shape:
            raise InputError(f"{path}: '{name}' has shape {list(found[name].shape)}; the configuration asks for "
                             f"{list(wanted[name].shape)}")
        wanted[name].copy_(found[name])         # state_dict shares its memory with the model
    if missing:
        say(f"{path}: starts with fresh weights for {names_in_short(missing)}")
        if published_name(config.model_type, "transform.weight") in missing:
            start_transform(model)
    if unexpected:
        say(f"{path}: leaves out {names_in_short(unexpected)}")
    load_compression(model, directory, fresh=missing)
    if kind == "encoder":
        model.sentence = read_sentence(directory)
    return model


@torch.no_grad()
def start_transform(model):
    """A fresh transform of the vocabulary head starts as the identity: a random one would tear the hidden states away
    from the word embeddings, to which the decoder is tied."""
    model.transform.weight.copy_(torch.eye(model.config.hidden_size))
    model.transform.bias.zero_()


def order_classes(found, raw, task, directory, fresh_head, say):
    """Put the outputs of the classifier in `found` into the task's order. In place; where they cannot mean its classes,
    InputError, or with fresh_head the classifier is left out and `say` is told why."""
    weight, bias = found.get("classifier.weight"), found.get("classifier.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        return                                          # `load` will say so
    try:
        order = class_order(raw, len(weight), task, directory)
    except InputError as error:
        if not fresh_head:
            raise
        say(str(error).split(";")[0] + ": its classifier is left out")
        del found["classifier.weight"], found["classifier.bias"]
    else:
        found.update({"classifier.weight": weight[order], "classifier.bias": bias[order]})


def check_plausible_size(config, found, path):
    """InputError if config.json asks for far more than the file holds, before memory is taken for that. What merely
    lacks some tensors passes: `load` will name them."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    wanted = hidden * (layers * (4 * hidden + 2 * config.intermediate_size) + config.vocab_size
                       + config.max_position_embeddings)
    held = sum(tensor.numel() for tensor in found.values())
    if layers > len(found) or wanted > 10 * held + 2 ** 20:
        raise InputError(f"{path} holds {held:,} numbers in {len(found)} tensors, and config.json asks for {layers:,} "
                         f"layers with {wanted:,}; they do not belong together")


def load_compression(model, directory, fresh=()):
    """Masks and activation ranges from compression.safetensors, where a directory has that file.

    fresh: published names of the weights that were not loaded; those layers keep the slots of a new layer. Heads and
    the pooler may lack an entry, the encoder's layers may not.
    """
    path = Path(directory) / "compression.safetensors"
    if not path.is_file():
        return
    tensors, _ = read_safetensors(path)
    rounded = "activation_bits" in compression_of(directory)
    for name, layer in linears(model):
        stem = published_name(model.config.model_type, name + ".")
        bits, act_range = tensors.get(stem + "mask_bits"), tensors.get(stem + "act_range")
        if stem + "weight" in fresh or (bits is None and act_range is None and not name.startswith("encoder.layers.")):
            continue
        if bits is None:
            raise InputError(f"{path} lacks '{stem}mask_bits'")
        if bits.dtype != torch.uint8 or bits.shape != ((layer.mask.numel() + 7) // 8,):
            raise InputError(f"{path}: '{stem}mask_bits' does not fit the layer's shape {list(layer.weight.shape)}")
        layer.mask.copy_(unpack_bits(bits, layer.mask.shape))
        if act_range is None or not (rounded or bool(act_range.any())):     # before, a layer without one had 0, 0
            continue
        if act_range.shape != (2,) or not bool(torch.isfinite(act_range).all()) or act_range[0] > act_range[1]:
            raise InputError(f"{path}: '{stem}act_range' is not a minimum and a maximum")
        layer.act_range.copy_(act_range)


# ---------------------------------------------------------------------------------------------------------------------
# What kind of model it is


def kind_of(directory):
    """(kind, ModelConfig, the JSON object) of a model directory; kind as in model.build. Where config.json names no
    architecture, the tensors tell."""
    config, raw = read_config(directory)
    kinds = {architecture: kind for (_, kind), architecture in ARCHITECTURES.items()}
    named = raw.get("architectures")
    if named is None:
        found = kinds_of_heads(directory, config.model_type)
    else:
        found = {kinds[name] for name in (named if isinstance(named, list) else ()) if name in list(kinds)}
    if len(found) > 1:
        found -= {"encoder"}                            # a head named beside the encoder that it stands on
    if len(found) != 1:
        heads = f", and its weights have heads for {' and '.join(sorted(found)) or 'nothing'}" if named is None else ""
        raise InputError(f"{Path(directory) / 'config.json'} says architectures {named!r}{heads}; expected one of "
                         f"{', '.join(kinds)}")
    return found.pop(), config, raw


def kinds_of_heads(directory, model_type):
    """The kinds of model, as in model.build, for which the weights in a directory have a head."""
    packed = Path(directory) / "int8.safetensors"
    names = read_safetensors(packed)[0] if packed.is_file() else read_weights(directory, say=lambda line: None)[0]
    heads = {"pretraining": "transform", "classification": "classifier", "span": "span"}
    return {kind for kind, head in heads.items()
            if any(name.startswith(NAMES[model_type][head] + ".") for name in names)} or {"encoder"}


def weight_files(path):
    """One of WEIGHT_FILES -> [it], or an index and all the files that it lists."""
    listed = read_json(path)["weight_map"].values() if path.suffix == ".json" else ()
    return [path, *(path.with_name(name) for name in sorted(set(listed)))]


def weight_bytes(directory):
    """Bytes of the files that read_tensors reads, an index included."""
    path = next(path for name in WEIGHT_FILES if (path := Path(directory) / name).is_file())
    return sum(file.stat().st_size for file in weight_files(path))
