"""The loss held against the results of the paper's reference code."""
import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_distill import BERT, make, span_by_hand

import distill

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
