"""Hyper-parameters, with the source of each number: what differs from the defaults of train.Settings.

RECIPES[name] holds, per kind of training, a dictionary of settings. 'dense' is the fine-tuning of a task teacher;
'dense squad' and the like are laid over it. The first five names are sizes of model.PRESETS, the others are chosen
by --recipe: 'model' there holds for every stage, and 'published' lists models that others published. Where the numbers
come from:

    [1] arXiv 2111.05754, the paper; the appendix with its hyper-parameters was not to be found
    [2] IntelLabs/Model-Compression-Research-Package: research/prune-once-for-all/teacher_preparation.sh and
        student_pruning.sh, and the config/iterative_unstructured_magnitude_90_config.json that they name
    [3] intel/neural-compressor 1.14: optimization_pipeline/prune_once_for_all/fx/README.md under question-answering and
        text-classification; Intel's reproduction for BERT-Base 90 %, all five tasks
    [4] huggingface/optimum-intel 73640b1b0: examples/neural_compressor, README.md of question-answering and
        text-classification; the same for DistilBERT 90 %, SQuAD and SST-2
    [5] neuralmagic/mlperf_inference_results_v2.1: open/NeuralMagic/prune-ofa_large.md; BERT-Large 80 % 1x4
    [6] arXiv 1810.04805 (BERT), appendix A.3: the ranges for fine-tuning a dense model
"""

PAPER = {
    # 100,000 steps of 256 rows, 1 % warm-up, decay 0.01 [2]; rows as long as the model takes them [1]. The learning
    # rate is not published: [2] leaves it at its library's 5e-5, oBERT (arXiv 2203.07259) takes 1e-4 for its teacher.
    "pretrain": dict(steps=100_000, batch_size=256, max_len=512, lr=1e-4, warmup=0.01, weight_decay=0.01),
    # The same again, half the loss from the teacher at temperature 2; of 100,000 steps the ramp takes 50,000, masks are
    # re-selected until 80,000, every 1,000 [2]. BERT-Large: "the same hyper-parameters" [5]; DistilBERT: not published.
    "prune": dict(steps=100_000, batch_size=256, max_len=512, lr=1e-4, warmup=0.01, weight_decay=0.01, kd_weight=0.5,
                  temperature=2.0, ramp_end=0.5, update_end=0.8, update_every=0.01),
    # Task teachers: not published ([3] and [4] download theirs). Epochs, rows and lengths: [2]'s examples; rate: [6].
    "dense": dict(epochs=3, batch_size=32, max_len=128, lr=2e-5, warmup=0.1),
    "dense squad": dict(epochs=2, batch_size=12, max_len=384, lr=3e-5),
    # Everything [3], at 85 % and 1x4 not published; no decay or warm-up there, and only the teacher counts.
    "finetune": dict(epochs=9, batch_size=32, max_len=128, lr=1e-4, warmup=0.0, weight_decay=0.0, kd_weight=1.0,
                     temperature=2.0),
    "finetune squad": dict(epochs=8, batch_size=12, max_len=384, lr=1.5e-4),
    "quantize": dict(epochs=3, batch_size=32, max_len=128, lr=1e-5, warmup=0.0, weight_decay=0.0, kd_weight=1.0,
                     temperature=2.0),
    "quantize squad": dict(epochs=2, batch_size=12, max_len=384),
    "quantize text": dict(epochs=None, steps=1000, dropout=0.0),            # an encoder without a task: ours, not tuned
}
DISTILBERT = {
    **PAPER,
    # [4] for SST-2 and SQuAD; for the other tasks nothing is published, so they have SST-2's numbers. The teacher's
    # share is not published either: [3]'s.
    "finetune": dict(epochs=9, batch_size=32, max_len=128, lr=1.5e-4, warmup=0.0, weight_decay=0.0, kd_weight=1.0),
    "finetune squad": dict(epochs=8, batch_size=12, max_len=384, lr=1.8e-4, warmup=0.05, weight_decay=0.01),
    "quantize": dict(epochs=3, batch_size=32, max_len=128, lr=1e-6, warmup=0.01, weight_decay=0.01, kd_weight=1.0),
    "quantize squad": dict(epochs=2, batch_size=12, max_len=384, lr=1e-5, warmup=0.1, weight_decay=0.0),
}
RECIPES = {
    "tiny": {
        "pretrain": dict(steps=3400, batch_size=32, max_len=48, lr=2e-3, beta2=0.98, weight_decay=0.1, warmup=0.05,
                         dropout=0.0),
        "prune": dict(steps=1000, batch_size=64, max_len=48, lr=4e-3, beta2=0.98, warmup=0.05, dropout=0.0),
        "dense": dict(epochs=8, max_len=64, lr=4e-4, beta2=0.98, warmup=0.1, dropout=0.0),
        "dense mnli": dict(dropout=0.1),
        "finetune": dict(epochs=4, max_len=64, lr=8e-4, beta2=0.98, warmup=0.1, dropout=0.0, kd_weight=0.8),
        "finetune mnli": dict(epochs=8, dropout=0.1),
        "finetune squad": dict(epochs=8, lr=1e-3),
        "quantize": dict(epochs=1, max_len=64, lr=1e-4, beta2=0.98, warmup=0.1, dropout=0.0, kd_weight=0.8),
        "quantize text": dict(epochs=None, steps=100, batch_size=64, max_len=48, kd_weight=0.5),
    },
    "minilm-l6": {
        "pretrain": dict(dropout=0.0, steps=1000, batch_size=32, max_len=128, lr=2e-4),
        "prune": dict(dropout=0.0, steps=500, batch_size=32, max_len=128, lr=5e-4, kd_target="masked"),
        "dense": dict(epochs=1, max_len=128, lr=5e-5, warmup=0.06),
        "dense squad": dict(epochs=1, max_len=384, lr=1e-4),
        "finetune": dict(epochs=1, max_len=128, lr=1e-4, warmup=0.02, kd_weight=1.0),
        "finetune squad": dict(epochs=1, max_len=384, lr=1.5e-4),
        "quantize": dict(epochs=0.25, max_len=128, lr=1e-5, warmup=0.02, kd_weight=1.0),
        "quantize squad": dict(epochs=0.25, max_len=384),
        "quantize text": dict(epochs=None, steps=200, dropout=0.0, lr=1e-4),
    },
    "distilbert-base": DISTILBERT, "bert-base": PAPER, "bert-large": PAPER,

    # The published models. 'model' holds for every stage; 'pretrain' prepares the dense model that was published [1].
    "bert-base-85-unstructured": {
        **PAPER, "model": dict(preset="bert-base", pattern="unstructured", sparsity=0.85),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-base-uncased"),
        "published": ["bert-base-uncased-sparse-85-unstructured-pruneofa"]},
    "bert-base-90-unstructured": {
        **PAPER, "model": dict(preset="bert-base", pattern="unstructured", sparsity=0.9),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-base-uncased"),
        "published": ["bert-base-uncased-sparse-90-unstructured-pruneofa"]},
    # After the paper, of which nothing is published but the models: the numbers are those of the unstructured one.
    "bert-base-80-1x4": {
        **PAPER, "model": dict(preset="bert-base", pattern="1x4", sparsity=0.8),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-base-uncased"),
        "published": ["bert-base-uncased-sparse-80-1x4-block-pruneofa",
                      "bert-base-uncased-squadv1.1-sparse-80-1x4-block-pruneofa"]},
    # Wikipedia and BookCorpus [5]. SQuAD: 32 rows as 4 x 8 of 384 tokens [5]; epochs and rate not published (a recipe
    # that [5] downloads), so [3]'s for BERT-Base.
    "bert-large-80-1x4": {
        **PAPER, "model": dict(preset="bert-large", pattern="1x4", sparsity=0.8),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-large-uncased"),
        "finetune squad": dict(epochs=8, batch_size=32, micro_batch=8, max_len=384, lr=1.5e-4),
        "quantize squad": dict(epochs=2, batch_size=32, micro_batch=8, max_len=384),
        "published": ["bert-large-uncased-sparse-80-1x4-block-pruneofa",
                      "bert-large-uncased-squadv1.1-sparse-80-1x4-block-pruneofa"]},
    # Transfer: not published, so [3]'s for BERT-Base.
    "bert-large-90-unstructured": {
        **PAPER, "model": dict(preset="bert-large", pattern="unstructured", sparsity=0.9),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-large-uncased"),
        "published": ["bert-large-uncased-sparse-90-unstructured-pruneofa"]},
    "distilbert-base-85-unstructured": {
        **DISTILBERT, "model": dict(preset="distilbert-base", pattern="unstructured", sparsity=0.85),
        "pretrain": dict(**PAPER["pretrain"], init="distilbert/distilbert-base-uncased"),
        "published": ["distilbert-base-uncased-sparse-85-unstructured-pruneofa"]},
    "distilbert-base-90-unstructured": {
        **DISTILBERT, "model": dict(preset="distilbert-base", pattern="unstructured", sparsity=0.9),
        "pretrain": dict(**PAPER["pretrain"], init="distilbert/distilbert-base-uncased"),
        "published": ["distilbert-base-uncased-sparse-90-unstructured-pruneofa"]},

    # Ours, for a budget of hours: hidden states in place of the vocabulary (distill.hidden_loss), all zeros at once
    # (prune.reconstruct), ten million tokens: half an hour on two cores that multiply bf16 in tiles.
    "minilm-l6-hidden": {
        "model": dict(preset="minilm-l6"),
        "pretrain": dict(dropout=0.0, steps=2000, batch_size=64, max_len=128, lr=5e-4, beta2=0.98),
        "prune": dict(dropout=0.0, kd_target="hidden", criterion="reconstruction", steps=2400, batch_size=32,
                      max_len=128, lr=5e-4, beta2=0.98, warmup=0.02),
        "dense": dict(epochs=4, batch_size=32, max_len=128, lr=1e-4, warmup=0.06),
        "dense sst2": dict(epochs=3, batch_size=64, lr=8e-5),
        "dense qqp": dict(epochs=3, batch_size=128, lr=2e-4),
        "dense squad": dict(epochs=2, batch_size=48, max_len=384, lr=1.5e-4),
        "finetune": dict(epochs=8, batch_size=32, max_len=128, lr=2e-4, warmup=0.05, kd_weight=1.0),
        "finetune sst2": dict(epochs=5, batch_size=128, lr=4e-4),
        "finetune qqp": dict(epochs=3, batch_size=128, lr=4e-4),
        "finetune squad": dict(epochs=2, batch_size=48, max_len=384, lr=3e-4),
        "quantize": dict(epochs=1, batch_size=32, max_len=128, lr=5e-5, warmup=0.05, kd_weight=1.0),
        "quantize sst2": dict(batch_size=128, lr=1e-4),
        "quantize qqp": dict(batch_size=128, lr=1e-4),
        "quantize squad": dict(epochs=0.5, batch_size=48, max_len=384, lr=1e-4),
        "quantize text": dict(epochs=None, kd_target="hidden", steps=100, batch_size=32, dropout=0.0, lr=1e-4),
    },
}
