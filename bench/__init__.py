"""What measures, and what it measured. Every file is a command: `python -m bench.NAME --help`.

    benchmark.py            every engine side by side       (infer_cpu.py --benchmark)
    size.py                 bytes, counted four ways        (infer_cpu.py --size)
    agreement.py            an engine beside fake quantization      (infer_cpu.py --evaluate --agreement)
    recipe_costs.py         what the published models cost  (train.py --recipe help)
    memory.py               how much memory a stage will take
    step_time.py            where the time of a training step goes
    watch.py                how a run stands, from its log
    measure_*.py            what the pages quote, each with its .json; of shards, settings and BERT-Large without
    walk.py                 a step of pruning and a sentence through the engine, with their numbers
    forks.py                copies of the project with a diff of docs/ applied
    collect_runs.py         results of a folder of runs
    draw_curves.py, draw_pictures.py    the curves of a run; the pictures of README
"""
