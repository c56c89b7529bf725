"""distill.py: losses against the paper's reference code and a float64 computation by hand; the chunked vocabulary."""
import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from model import ModelConfig, build

BERT = ModelConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                   max_position_embeddings=16, hidden_dropout_prob=0.0, attention_dropout_prob=0.0,
                   classifier_dropout=0.0, initializer_range=0.3)
DISTILBERT = replace(BERT, model_type="distilbert", type_vocab_size=0)
KINDS = ["pretraining", "classification", "span"]


def make(kind="pretraining", seed=0, config=BERT, num_labels=3):
    torch.manual_seed(seed)
    model = build(config, kind, num_labels)
    if kind == "pretraining":
        torch.nn.init.normal_(model.bias)
    return model.eval()                                         # (no dropout: micro-batches draw different numbers)


def make_batch(kind="pretraining", rows=6, length=10, seed=5):
    """Rows of different lengths; every label of every kind, none of them in the padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    lengths[0] = length
    real = torch.arange(length) < lengths[:, None]
    batch = {"input_ids": torch.randint(97, (rows, length), generator=generator), "attention_mask": real.long(),
             "token_type_ids": torch.randint(2, (rows, length), generator=generator)}
    if kind == "pretraining":
        chosen = real & (torch.rand(rows, length, generator=generator) < 0.4)
        chosen[:, 0] = True
        batch["labels"] = torch.where(chosen, torch.randint(97, (rows, length), generator=generator), -100)
        batch["next_sentence_label"] = torch.randint(2, (rows,), generator=generator)
    elif kind == "classification":
        batch["labels"] = torch.randint(3, (rows,), generator=generator)
    else:
        for name in ("start_positions", "end_positions"):
            batch[name] = (torch.rand(rows, generator=generator) * lengths).long()
    return batch


def inputs_of(batch):
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def loss_of(student, teacher, batch, **options):
    return distill.loss(student, teacher, batch, distill.denominators([batch]), **options)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(left, right, tolerance=2e-6):
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] is None) == (right[name] is None), name
        if left[name] is not None:
            difference, size = float((left[name] - right[name]).abs().max()), float(right[name].abs().max())
            assert difference <= tolerance * max(1, size), name


# ---------------------------------------------------------------------------------------------------------------------
# By hand, in float64

def softened(logits, temperature):
    """Log-probabilities over the last dimension."""
    logits = np.asarray(logits, np.float64) / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(student, teacher, temperature):
    """T^2 sum p (log p - log q), one number for each row."""
    p, q = softened(teacher, temperature), softened(student, temperature)
    return temperature ** 2 * (np.exp(p) * (p - q)).sum(-1)


def cross_entropy(logits, labels):
    return -np.take_along_axis(softened(logits, 1), np.asarray(labels)[..., None], -1)[..., 0]


def all_logits(model, batch):
    """Every logit of the model as float64 arrays; a pre-training model's at every position."""
    with torch.no_grad():
        if model.kind != "pretraining":
            outputs = model(*inputs_of(batch))
            return [out.double().numpy() for out in (outputs if model.kind == "span" else [outputs])]
        everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        features, sentence = model(*inputs_of(batch), everywhere)
        weight, bias = model.vocabulary()
        logits = (features.double() @ weight.double().T + bias.double()).view(*everywhere.shape, -1)
        return [logits.numpy(), None if sentence is None else sentence.double().numpy()]


def span_by_hand(student, teacher, batch, temperature):
    """Mean over rows of (hard, soft), start and end half each, every row cut to its real tokens."""
    hard = soft = 0.0
    lengths = batch["attention_mask"].sum(1).tolist()
    for i, name in enumerate(("start_positions", "end_positions")):
        for row, length in enumerate(lengths):
            hard += cross_entropy(student[i][row, :length], int(batch[name][row])) / 2 / len(lengths)
            if teacher is not None:
                soft += divergence(student[i][row, :length], teacher[i][row, :length], temperature) / 2 / len(lengths)
    return float(hard), float(soft)


def terms_by_hand(student, teacher, batch, temperature, kd_positions="all"):
    """The parts that distill.loss should report."""
    logits = all_logits(student, batch)
    taught = all_logits(teacher, batch) if teacher else None
    if student.kind == "span":
        hard, soft = span_by_hand(logits, taught, batch, temperature)
        return {"hard": hard, **({"kd": soft} if teacher else {})}
    if student.kind == "classification":
        terms = {"hard": cross_entropy(logits[0], batch["labels"]).mean()}
        return {**terms, **({"kd": divergence(logits[0], taught[0], temperature).mean()} if teacher else {})}
    labels = batch["labels"].numpy()
    masked, real = labels != -100, batch["attention_mask"].numpy().astype(bool)
    terms = {"mlm": cross_entropy(logits[0][masked], labels[masked]).mean()}
    if teacher:
        where = real if kd_positions == "all" else masked
        terms["kd"] = divergence(logits[0][where], taught[0][where], temperature).mean()
    if logits[1] is not None:
        terms["nsp"] = cross_entropy(logits[1], batch["next_sentence_label"].numpy()).mean()
        if teacher:
            terms["kd_nsp"] = divergence(logits[1], taught[1], temperature).mean()
    return terms


def total_of(terms, kd_weight):
    """L = (1 - kd_weight) L_hard + kd_weight L_kd; labels only where there is no teacher."""
    soft = sum(value for name, value in terms.items() if name.startswith("kd"))
    hard = sum(value for name, value in terms.items() if not name.startswith("kd"))
    return (1 - kd_weight) * hard + kd_weight * soft if any(name.startswith("kd") for name in terms) else hard


def assert_loss(result, terms, kd_weight):
    total, parts = result
    assert parts.keys() == terms.keys() and all(type(value) is float for value in parts.values())
    for name, value in terms.items():
        assert parts[name] == pytest.approx(float(value), rel=2e-5, abs=2e-6), name
    assert float(total.detach()) == pytest.approx(float(total_of(terms, kd_weight)), rel=2e-5, abs=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's reference code

def numbers(shape, text):
    """Ten-thousandths, as int32 in base64."""
    return torch.tensor(np.frombuffer(base64.b64decode(text), "<i4").reshape(shape) / 1e4, dtype=torch.float32)


REFERENCE_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
# Inputs and results of IntelLabs/Model-Compression-Research-Package at 0dbbb2d, by temperature. MLM: mean over
# positions that are not padding; next sentence and classification: mean over rows; span: mean over rows, half start and
# half end, padding left in.
REFERENCE = {
    1.0: {
        "mlm_student": numbers((3, 5, 11),
            "JcD//5nU//9qv///rZr//5Tw//+ptP//5tf//0zNAACuxf//hk4AAO/r//86JQAACMz//6vj//+xjv//gOz//9NAAACTVwAAHk4AAD5X"
            "AAAWVAAA0/r//0cKAAAiDQAAYwQAADATAAB+SgAAwxsAAJIQAACd5f//YOT//67q///VZwAAjF0AADad//8P3v//pFX//1Wp//+LYP//"
            "mwIAAJar////uv//GkwAAP8rAADiqP//pAsAAKqq//9Rjv//atr//3Kr///SGAAAnNYAANQcAAB7aAAASLj//+K0//+a////pBsAADHk"
            "//8dxP//miEAALELAADI7P//p43//+gtAABbpf//ek4AABbT//+6LQAATJX//9SX//9VCwAAjWEAABRO///bYQAAtSoAAJIBAAAxhP//"
            "4L4AAPA7AAACMQAAU+n//y4vAAAZXwAAVRIAAO/d///b7v//lXn//ygHAABSQQAAvnYAAKL0//98TP//wTsAAPNGAACTPv//XhQAACcI"
            "AAAt7P//Y/T//9rS//9/gf//fer//xLj//8FQwAAR47//wbJ//+Kzv//PU4AABU5AAAXT///sJj//2WEAAAL6P//XGUAAEbl//+hMwAA"
            "ddf//wo9AAARkf//xb7//57R//9FZQAAID0AAOK1///tLQAAkycAAMqc//9c8v//SVcAALxDAAAxWwAAzQkAAMlRAABSMQAAgS8AADfp"
            "//9D5P//kzEAADkQAADiSwAAovX///nv//8IBAAAVvr//9Cc///GcP//1jsAAKceAAAbcAAAGSgAAJtRAADx/v//p0AAAHMLAAAKlf//"
            "BLv//71XAAC5+P//QSYAACnv//8iWwAAa6T//0uV///hsv//"),
        "mlm_teacher": numbers((3, 5, 11),
            "aEkAAH3q///3J///RzkAAFQ0AADtNQAAJYoAAHw3//9m6v//uD3///+t//8UPwAAcDAAAL2o//9zLAAAGhwAAKum//+wGQAAzhQAAJUC"
            "AABoSQAAzWcAAJ8FAAByUgAAkJAAANvx///wJwAAZQUAALGP///05v//bYwAAEYLAAAdrf//NDIAAP+Q//9ckP//qur//xoBAAAf4///"
            "yG8AABHR//95TAAAMxUAAE1JAAArYQAAR8///3St//+fxP//0Hf//4Ko///A////YXMAABz9//8dpv//q6H//6Wp///Ukv//We3//9zc"
            "//+YAwAA2nv//7OU//9tl///1mYAALYEAABIUgAAyP3//4knAABReAAAOdX//0nB//8rq///4I///6VGAAB58///3C4AAMjO//9EDgAA"
            "aOP//+uS//8R4f//eHcAADUFAAAmFgAA2Zf//1aa///HTAAAbgsAAEUXAADgnv//s9D//6oNAACsDAAAStH//7WGAAC43///N+7//5TF"
            "//+DKgAAcI7//0ahAABBi///VgIAACuCAABQoP//xNb//4F7AADQ1///3/b//6sZAAB5IwAAQBQAACU8AADOjv//J9T//0QZAADIzf//"
            "pcD//zfo//+mWAAATEYAAPzc///bUgAA3ZP//2SV//8Zh///TEz//+gnAAAYu///laj//zg6AAAAAQAACJgAAMqI///2JAAA70sAAMUI"
            "AABrjf//ee3//0yL//88DgAAN5f//1IQAACCnv//Bx8AADT6AAANLAAAt53//5yd//+JrwAAGbL//wOw//+e9f//Zcz//1Pg//8cIQAA"
            "HnEAAFBOAACVUAAAdUsAALwUAADaPgAAcyYAAMzq//+5r///"),
        "nsp_student": numbers((3, 2),
            "Gfv//28OAADiPAAARPX//ydEAADy/v//"),
        "nsp_teacher": numbers((3, 2),
            "9QkAAODl//9Xi///U5n//6CcAABpFQAA"),
        "class_student": numbers((3, 3),
            "zQcAADve//8oEwAApE3//0nv//8xwv//cLL///1WAACrl///"),
        "class_teacher": numbers((3, 3),
            "90QAAJCo//9cGgAA7GcAALzi//8fTQAARUEAANii//8YzP//"),
        "start_student": numbers((3, 5),
            "qcz//7cfAADTFQAAW28AAH6D//8bHwAAaQAAAEDZ///jzv//9S0AALd0AABRCwAAO8v//22a//94+P//"),
        "start_teacher": numbers((3, 5),
            "bBQAAJkgAADvgP//rAAAAPBsAACz+///PHj//3MHAACOBwAAIUEAAPbQ///PrQAA61cAADG5//9IgQAA"),
        "end_student": numbers((3, 5),
            "Sl0AADjH///axf//21kAAKtIAACkdP//3EEAAN74//8RXP//Bs///4z5//+v3///LwMAAIGYAABbtf//"),
        "end_teacher": numbers((3, 5),
            "vHEAAAIeAAAj9///sK3//0vp//+nq///F+j//7+D//9vSAAAOBoAAMmF//9XXQAAsQgAANLj//+u9///"),
        "mlm": 2.92139721, "nsp": 0.28603867, "mlm_plus_nsp": 3.20743585, "classification": 2.28604603,
        "span_without_padding_excluded": 2.69361305},
    2.0: {
        "mlm_student": numbers((3, 5, 11),
            "QSYAAE8sAAAneQAAAeT//w81AADn/P//OPX//xPd//+8XAAAf+v//9JMAAABQAAA4uv//5CIAAADZ///8vb//7Ww//9gFAAAzNP//7P/"
            "///vh///cwoAAJBo//9/MgAAWxoAAAZSAADMm///Ser//6wcAADNu///uYMAANAYAACOaf//9+3//zkrAAAc6///CQ8AAAVZAABQBgAA"
            "nMP//+DM//+iuf//mjYAAOa9//8gyP//HgQAANLH///dXgAAOjEAAJUeAAB25///wBIAAJVfAAD6hP//lnX//8VWAAAkCAAAxPX//0IE"
            "AABBo///eNL//4owAADXmf//eZP//wro//9SKgAAvfb//wdTAACQpf//1TwAAILW///QaQAAt4wAAJ91//+Ox///GWEAAEYGAABoCAAA"
            "XAIAAJ5H//+gVQAAAgwAAIdzAACjLwAAtrj//8ax///tFgAATA0AANgWAAB9+f//jSgAADpXAACQRQAAuML//yYWAACaGwAANNP//9b/"
            "//+dCAAAz7P//6oVAACAIwAAI7T//zADAAC4QgAACHAAAJbs//+ZSv//ytoAADIqAACvs///A+3//5Pv//8qVQAAQ6H//9ZtAAA+3f//"
            "vub//78qAAAbCAAAzCEAADj8///mAwAAWnj//4fFAAD/6///hLL//8v9//8B6f//0FcAAGGZ//8rsv//B9T//3vq//81LgAATnUAABrg"
            "///3egAAkeH//zchAAB/3P//RD0AAGSL//+JPgAAoS0AAGbt//8wJgAADtv//zjn//+J/v//eOz//zn0//+I5v//NW3//49FAABbHwAA"
            "LNr//xr9//8hs////gkAACz4//9nTgAAlOr//8qA//+uFgAA"),
        "mlm_teacher": numbers((3, 5, 11),
            "xQkAAApWAADdzwAAbuv//xCLAAAUCgAAmTgAAAAiAABKqP//rZz//xbW//824///yeH//6/f//8BewAAzvX//7z5///z0v//SIH//70s"
            "AACtq///5BEAAEKCAAAQ2f//dMf//yjk///ilv//2DMAABEBAADrcQAAP9L///CK//86JwAA/dz//wP1///mVQAAO+///2JtAACeQwAA"
            "cJH//5ii///96///csL//8Xm//+A1v//ddL//44tAAAiKAAAki0AALlVAACoMAAAuUIAAKYXAACnZf//2Nr//44wAAA5yf//1rMAADar"
            "AADkRgAAXYX//w4sAAAfOQAAvZb//+rd///t0v//ekoAAMMKAAAw9f//d6sAAMf9///Q0P//GQQAAA0nAADV+///Wlb//3b3//88m///"
            "juD//8Kz///E0P//wwYAAPXd//8+IgAAzf///8tEAABRbQAA+fX//y4nAAA3DgAApuj//x8AAABs+f//F+X//8EzAADEDAAAxrL//9Jr"
            "//9xrwAAciMAAMnP//9OOgAABAYAACRaAAB/1P//cUX//5Kw//9BiP//SKT//9EcAACIGgAA3QQAACin//9N3///Vfj//5H2//8H2///"
            "zUQAAOdmAABTsf//TAkAAPTY//+AfgAAuJD//2jr//8pNwAAZfH//5ft//8dJAAAA1gAAFYaAACUOgAACPP//zGl///8NgAA1xgAADfM"
            "//9J9f//b3z//6PF//+ksP//tSgAAD3u//84nAAA5BsAACUnAADCCQAASOP//4Pz//8j+v//hDQAADiV//+Ap///AKD//4oIAAB4tf//"
            "a5X//8fK///O6v//m3AAALtNAACV6f//tBEAACI6AAC4GQAA"),
        "nsp_student": numbers((3, 2),
            "AUIAAPl+AAD5KQAA3v3//5am///bv///"),
        "nsp_teacher": numbers((3, 2),
            "oIkAAHFTAADPLQAAJaEAAFTY///aXf//"),
        "class_student": numbers((3, 3),
            "63b//zy6//8NEgAAidT//4EDAAAS/P//CYL//y1Z//81AAAA"),
        "class_teacher": numbers((3, 3),
            "5isAADslAACN6f//fPf///hjAAA75P//Rdj//2BzAADEEgAA"),
        "start_student": numbers((3, 5),
            "YqAAAFRKAAAI/v//J4r//+3O///kIAAAIxoAAPvc//9j/P//smoAAA26//+D////Oer//7xLAACpxP//"),
        "start_teacher": numbers((3, 5),
            "P8j//5bu//+y6f//xMv//97M//8Riv//KDEAALFr//94LQAAyhgAAKkMAABAXgAAOgQAACDn//9IEAAA"),
        "end_student": numbers((3, 5),
            "iy4AAPy5//9cvf//7QsAANKY//+/1///VN3//2yh///DOAAAkpYAAO4/AADmMwAA3cH//5aw///rR///"),
        "end_teacher": numbers((3, 5),
            "QAsAAHkIAADJYgAAnkYAANFSAAB2AAAA3TsAABpdAAD/RQAAQicAALUXAABb0///ofz//8LZ//9gdf//"),
        "mlm": 2.84801030, "nsp": 1.39024174, "mlm_plus_nsp": 4.23825216, "classification": 2.59008574,
        "span_without_padding_excluded": 2.07421875},
    5.5: {
        "mlm_student": numbers((3, 5, 11),
            "cJEAAJdGAAClaAAAyV0AAKxOAACWEgAANt///9wpAAAS4v//DqoAAFtLAADeJQAA03f//xWp//+E+///63///9+7//949P//lu3//4Mq"
            "AAA52P//YLP//3hkAAAPQAAA/2sAAKFCAADcSwAAsDQAAOfm///ThAAAaxgAAGK3//9Lyf//jVEAAL8HAAAnqv//fQQAAMBFAAD2jwAA"
            "nKn//1fX//9gPgAAddH//6XM//8QMwAA4UgAAAJm//8IhwAAQjD//0FrAAARS///M8X//68jAAC6CQAAJej//7YGAABMSAAA1qj//3qR"
            "AACLrv//+U0AAL0mAAA19f//lK///2Xm//8C0f//zg0AAExz//+H8///6ZD//+tlAABjZ///04YAABphAAA68f//fDMAAFR2///pAwAA"
            "49f//2/f///rkv//gVQAAPXw//9h9P//NYD//7mO//83/P//RG8AAOZvAAAaw///mgQAAMkzAAB8rgAA5Mz//0nQ//+Da///IuP//7tQ"
            "AADMvv//7lgAAInZ//8Buf//lcD//6sgAABBo///M57//y6nAABfSgAAHK8AAAby///txP//bAsAAN0DAAD2zf//EC8AALzP//+hmv//"
            "gZsAAPJPAADUGgAANsr//wEJAAA7DwAAfdP//3mKAABJIQAAUwcAACk4AADJCQAASWAAAHOJAAByt///7aT///lgAAAsJAAA6s0AADsk"
            "AAA9SQAAskwAAJ1f//8X6P//FzMAAHdPAADU2f//rAIAAEbh//9nCgAAh/n//39+//+8v///74YAAO3h//85cAAAaAYAAAHE//8Jiv//"
            "Kuf//1/R//93CgAAsHj//5re///L0f//U+j//wgIAAB5cgAA"),
        "mlm_teacher": numbers((3, 5, 11),
            "aD0AAA6a//9J+f//RDwAAO+x///T/v//S3oAAE2y///nqwAAiDQAAC+yAAC9AAAAcQ8AAA4VAAAtqP//b7D//7cPAADh5v//BlEAAJTS"
            "//9/hwAAZqb//yDU//8Siv//k9j//5pzAABc2v//OA0AAJDg//92MAAA33YAANwYAADMDAAAl1AAAGR0//9o8///yVAAAA0TAAAIHwAA"
            "aaH///4bAABFKAAAcbf//z3q///Eu///SAQAAPur//8TUgAAQksAAOnt///EXQAAgnAAAHtC//8v4P//Zrr//xmp//+UMgAAzQUAAEr2"
            "//95cwAAKgUAAIthAAD0KwAAeLX//9/5//+U/v//h5oAADq///8PFAAAIPb///EMAAC9p///nDX//wA5AAD2NQAAziIAABeH//8Xtv//"
            "KfD//5QzAADq/f//3/X//775//9vOwAAzTcAAJ/2//+lt///XPv//7Dx//93HQAAtVwAAKBuAACw1f//TEcAAKz5///J3P//Is///7xO"
            "AABjxf//B9z//9E2AABlEwAAhwkAAHkBAABr7P//EgEAACvx///7LQAAuRcAAMm1//+m+v//2eH//6D1//8p+f//vfYAAFgKAACHkP//"
            "VUgAAF0yAACZdgAAAjkAANQZAADN5v//2hIAAMXT//+4oP//u2n//1PK//9tNwAAxXUAAEbO//8Hz///cRgAAFcMAAD3mv//nT8AAMiQ"
            "//+o2P//FQ8AAIUEAABbtf//lMT//1wcAACCGwAAWej//2MNAAAB2v//XGoAAKJDAAD9s///QsL//6K2///hMAAAeLD//6BHAACjpf//"
            "W////7Wy//8JCAAAPT0AAO3l//+g6v//J+7//2+LAACvIQAA"),
        "nsp_student": numbers((3, 2),
            "1Ov//8ni///DcP//9D4AAMIlAACi+v//"),
        "nsp_teacher": numbers((3, 2),
            "gzsAACIVAAB/HgAAMl0AAACW//++BQAA"),
        "class_student": numbers((3, 3),
            "c47//0oPAAB3Qf//z6f//4vK//8rBAAA6SMAAKXp//8e0v//"),
        "class_teacher": numbers((3, 3),
            "M10AAPfg//9/0f//3MD//4UfAAA2DQAAd/r//y7X//8ALwAA"),
        "start_student": numbers((3, 5),
            "e7v//5fe///u5P//tfUAAErM//9nuf//2kcAADjk///jFQAAsyIAAMUmAAA02v//XKb//1ROAADfhgAA"),
        "start_teacher": numbers((3, 5),
            "vdv//47b//9l+///vn0AABNS//9R0P//ixsAAEqm//8Ylv//slIAAALk//9Nwv//ku7//y+ZAACWZP//"),
        "end_student": numbers((3, 5),
            "njD//xEQAACk6f//k1T//zzt//+Rs///jicAAJmQAACdwP//XMYAAEHJ//9m1v//Gs8AAK2BAABcGQAA"),
        "end_teacher": numbers((3, 5),
            "zeb///7R//+it///YGT//x8WAABZqQAAEqX///q9//83/f//22EAAP0zAABQXwAA8B4AACnm//8opf//"),
        "mlm": 3.51825762, "nsp": 1.18533909, "mlm_plus_nsp": 4.70359659, "classification": 1.87840879,
        "span_without_padding_excluded": 4.25679779},
}


@pytest.mark.parametrize("temperature", REFERENCE)
def test_equals_the_papers_reference_code(temperature):
    case, real = REFERENCE[temperature], REFERENCE_MASK.bool()
    square = replace(BERT, vocab_size=11, hidden_size=11, num_attention_heads=1)
    student, teacher = make(config=square), make(config=square)
    with torch.no_grad():                                       # a decoder that hands features on: they are the logits
        for model in (student, teacher):
            model.encoder.word.weight.copy_(torch.eye(11))
            model.bias.zero_()
    labels = torch.full((int(real.sum()),), -100)
    _, mlm, kd = distill.vocabulary_loss(student, teacher, case["mlm_student"][real], case["mlm_teacher"][real], labels,
                                         1.0, 1.0, temperature)
    sentence = float(distill.soft_loss(case["nsp_student"], case["nsp_teacher"], temperature)) / 3
    classes = float(distill.soft_loss(case["class_student"], case["class_teacher"], temperature)) / 3
    assert mlm == 0 and kd / int(real.sum()) == pytest.approx(case["mlm"], abs=1e-5)
    assert sentence == pytest.approx(case["nsp"], abs=1e-5)
    assert kd / int(real.sum()) + sentence == pytest.approx(case["mlm_plus_nsp"], abs=1e-5)
    assert classes == pytest.approx(case["classification"], abs=1e-5)


@pytest.mark.parametrize("temperature", REFERENCE)
def test_span_loss_equals_the_reference_where_nothing_is_padding(temperature):
    """And with padding, where the reference leaves it in and we do not, the computation by hand."""
    case = REFERENCE[temperature]
    student, teacher = ((case[f"start_{who}"], case[f"end_{who}"]) for who in ("student", "teacher"))
    positions = {"start_positions": torch.tensor([3, 1, 0]), "end_positions": torch.tensor([4, 2, 3])}
    _, kd = distill.span_loss(student, teacher, {**positions, "attention_mask": torch.ones(3, 5)}, temperature)
    assert float(kd) / 3 == pytest.approx(case["span_without_padding_excluded"], abs=1e-5)
    batch = {**positions, "attention_mask": REFERENCE_MASK}
    hard, kd = distill.span_loss(student, teacher, batch, temperature)
    expected = span_by_hand([tensor.numpy() for tensor in student], [tensor.numpy() for tensor in teacher], batch,
                            temperature)
    assert (float(hard) / 3, float(kd) / 3) == pytest.approx(expected, abs=1e-5)
    assert abs(expected[1] - case["span_without_padding_excluded"]) > 1e-3
    assert distill.span_loss(student, None, batch, temperature)[1] is None


# ---------------------------------------------------------------------------------------------------------------------
# The whole loss

@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_computation_by_hand(kind, temperature, kd_weight):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    result = loss_of(student, teacher, batch, temperature=temperature, kd_weight=kd_weight)
    assert_loss(result, terms_by_hand(student, teacher, batch, temperature), kd_weight)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_teacher_only_labels_count(kind):
    student, batch = make(kind), make_batch(kind)
    for kd_weight in (0.0, 0.5, 1.0):
        assert_loss(loss_of(student, None, batch, kd_weight=kd_weight), terms_by_hand(student, None, batch, 2.0), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_papers(kind):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    assert_loss(loss_of(student, teacher, batch), terms_by_hand(student, teacher, batch, 2.0), 0.5)


def test_distillation_at_the_masked_positions_only():
    student, teacher, batch = make(seed=0), make(seed=1), make_batch()
    everywhere = terms_by_hand(student, teacher, batch, 2.0, "all")
    masked = terms_by_hand(student, teacher, batch, 2.0, "masked")
    assert_loss(loss_of(student, teacher, batch, kd_positions="all"), everywhere, 0.5)
    assert_loss(loss_of(student, teacher, batch, kd_positions="masked"), masked, 0.5)
    assert abs(everywhere["kd"] - masked["kd"]) > 1e-3 and everywhere["mlm"] == masked["mlm"]


@pytest.mark.parametrize("kind", KINDS)
def test_distilbert_has_no_next_sentence(kind):
    student, teacher, batch = make(kind, 0, DISTILBERT), make(kind, 1, DISTILBERT), make_batch(kind)
    total, parts = loss_of(student, teacher, batch)
    assert "nsp" not in parts and "kd_nsp" not in parts
    assert_loss((total, parts), terms_by_hand(student, teacher, batch, 2.0), 0.5)
    total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())
    assert_loss(loss_of(student, None, batch), terms_by_hand(student, None, batch, 2.0), 0.0)


def direct_loss(student, teacher, batch, temperature, kd_weight, kd_positions):
    """Pre-training as one would write it with memory to spare: all logits at once, and autograd."""
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)

    def run(model):
        features, sentence = model(*inputs_of(batch), everywhere)
        weight, bias = model.vocabulary()
        return features @ weight.T + bias, sentence

    logits, sentence = run(student)
    hard = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100)
    hard = hard + F.cross_entropy(sentence, batch["next_sentence_label"])
    taught, taught_sentence = (tensor.detach() for tensor in run(teacher))
    where = (batch["attention_mask"] == 1 if kd_positions == "all" else batch["labels"] != -100).flatten()

    def soft(student_logits, teacher_logits):
        p = (teacher_logits / temperature).softmax(-1)
        return temperature ** 2 * (p * (p.log() - (student_logits / temperature).log_softmax(-1))).sum(-1).mean()

    return (1 - kd_weight) * hard + kd_weight * (soft(logits[where], taught[where]) + soft(sentence, taught_sentence))


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 7, 1000])
@pytest.mark.parametrize("kd_positions", ["all", "masked"])
def test_gradients_equal_plain_autograd(kd_positions, rows_per_chunk, monkeypatch):
    """Of every parameter; the word embeddings are input table and decoder at once."""
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", rows_per_chunk * 97)
    teacher, batch = make(seed=1), make_batch()
    student, other = make(seed=0), make(seed=0)
    loss_of(student, teacher, batch, temperature=3.0, kd_weight=0.3, kd_positions=kd_positions)[0].backward()
    direct_loss(other, teacher, batch, 3.0, 0.3, kd_positions).backward()
    assert_same_gradients(gradients(student), gradients(other))
    assert student.encoder.word.weight.grad.abs().max() > 0 and student.bias.grad.abs().max() > 0


def test_nothing_to_learn_from_oneself():
    """KL is 0, and so is its gradient, when teacher and student agree."""
    for kind in KINDS:
        student, teacher, batch = make(kind, 0), make(kind, 0), make_batch(kind)
        total, parts = loss_of(student, teacher, batch, kd_weight=1.0, temperature=2.0)
        assert abs(float(total.detach())) < 1e-5 and abs(parts["kd"]) < 1e-5
        total.backward()
        assert max(float(grad.abs().max()) for grad in gradients(student).values() if grad is not None) < 1e-5, kind


@pytest.mark.filterwarnings("ignore:There is a performance drop")        # of vmap: it takes the steps one by one
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_distillation_is_the_closed_form_at_every_step_of_the_papers_run(temperature):
    """100,000 steps in which a student comes from far away to its teacher: T^2 sum p log(p / q) of each, in float64,
    and for two classes the same from the logits' difference alone."""
    generator = np.random.default_rng(0)
    way = np.linspace(1, 0, 100_000)[:, None]                   # what is left of it
    for classes in (2, 7):
        teacher = generator.normal(0, 3, (1, classes)) + generator.normal(0, 0.5, (100_000, classes))
        student = teacher + way * generator.normal(0, 4, (100_000, classes))
        student, teacher = (logits.astype(np.float32) for logits in (student, teacher))
        ours = torch.vmap(lambda a, b: distill.soft_loss(a, b, temperature))(*map(torch.from_numpy, (student, teacher)))
        q, p = (np.exp(logits.astype(np.float64) / temperature) for logits in (student, teacher))
        q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
        expected = temperature ** 2 * (p * np.log(p / q)).sum(1)
        assert np.abs(ours.numpy() - expected).max() < 1e-4 and abs(float(ours[-1])) < 1e-5
        if classes == 2:
            a, b = (np.subtract(*logits.T.astype(np.float64)) / temperature for logits in (student, teacher))
            two = np.logaddexp(0, -a) - np.logaddexp(0, -b) + (a - b) / (1 + np.exp(b))
            assert np.abs(ours.numpy() - temperature ** 2 * two).max() < 1e-4


def test_temperature_squared_keeps_the_gradients_size():
    """At a high temperature T^2 KL tends to half the squared distance of centred logits over C: its gradient stays."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 9, generator=generator, requires_grad=True)
    teacher = torch.randn(4, 9, generator=generator)
    difference = student.detach() - teacher
    limit = (difference - difference.mean(1, keepdim=True)) / 9
    sizes = []
    for temperature in (1.0, 2.0, 5.0, 20.0, 500.0):
        gradient, = torch.autograd.grad(distill.soft_loss(student, teacher, temperature), student)
        sizes.append(float(gradient.norm()))
    torch.testing.assert_close(gradient, limit, atol=2e-3, rtol=2e-2)
    assert max(sizes) / min(sizes) < 2


# ---------------------------------------------------------------------------------------------------------------------
# Chunks

def plain_vocabulary_loss(features, weight, bias, teacher_logits, labels, hard_scale, kd_scale, temperature):
    logits = features @ weight.T + bias
    p = (teacher_logits / temperature).softmax(-1)
    kd = temperature ** 2 * (p * (p.log() - (logits / temperature).log_softmax(-1))).sum()
    return hard_scale * F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + kd_scale * kd


@pytest.mark.parametrize("rows_at_once", [0.5, 3, 100])
@pytest.mark.parametrize("rows_per_chunk", [0.5, 1, 2, 3, 5, 9, 10, 11, 100])
def test_chunks_equal_the_whole(rows_per_chunk, rows_at_once, monkeypatch):
    """Ten rows in chunks that do and do not divide them: value, and gradient for features, weight and bias."""
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", int(rows_per_chunk * 97))
    monkeypatch.setattr(distill, "CACHED_ELEMENTS", int(rows_at_once * 97))
    student, teacher, generator = make(seed=0), make(seed=1), torch.Generator().manual_seed(2)
    features = torch.randn(10, 24, generator=generator, requires_grad=True)
    teacher_features = torch.randn(10, 24, generator=generator)
    labels = torch.tensor([3, -100, 96, -100, -100, 0, 5, -100, -100, -100])
    total, hard, kd = distill.vocabulary_loss(student, teacher, features, teacher_features, labels, 0.7, 0.2, 2.0)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, *student.vocabulary())]
    taught = (teacher_features @ teacher.encoder.word.weight.T + teacher.bias).detach()
    expected = plain_vocabulary_loss(*leaves, taught, labels, 0.7, 0.2, 2.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert 0.7 * hard + 0.2 * kd == pytest.approx(float(expected.detach()), rel=1e-5)
    (3 * total).backward()
    (3 * expected).backward()
    for ours, plain in zip((features, *student.vocabulary()), leaves):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        quiet = distill.vocabulary_loss(student, teacher, features, teacher_features, labels, 0.7, 0.2, 2.0)
    assert not quiet[0].requires_grad
    torch.testing.assert_close(quiet[0], total.detach())
    assert quiet[1:] == pytest.approx((hard, kd))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 60.0])
def test_closed_forms_equal_float64_autograd(spread, temperature):
    """Value and gradient of both terms, up to logits of which most have a probability that float32 cannot hold."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (spread * torch.randn(7, 500, generator=generator) for _ in range(2))
    labels = torch.randint(500, (7,), generator=generator)
    leaf = student.double().requires_grad_()
    hard = F.cross_entropy(leaf, labels, reduction="sum")
    soft = temperature ** 2 * F.kl_div(
        (leaf / temperature).log_softmax(-1), (teacher.double() / temperature).log_softmax(-1), reduction="sum",
        log_target=True)
    for expected, (value, gradient) in (
            (hard, distill.cross_entropy_and_gradient(student, labels)),
            (soft, distill.divergence_and_gradient(student.clone(), teacher.clone(), temperature))):
        rounding = 7 * 1e-6 * temperature ** 2              # of log Z in float32, in each of seven rows
        assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5, abs=rounding)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_labels_and_no_positions(with_teacher):
    """A micro-batch may happen to have no masked token; the others of the step have."""
    student, teacher, batch = make(seed=0), make(seed=1) if with_teacher else None, make_batch()
    count = distill.denominators([batch])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for kd_positions in ("all", "masked"):
        total, parts = distill.loss(student, teacher, batch, count, kd_positions=kd_positions)
        total.backward()
        assert parts["mlm"] == 0 and torch.isfinite(total)
        assert all(torch.isfinite(grad).all() for grad in gradients(student).values() if grad is not None)


class Shapes(TorchDispatchMode):
    """The shapes of everything that any operation returns, backward passes included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.append(tuple(tensor.shape))
        return result

    def logits(self):
        """Rows of the tensors as wide as the vocabulary, 97 or, as products take it, 112 (24 rows: the decoder itself,
        transposed)."""
        wide = [shape for shape in self.seen if len(shape) > 1 and shape[-1] in (97, 112)]
        return [int(np.prod(shape[:-1])) for shape in wide if shape[0] != 24]


def test_no_more_logits_than_one_chunk_ever_exist(monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 5 * 97 + 96)
    student, teacher, batch = make(seed=0), make(seed=1), make_batch()
    assert int(batch["attention_mask"].sum()) > 3 * 5
    with Shapes() as forward:
        total, _ = loss_of(student, teacher, batch)
    with Shapes() as backward:
        total.backward()
    assert max(forward.logits()) == 5                           # 5 rows fit, and are taken
    assert backward.logits() == []                              # no logits were kept: the gradients are there already
    with Shapes() as evaluation, torch.no_grad():
        loss_of(student, None, batch)
    assert max(evaluation.logits()) <= 5


# ---------------------------------------------------------------------------------------------------------------------
# What must not matter

@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_excluded(kind):
    """Other tokens in the padding, or more padding, change neither loss nor gradient."""
    teacher, batch = make(kind, 1), make_batch(kind)
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": torch.where(padding, (batch["input_ids"] + 7) % 97, batch["input_ids"]),
             "token_type_ids": torch.where(padding, 1 - batch["token_type_ids"], batch["token_type_ids"])}
    longer = {name: F.pad(tensor, (0, 3), value=-100 if name == "labels" else 0) if tensor.dim() == 2 else tensor
              for name, tensor in batch.items()}
    results = []
    for variant in (batch, other, longer):
        student = make(kind, 0)
        total, _ = loss_of(student, teacher, variant)
        total.backward()
        results.append((float(total.detach()), gradients(student)))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        assert_same_gradients(gradient, results[0][1])


def test_span_logits_in_the_padding_get_no_gradient():
    batch = make_batch("span")
    padding, generator = batch["attention_mask"] == 0, torch.Generator().manual_seed(0)
    draw = lambda: tuple(torch.randn(6, 10, generator=generator) for _ in range(2))      # noqa: E731
    logits, taught = draw(), draw()
    values, grads = [], []
    for shift in (0.0, 50.0):
        leaves = [(tensor + shift * padding).requires_grad_() for tensor in logits]
        hard, kd = distill.span_loss(leaves, [tensor - shift * padding for tensor in taught], batch, 2.0)
        values.append((float(hard.detach()), float(kd.detach())))
        grads.append(torch.autograd.grad(hard + kd, leaves))
    assert values[0] == values[1]
    for before, after in zip(*grads):
        assert torch.equal(before, after) and not before[padding].any() and before[~padding].any()


@pytest.mark.parametrize("kd_positions", ["all", "masked"])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_of_sixteen_equals_four_of_four(kind, with_teacher, kd_positions):
    """The micro-batches hold different numbers of tokens and labels, so a mean of their means would differ."""
    batch, teacher = make_batch(kind, rows=16), make(kind, 1) if with_teacher else None
    pieces = [{name: tensor[i:i + 4] for name, tensor in batch.items()} for i in range(0, 16, 4)]
    assert len({int(piece["attention_mask"].sum()) for piece in pieces}) > 1
    results = []
    for batches in ([batch], pieces):
        student, count, total, sums = make(kind, 0), distill.denominators(batches), 0.0, {}
        for piece in batches:
            value, parts = distill.loss(student, teacher, piece, count, kd_positions=kd_positions)
            value.backward()
            total += float(value.detach())
            sums = {name: sums.get(name, 0.0) + part for name, part in parts.items()}
        results.append((total, sums, gradients(student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, abs=1e-6)
    assert_same_gradients(results[0][2], results[1][2], tolerance=1e-6)


def test_counts():
    batches = [make_batch(seed=1), make_batch(rows=3, seed=2)]
    assert distill.denominators(batches) == {
        "rows": 9, "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "masked": sum(int(np.sum(batch["labels"].numpy() >= 0)) for batch in batches)}
    assert distill.denominators([make_batch("span")])["rows"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_left_alone(kind):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    names = set(student.state_dict())
    optimizer = torch.optim.AdamW([*student.parameters(), *teacher.parameters()], lr=0.1)
    total, _ = loss_of(student, teacher, batch)
    total.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert set(student.state_dict()) == names and not teacher.training
    fresh = make(kind, 0).state_dict()
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_towards_a_teacher_gets_closer_to_it(kind):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        total, _ = loss_of(student, teacher, batch, kd_weight=1.0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert history[-1] < 0.6 * history[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_close_to_float32(kind, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 4 * 97)       # several chunks share the weight's bfloat16 copy
    teacher, batch, results = make(kind, 1), make_batch(kind), []
    for enabled in (False, True):
        student = make(kind, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total, _ = loss_of(student, teacher, batch)
        total.backward()
        assert total.dtype == torch.float32
        found = [grad.flatten() for grad in gradients(student).values() if grad is not None]
        results.append((float(total.detach()), torch.cat(found)))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert float(F.cosine_similarity(results[0][1], results[1][1], dim=0)) > 0.99
