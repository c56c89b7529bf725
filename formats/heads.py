"""What the outputs of a classification head mean: the names of its classes, how they become an answer, and in which
order a task counts them. `raw` is the JSON object in config.json throughout."""
import re

from model import InputError


def class_names(raw, count):
    """The names of `count` classes: id2label's, or HuggingFace's LABEL_0, LABEL_1, ... where it has none."""
    names = raw.get("id2label")
    return [str(names.get(str(number), f"LABEL_{number}")) if isinstance(names, dict) else f"LABEL_{number}"
            for number in range(count)]


def probabilities(raw, logits):
    """float (B, C) logits -> what HuggingFace's pipeline answers with: shares of one, each output's own probability
    where classes do not exclude each other or there is but one, or the numbers themselves of a regression."""
    kind = raw.get("problem_type")
    if kind == "regression":
        return logits
    if kind == "multi_label_classification" or logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(1)


def plain(name):
    """A name as it is compared: 'Not Entailment' is 'not_entailment'."""
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def class_order(raw, count, task, where):
    """[output of the head that is class 0 of the task, class 1, ...], found by their names.

    count: outputs of the head; task: has a `name` and `classes`, per class the names that it goes by; where: the
    directory, for the message. Names that are all numbers, LABEL_2 or 2, mean the task's own. InputError if the head is
    another task's, or answers otherwise than with one class.
    """
    recorded = raw.get("compression")
    other = recorded.get("task") if isinstance(recorded, dict) else None
    expected = ", ".join(names[-1] for names in task.classes)
    if other is not None and other != task.name:
        raise InputError(f"the classifier of {where} was trained on {other}, and this is {task.name}; give a model of "
                         f"{task.name}")
    kind = raw.get("problem_type") or "single_label_classification"
    if count != len(task.classes) or kind != "single_label_classification":
        raise InputError(f"{task.name} has {len(task.classes)} classes, {expected}, of which one is right, and {where} "
                         f"has {count} output{'s' * (count != 1)} for {kind}; give a model of {task.name}")
    names = [plain(name) for name in class_names(raw, count)]
    numbers = [re.fullmatch(r"(?:label_)?(\d+)", name) for name in names]
    if all(numbers):
        meant = [int(number[1]) for number in numbers]
    else:
        meant = [next((i for i, known in enumerate(task.classes) if name in map(plain, known)), None) for name in names]
    listed = raw.get("id2label")
    if {*meant} != {*range(count)} or isinstance(listed, dict) and len(listed) != count:
        raise InputError(f"the classes of {where} are {', '.join(class_names(raw, count))}, and those of {task.name} "
                         f"{expected}; correct id2label in its config.json, or give another model")
    return [meant.index(i) for i in range(count)]
