"""An engine beside the fake-quantized model that was trained: `infer_cpu.py --evaluate --agreement`."""

import torch

import quant
from formats import model_directory
from formats.config import rounding_of
from formats.model_directory import kind_of
from infer_cpu import Engine


def fake_quant_model(directory):
    """The quantized model as it was trained: float32 arithmetic with fake quantization. A function of a batch."""
    kind, *_ = kind_of(directory)
    model = model_directory.load(directory, kind).eval()
    quant.prepare(model, *rounding_of(directory))
    return Engine(directory, "fake-quant", model, "", 0, 0)


def keeping_logits(engine, logits):
    """The engine as `predict`, which also keeps the logits of every real token or row."""
    def predict(batch):
        result = engine(batch)
        tokens = batch["attention_mask"].bool()
        logits.extend([part[tokens] for part in result] if isinstance(result, tuple) else [result])
        return result
    return predict


def compare(data, engine, limit):
    """(metrics and predictions of engine, figures): the share of equal predictions on every dev set, the largest logit
    difference."""
    ours, theirs, reference = [], [], fake_quant_model(engine.directory)
    metrics, predictions = data.evaluate(keeping_logits(engine, ours), limit=limit)
    reference_metrics, expected = data.evaluate(keeping_logits(reference, theirs), limit=limit)
    shares, count = {}, 0
    for name, found in predictions.items():
        pairs = [(found[key], expected[name][key]) for key in (found if isinstance(found, dict) else range(len(found)))]
        shares[name] = sum(a == b for a, b in pairs) / len(pairs)
        count += len(pairs)
    ours, theirs = torch.cat([part.flatten() for part in ours]), torch.cat([part.flatten() for part in theirs])
    figures = {"examples": count, "equal_predictions": shares, "fake_quant_metrics": reference_metrics,
               "largest_logit_difference": float((ours - theirs).abs().max()),
               "mean_logit_difference": float((ours - theirs).abs().mean()),
               "logit_standard_deviation": float(theirs.std())}
    return metrics, predictions, figures


def sentence(figures):
    """What `compare` found, for a person."""
    shares = ", ".join(f"{share:.2%} of {name}" for name, share in figures["equal_predictions"].items())
    return (f"same prediction as the fake-quantized model on {shares}; logits differ by at most "
            f"{figures['largest_logit_difference']:.4f}, {figures['mean_logit_difference']:.5f} on average (their "
            f"standard deviation is {figures['logit_standard_deviation']:.2f})")
