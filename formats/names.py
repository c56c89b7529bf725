"""What HuggingFace's files call the tensors of model.py. `{}` is the number of a layer."""
import re

NAMES = {
    "bert": {
        "encoder.word": "bert.embeddings.word_embeddings",
        "encoder.position": "bert.embeddings.position_embeddings",
        "encoder.token_type": "bert.embeddings.token_type_embeddings",
        "encoder.norm": "bert.embeddings.LayerNorm",
        "encoder.layers.{}.query": "bert.encoder.layer.{}.attention.self.query",
        "encoder.layers.{}.key": "bert.encoder.layer.{}.attention.self.key",
        "encoder.layers.{}.value": "bert.encoder.layer.{}.attention.self.value",
        "encoder.layers.{}.attention_output": "bert.encoder.layer.{}.attention.output.dense",
        "encoder.layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layers.{}.intermediate": "bert.encoder.layer.{}.intermediate.dense",
        "encoder.layers.{}.output": "bert.encoder.layer.{}.output.dense",
        "encoder.layers.{}.output_norm": "bert.encoder.layer.{}.output.LayerNorm",
        "encoder.pooler": "bert.pooler.dense",
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
        "next_sentence": "cls.seq_relationship",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    "distilbert": {
        "encoder.word": "distilbert.embeddings.word_embeddings",
        "encoder.position": "distilbert.embeddings.position_embeddings",
        "encoder.norm": "distilbert.embeddings.LayerNorm",
        "encoder.layers.{}.query": "distilbert.transformer.layer.{}.attention.q_lin",
        "encoder.layers.{}.key": "distilbert.transformer.layer.{}.attention.k_lin",
        "encoder.layers.{}.value": "distilbert.transformer.layer.{}.attention.v_lin",
        "encoder.layers.{}.attention_output": "distilbert.transformer.layer.{}.attention.out_lin",
        "encoder.layers.{}.attention_norm": "distilbert.transformer.layer.{}.sa_layer_norm",
        "encoder.layers.{}.intermediate": "distilbert.transformer.layer.{}.ffn.lin1",
        "encoder.layers.{}.output": "distilbert.transformer.layer.{}.ffn.lin2",
        "encoder.layers.{}.output_norm": "distilbert.transformer.layer.{}.output_layer_norm",
        "transform": "vocab_transform",
        "transform_norm": "vocab_layer_norm",
        "bias": "vocab_projector.bias",
        "pre_classifier": "pre_classifier",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
}
ARCHITECTURES = {
    ("bert", "encoder"): "BertModel", ("distilbert", "encoder"): "DistilBertModel",
    ("bert", "pretraining"): "BertForPreTraining", ("distilbert", "pretraining"): "DistilBertForMaskedLM",
    ("bert", "classification"): "BertForSequenceClassification",
    ("distilbert", "classification"): "DistilBertForSequenceClassification",
    ("bert", "span"): "BertForQuestionAnswering", ("distilbert", "span"): "DistilBertForQuestionAnswering",
}
TIED_DECODER = {"bert": ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
                "distilbert": ("vocab_projector.weight", None)}


def published_name(model_type, ours):
    """'encoder.layers.3.query.weight' -> 'bert.encoder.layer.3.attention.self.query.weight'."""
    number = re.search(r"\.(\d+)\.", ours)
    generic = re.sub(r"\.\d+\.", ".{}.", ours)
    stem, _, leaf = generic.rpartition(".")
    theirs = NAMES[model_type][stem] + "." + leaf if stem else NAMES[model_type][leaf]
    return theirs.format(number.group(1)) if number else theirs


def is_head(name, model_type):
    """Is this published name one of a task's own layers, which a model for another task has no place for? The pooler
    and a decoder of its own count as such."""
    heads = ("encoder.pooler", "transform", "transform_norm", "bias", "next_sentence", "pre_classifier", "classifier",
             "span")
    published = [NAMES[model_type][ours] for ours in heads if ours in NAMES[model_type]]
    return name in (*published, TIED_DECODER[model_type][0]) or name.startswith(tuple(head + "." for head in published))
