// Embeddings, layer norm, and the whole encoder made of them, of attention.h and of products.h: last of six files, the
// one that build.py compiles. Activations lie in tiles, as vectors.h draws them.
#include "attention.h"

// ---------------------------------------------------------------------------------------------------------------------
// Between the linear layers

struct Table { const int8_t *values; const float *scales, *plain; };        // int8 rows, or plain float32 ones

// y, float tiles: the sum of `count` embeddings, table i at rows[i * stride + token]. By STRIP features at a time, so
// that what is written stays in the first cache.
static void embed(int64_t count, const Table *tables, const int64_t *rows, int64_t stride, int64_t tokens,
                  int64_t features, float *y) {
    constexpr int64_t STRIP = 64;
#pragma omp parallel for
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t strip = 0; strip < features; strip += STRIP)
            for (int64_t token = tile * T; token < std::min(tokens, (tile + 1) * T); token++) {
                int64_t size = std::min(STRIP, features - strip);
                float sum[STRIP] = {};
                for (int64_t i = 0; i < count; i++) {
                    int64_t row = rows[i * stride + token], at = row * features + strip;
                    if (tables[i].plain)
                        for (int64_t f = 0; f < size; f++) sum[f] += tables[i].plain[at + f];
                    else
                        for (int64_t f = 0; f < size; f++) sum[f] += tables[i].values[at + f] * tables[i].scales[row];
                }
                for (int64_t f = 0; f < size; f++) y[(tile * features + strip + f) * T + token % T] = sum[f];
            }
}

template <class M> static void quantize_on(int64_t tokens, const float *x, uint8_t *q, const Weights next) {
    int64_t features = next.inputs;
#pragma omp parallel for
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t f = 0; f < features; f += 4) {
            ints value[4][4] = {};
            for (int i = 0; i < 4; i++)
                for (int v = 0; v < used_vectors(tokens, tile); v++)
                    value[i][v] = level(*(const floats *)(x + (tile * features + f + i) * T + v * LANES), next);
            store_levels<M>(q + tile * features * T, f, value, next);
        }
}

// Float tiles -> the levels that `next` reads.
extern "C" void quantize(int64_t tokens, const float *x, uint8_t *q, const Weights *next) {
    auto *on = next->portable ? quantize_on<Portable> : quantize_on<Machine>;
    on(tokens, x, q, *next);
}

struct Norm { const float *gain, *bias; float epsilon; };

template <class M, int N>
static void layer_norm_of_tile(int64_t features, const float *x, const float *residual, const Norm norm, float *y,
                               uint8_t *q, const Weights *next) {
    floats sum[N] = {}, squares[N] = {}, rate[N];
    for (int64_t f = 0; f < features; f++)
        for (int v = 0; v < N; v++) {
            int64_t at = f * T + v * LANES;
            floats value = *(const floats *)(x + at);
            if (residual) value += *(const floats *)(residual + at);
            *(floats *)(y + at) = value;
            sum[v] += value;
        }
    for (int v = 0; v < N; v++) sum[v] /= (float)features;          // the mean
    for (int64_t f = 0; f < features; f++)
        for (int v = 0; v < N; v++) {
            floats d = *(const floats *)(y + f * T + v * LANES) - sum[v];
            squares[v] += d * d;
        }
    for (int v = 0; v < N; v++)
        for (int i = 0; i < LANES; i++) rate[v][i] = 1.0f / std::sqrt(squares[v][i] / (float)features + norm.epsilon);
    for (int64_t f = 0; f < features; f += 4) {
        ints value[4][4];
        if (N < 4) std::memset(value, 0, sizeof(value));
        for (int i = 0; i < 4; i++)
            for (int v = 0; v < N; v++) {
                floats *at = (floats *)(y + (f + i) * T + v * LANES);
                *at = (*at - sum[v]) * rate[v] * norm.gain[f + i] + norm.bias[f + i];
                if (next) value[i][v] = level(*at, *next);
            }
        if (next) store_levels<M>(q, f, value, *next);
    }
}

template <class M>
static void layer_norm_on(int64_t tokens, int64_t features, const float *x, const float *residual, const Norm &norm,
                          float *y, uint8_t *q, const Weights *next) {
    typedef decltype(&layer_norm_of_tile<M, 4>) Function;
    static const Function chosen[4] = {layer_norm_of_tile<M, 1>, layer_norm_of_tile<M, 2>, layer_norm_of_tile<M, 3>,
                                       layer_norm_of_tile<M, 4>};
#pragma omp parallel for
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++) {
        int64_t at = tile * features * T;
        chosen[used_vectors(tokens, tile) - 1](features, x + at, residual ? residual + at : nullptr, norm, y + at,
                                               next ? q + at : nullptr, next);
    }
}

// y = LayerNorm(x + residual) over the features of every token, float tiles; and its levels for `next`, unless that is
// null. residual may be null, y may be x or residual. features: a multiple of four.
extern "C" void layer_norm(int64_t tokens, int64_t features, const float *x, const float *residual, const Norm *norm,
                           float *y, uint8_t *q, const Weights *next) {
    auto *on = next && next->portable ? layer_norm_on<Portable> : layer_norm_on<Machine>;
    on(tokens, features, x, residual, *norm, y, q, next);
}

// y: float tiles of the `count` tokens of x at `places`.
static void select_tokens(int64_t count, const int64_t *places, int64_t features, const float *x, float *y) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t f = 0; f < features; f++)
            y[(i / T * features + f) * T + i % T] = x[(places[i] / T * features + f) * T + places[i] % T];
}

// ---------------------------------------------------------------------------------------------------------------------
// The encoder: embeddings and all layers

struct Layer {
    const Weights *query_key_value, *attention_output, *intermediate, *output;
    Norm attention_norm, output_norm;
};
struct Encoder {
    int64_t hidden, heads, tables, layers;
    const Table *table;
    Norm norm;                          // of the embeddings
    const Layer *layer;
    int32_t first_only;                 // of a sequence only the first token's result is wanted
};
enum Part { PRODUCTS, ATTENTION, ATTENTION_OUTPUT, INTERMEDIATE, OUTPUT, EMBEDDINGS, QUANTIZE, LAYER_NORM, PARTS };

// Sequences are taken in groups of at most so many tokens, or of one longer sequence: what a step reads and writes then
// fits the second cache (BERT-Base: less than 1 MB). On tile registers expanding the weights is shared by the tokens.
constexpr int64_t GROUP = 128, GROUP_ON_TILES = 256;

struct Clock {
    double *seconds, begun = omp_get_wtime();
    void stop(Part part) {
        double now = omp_get_wtime();
        seconds[part] += now - begun, begun = now;
    }
};

// `sequences` sequences, of which `starts` begins with the first; ids[table * stride + token]. The result is rows of
// hidden floats, one per token, or per sequence.
static void encode_group(const Encoder &e, int64_t sequences, const int64_t *starts, const int64_t *ids, int64_t stride,
                         float *result, double seconds[PARTS]) {
    int64_t tokens = starts[sequences] - starts[0], hidden = e.hidden, inner = e.layer[0].intermediate->outputs;
    std::vector<int64_t> within(starts, starts + sequences + 1);
    for (int64_t &start : within) start -= starts[0];
    thread_local std::vector<Line> scratch;
    size_t whole = tiles_of(tokens) * T;
    if (scratch.size() < whole / T * (13 * hidden + inner)) scratch.resize(whole / T * (13 * hidden + inner));
    float *x = (float *)scratch.data(), *y = x + whole * hidden, *context = y + whole * hidden;
    uint8_t *q = (uint8_t *)(context + whole * hidden), *wide = q + whole * hidden;
    Clock clock{seconds};
    embed(e.tables, e.table, ids + starts[0], stride, tokens, hidden, x);
    clock.stop(EMBEDDINGS);
    layer_norm(tokens, hidden, x, nullptr, &e.norm, x, q, e.layer[0].query_key_value);
    clock.stop(LAYER_NORM);
    for (int64_t number = 0; number < e.layers; number++) {
        const Layer &layer = e.layer[number];
        bool last = number == e.layers - 1, first_only = last && e.first_only;
        attention(layer.query_key_value, tokens, q, sequences, within.data(), e.heads, hidden / e.heads, first_only,
                  context, seconds + PRODUCTS);
        clock.begun = omp_get_wtime();
        if (first_only) {
            select_tokens(sequences, within.data(), hidden, x, y);
            std::swap(x, y);
            select_tokens(sequences, within.data(), hidden, context, y);
            std::swap(context, y);
            tokens = sequences;
        }
        quantize(tokens, context, q, layer.attention_output);
        clock.stop(QUANTIZE);
        linear(layer.attention_output, tokens, q, y, nullptr, nullptr);
        clock.stop(ATTENTION_OUTPUT);
        layer_norm(tokens, hidden, y, x, &layer.attention_norm, x, q, layer.intermediate);
        clock.stop(LAYER_NORM);
        linear(layer.intermediate, tokens, q, nullptr, wide, layer.output);
        clock.stop(INTERMEDIATE);
        linear(layer.output, tokens, wide, y, nullptr, nullptr);
        clock.stop(OUTPUT);
        layer_norm(tokens, hidden, y, x, &layer.output_norm, x, q,
                   last ? nullptr : e.layer[number + 1].query_key_value);
        clock.stop(LAYER_NORM);
    }
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t f = 0; f < hidden; f++) result[token * hidden + f] = x[(token / T * hidden + f) * T + token % T];
}

// Sequence s is the tokens starts[s] to starts[s + 1] of ids (tables, starts[sequences]). result: float32 rows of
// hidden, one per token, or with first_only per sequence. times[PARTS], or null, grows by the seconds of each part.
// Many groups are shared among the threads whole; of few, each product is.
extern "C" void encode(const Encoder *e, int64_t sequences, const int64_t *starts, const int64_t *ids, int32_t threads,
                       float *result, double *times) {
    omp_set_num_threads(threads);
    const int64_t most = on_tiles(*e->layer[0].query_key_value) ? GROUP_ON_TILES : GROUP;
    std::vector<int64_t> groups = {0};                              // first sequence of each, and the end
    for (int64_t s = 1; s <= sequences; s++)
        if (s == sequences || starts[s + 1] - starts[groups.back()] > most) groups.push_back(s);
    int64_t count = groups.size() - 1;
    double spent[PARTS] = {}, begun = omp_get_wtime();
    auto one = [&](int64_t g) {
        double seconds[PARTS] = {};
        int64_t first = groups[g];
        encode_group(*e, groups[g + 1] - first, starts + first, ids, starts[sequences],
                     result + (e->first_only ? first : starts[first]) * e->hidden, seconds);
        add(seconds, spent, PARTS);
    };
    if (count >= 2 * threads) {
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t g = 0; g < count; g++) one(g);
    } else                              // not an `if` of OpenMP's: it would start new threads for every inner loop
        for (int64_t g = 0; g < count; g++) one(g);
    if (times) share(omp_get_wtime() - begun, spent, times, PARTS);
}

extern "C" int32_t tokens_of_tile() { return T; }
extern "C" const char *instructions() { return NAME; }
extern "C" void set_threads(int32_t count) { omp_set_num_threads(count); }       // of the calling thread
