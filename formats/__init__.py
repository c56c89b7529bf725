"""The boundary to the outside: how things lie on disk, and how a run speaks to a terminal and to other processes.

    files.py            a file stands whole or not at all
    safetensors.py      the format of that name
    names.py, config.py, model_directory.py, hub.py     a model directory in HuggingFace's layout, read and written
    heads.py            what the outputs of a classifier mean
    sentence.py         what sentence-transformers puts beside an encoder
    patterns.py         of which pattern the zeros are that a model brings
    int8.py             the packed sparse model, int8.safetensors
    run.py              a training run: its log, its checkpoints, what ends it
    processes.py        several processes that train one model
    machine.py          the CPU: its name, its cores, timing on it
    command.py          a command line, and the one sentence that answers a mistake
    report.py           tables that a run prints
"""
