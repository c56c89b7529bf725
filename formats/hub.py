"""Models by name: a folder, or 'owner/name' on the HuggingFace hub."""
import contextlib
import functools
import json
import re
from pathlib import Path

from formats.files import read_json
from formats.model_directory import WEIGHT_FILES
from formats.sentence import LENGTH_FILES
from model import InputError

SENTENCE_FILES = (*LENGTH_FILES, "config_sentence_transformers.json")


@functools.lru_cache
def fetch(name):
    """A model of the HuggingFace hub, 'owner/name' -> the folder where the hub's own cache keeps it.

    Only what is read here is fetched, with the hub's progress bars: config.json, the tokenizer, what
    sentence-transformers puts beside them, and the first of WEIGHT_FILES. InputError, one sentence, for a person who is
    offline or mistyped the name.
    """
    try:
        from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()         # its five retries without a network are no news

        print(f"asking the HuggingFace hub for {name}", flush=True)         # offline it takes half a minute to give up
        config = Path(hf_hub_download(name, "config.json"))
        revision = config.parent.name         # the commit, so that every file is of the same one

        unknown = []

        def get(file):
            with contextlib.suppress(EntryNotFoundError):          # not in this model
                try:
                    return Path(hf_hub_download(name, file, revision=revision))
                except LocalEntryNotFoundError:                    # the hub cannot be asked whether it is
                    if try_to_load_from_cache(name, file, revision=revision) is not _CACHED_NO_EXIST:
                        if not constants.HF_HUB_OFFLINE:
                            raise ConnectionError(f"it cannot be reached for {file}") from None
                        unknown.append(file)

        tokenizer = [get(file) for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "added_tokens.json",
                                            "special_tokens_map.json")]
        modules = get("modules.json")
        for file in [*SENTENCE_FILES, *(f"{module['path']}/config.json" for module in
                                        json.loads(modules.read_bytes()) if module["path"])] if modules else ():
            get(file)
        weights = next(filter(None, map(get, WEIGHT_FILES)), None)
        if unknown:
            print(f"offline, taken as not in {name}: {' '.join(unknown)}", flush=True)
        if weights is None or not any(tokenizer[:2]):
            raise FileNotFoundError("its weights or its vocabulary are not there")
        if weights.suffix == ".json":
            for file in sorted(set(read_json(weights)["weight_map"].values())):
                hf_hub_download(name, file, revision=revision)
    except Exception as error:                # network, hub and cache raise many kinds, and all mean: it is not here
        kind, first_line = type(error).__name__, str(error).strip().split("\n")[0].rstrip(".")
        reason = {"RepositoryNotFoundError": "it has no public model of that name",
                  "LocalEntryNotFoundError": "it cannot be reached"}.get(kind, first_line or kind)
        raise InputError(f"{name} is no folder here and could not be fetched from the HuggingFace hub ({reason}); "
                         f"check the name, or put its config.json, vocab.txt and model.safetensors or "
                         f"pytorch_model.bin into the folder {Path(name).absolute()} and type the same command "
                         f"again") from None
    return config.parent


def locate(name):
    """A model as a person names it, a folder or 'owner/name' of the HuggingFace hub -> its folder (Path)."""
    if Path(name).is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return Path(name)
    return fetch(str(name))
