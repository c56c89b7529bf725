"""Tables that a run prints, from what its files hold and its layers count."""
import json
import subprocess
import sys

import prune
from formats.patterns import whole_blocks
from model import InputError


def format_report(rows):
    """The report as a table a person can read."""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'layer':<{width}} {'weights':>12} {'zeros':>12} {'sparsity':>9}"]
    total = ("all pruned layers", sum(row[1] for row in rows), sum(row[2] for row in rows))
    for name, weights, zeros in [*rows, total]:
        lines.append(f"{name:<{width}} {weights:>12,} {zeros:>12,} {zeros / weights:>9.4%}")
    return "\n".join(lines)


def format_kinds(model):
    """The zeros of each kind of layer, and the share of blocks, of four inputs (1x4) and of four outputs (4x1), that
    are wholly zero or wholly kept: 100 % in the orientation a model was pruned in. A list of lines."""
    lines = [f"{'kind of layer':<17}{'weights':>12}{'zeros':>12}{'sparsity':>10}{'whole 1x4':>11}{'whole 4x1':>11}"]
    for kind in prune.KINDS:
        layers = [layer for name, layer in prune.prunable(model) if name.split(".")[-1] == kind]
        masks = [layer.mask & (layer.weight != 0) for layer in layers]
        if masks:
            weights, kept = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
            line = f"{kind:<17}{weights:>12,}{weights - kept:>12,}{1 - kept / weights:>10.2%}"
            for pattern in (prune.Pattern(1, 4), prune.Pattern(4, 1)):
                if masks[0].shape[0] % pattern.rows or masks[0].shape[1] % pattern.columns:
                    line += f"{'-':>11}"
                else:
                    line += f"{4 * sum(sum(whole_blocks(mask, pattern)) for mask in masks) / weights:>11.2%}"
            lines.append(line)
    return lines


def format_metrics(metrics):
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def wrapped_settings(settings):
    """A dict of settings as lines of at most 110 characters; what is not set is left out."""
    lines = [""]
    for name, value in settings.items():
        word = f"{name}={value}"
        if value in ("", None):
            continue
        if len(lines[-1]) + len(word) > 110:
            lines.append("")
        lines[-1] += word + "  "
    return lines


def engine_report(program, directory, task, data, threads):
    """A task's metrics through the real INT8 engine: what a person would type, in its own process, and what it wrote.
    program: the path of infer_cpu.py; data: as --data has it."""
    report = directory / "infer.json"
    command = [sys.executable, str(program), str(directory), "--engine", "auto", "--evaluate", "--task", task,
               "--threads", str(threads), "--agreement", "--json", str(report)] + (["--data", data] if data else [])
    if subprocess.run(command).returncode:
        raise InputError(f"the INT8 engine could not evaluate {directory}; its message stands above")
    return json.loads(report.read_text())


TABLE_HEAD = (f"{'task':<6} {'metric':<12} {'dense':>7} {'sparse':>7} {'INT8':>7}  {'sparsity':>8}  "
              f"{'dense MB':>8} {'INT8 MB':>8}  engine")


def table_line(task, metric, dense, sparse, int8, engine):
    """One line of the final table: a task's metric of three directories, and what infer_cpu.py said of the last."""
    before, pruned, rounded = (json.loads((path / "metrics.json").read_text()) for path in (dense, sparse, int8))
    megabytes = [before["file_bytes"]["model.safetensors"] / 1e6, rounded["file_bytes"]["int8.safetensors"] / 1e6]
    return (f"{task:<6} {metric:<12} {before['metrics'][metric]:>7.2%} {pruned['metrics'][metric]:>7.2%} "
            f"{engine['metrics'][metric]:>7.2%}  {rounded['sparsity']:>8.2%}  "
            f"{megabytes[0]:>8.2f} {megabytes[1]:>8.2f}  {engine['engine']}")


def format_table(lines, directories, seconds):
    """The final table. directories: of all stages, whose files say on what they were made; seconds: since the start."""
    made = [json.loads((path / "run.json").read_text()) for path in directories]
    training = sum(json.loads((path / "metrics.json").read_text())["training_seconds"] for path in directories)

    def of_all(values):
        return " and ".join(dict.fromkeys(map(str, values)))
    return "\n".join([TABLE_HEAD, *lines, f"{seconds:,.0f} s in all, {training:,.0f} s of training, "
                      f"{of_all(run['settings']['threads'] for run in made)} threads, seed "
                      f"{of_all(run['settings']['seed'] for run in made)}, {of_all(run['processor'] for run in made)}, "
                      f"torch {of_all(run['torch'] for run in made)}"])
