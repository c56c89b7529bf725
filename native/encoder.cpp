// Embeddings, layer norm, attention, and the whole encoder made of them and of products.h: last of four files, the one
// that build.py compiles. Activations lie in tiles, as vectors.h draws them.
#include "products.h"

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
// Attention: softmax(Q K^T / sqrt(D)) V of every sequence and head. Sequences lie one after another without padding.

constexpr int QUERIES = 2 * LANES;      // taken together: two vectors
constexpr int ROWS = T == 64 ? 8 : 4;   // of a product at once: as many sums as there are registers for
struct alignas(T) Line { float x[LANES]; };         // a vector in memory that grows aligned

// The runs of floats that the tokens begin to begin + count have in tiles, D features from `first` on of `features`,
// and in query[D][QUERIES]: copy(place in the tiles, place in query, bytes).
template <class Copy>
static inline void each_run(int64_t features, int64_t first, int64_t D, int64_t begin, int64_t count, Copy copy) {
    for (int64_t d = 0; d < D; d++)
        for (int64_t t = 0; t < count;) {
            int64_t token = begin + t, run = std::min(count - t, T - token % T);
            copy((token / T * features + first + d) * T + token % T, d * QUERIES + t, run * sizeof(float));
            t += run;
        }
}

// out[r] + the sum over k of row r at k times columns[k], which are QUERIES floats; R rows, row_stride apart, their
// entries `step` apart.
template <int R>
static inline void multiply(int64_t depth, const float *rows, int64_t row_stride, int64_t step, const float *columns,
                            floats out[R][2]) {
    floats sum[R][2];
    std::memcpy(sum, out, sizeof(sum));
    for (int64_t k = 0; k < depth; k++) {
        const floats *c = (const floats *)(columns + k * QUERIES);
        floats left = c[0], right = c[1];
        for (int r = 0; r < R; r++) {
            floats value = broadcast(rows[r * row_stride + k * step]);
            sum[r][0] += value * left, sum[r][1] += value * right;
        }
    }
    std::memcpy(out, sum, sizeof(sum));
}

// R features of what QUERIES queries get, `value` being the first of them: probabilities times values, over the tokens
// begin to end, divided by the probabilities' total.
template <int R>
static inline void weigh(const float *value, int64_t features, int64_t begin, int64_t end, const float *probability,
                         const floats reciprocal[2], float *result) {
    floats out[R][2] = {};
    for (int64_t t = begin, next; t < end; t = next) {              // tile by tile
        next = std::min(end, (t / T + 1) * T);
        multiply<R>(next - t, value + t / T * features * T + t % T, T, 1, probability + (t - begin) * QUERIES, out);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) *(floats *)(result + r * QUERIES + v * LANES) = out[r][v] * reciprocal[v];
}

// QUERIES queries of one head, query[D][QUERIES] (already divided by sqrt(D) ln 2), on the tokens begin to end. key and
// value: D features in float tiles of `features`. score: a scratch [end - begin + 2 ROWS][QUERIES]. The result
// replaces the query.
static void attend(int64_t begin, int64_t end, int64_t D, int64_t features, const float *key, const float *value,
                   float *query, float *score) {
    floats top[2] = {broadcast(-1e30f), broadcast(-1e30f)}, total[2] = {};
    int64_t aligned = begin / ROWS * ROWS;          // rows before `begin` and from `end` on are computed and not used
    for (int64_t t = aligned; t < end; t += ROWS) {
        floats out[ROWS][2] = {};
        multiply<ROWS>(D, key + t / T * features * T + t % T, 1, T, query, out);
        std::memcpy(score + (t - aligned) * QUERIES, out, sizeof(out));
        for (int64_t r = std::max<int64_t>(0, begin - t); r < std::min<int64_t>(ROWS, end - t); r++)
            for (int v = 0; v < 2; v++) top[v] = most(top[v], out[r][v]);
    }
    float *probability = score + (begin - aligned) * QUERIES;
    for (int64_t j = 0; j < end - begin; j++)
        for (int v = 0; v < 2; v++) {
            floats *p = (floats *)(probability + j * QUERIES + v * LANES);
            *p = exp2(*p - top[v]);
            total[v] += *p;
        }
    const floats reciprocal[2] = {1.0f / total[0], 1.0f / total[1]};
    int64_t d = 0;
    for (; d + ROWS <= D; d += ROWS)
        weigh<ROWS>(value + d * T, features, begin, end, probability, reciprocal, query + d * QUERIES);
    for (; d < D; d += 4)                           // D is a multiple of four
        weigh<4>(value + d * T, features, begin, end, probability, reciprocal, query + d * QUERIES);
}

// One head, as `attention` below has it: queries, keys and values from levels, into a scratch that stays in cache, then
// attention. seconds[0] and [1] are what the two took.
template <class M>
static void one_head(const Weights &w, int64_t head, int64_t tokens, const uint8_t *q, int64_t sequences,
                     const int64_t *starts, int64_t heads, int64_t D, bool first_only, float *context,
                     double seconds[2]) {
    int64_t longest = 0, whole = tiles_of(tokens) * T;
    for (int64_t s = 0; s < sequences; s++) longest = std::max(longest, starts[s + 1] - starts[s]);
    thread_local std::vector<Line> scratch;                         // grows to what is needed, and is kept
    size_t needed = (3 * D * whole + (D + longest + 2 * ROWS) * QUERIES) / LANES;
    if (scratch.size() < needed) scratch.resize(needed);
    float *y = (float *)scratch.data(), *query = y + 3 * D * whole, *score = query + D * QUERIES;
    double begun = omp_get_wtime();
#if defined(TILES)
    if (on_tiles(w))
        for (int64_t row = 0; row < 3 * D; row += D) {              // query, key, value
            int64_t first = (row / D * heads + head) * D;
            on_registers<M>(w, nullptr, tokens, first, first + D, q, y + row * T, 3 * D * T, nullptr);
        }
    else
#endif
    for (int64_t tile = 0; tile < tiles_of(tokens); tile++)
        for (int64_t row = 0, size; row < 3 * D; row += size) {
            size = std::min<int64_t>(OUTPUTS, D - row % D);
            int64_t first = (row / D * heads + head) * D + row % D;
            on_tile<M>(w, nullptr, tokens, tile, first, first + size, q, y + (tile * 3 * D + row) * T, nullptr);
        }
    double halfway = omp_get_wtime();
    float scale = 1.44269504f / std::sqrt((float)D);
    for (int64_t s = 0; s < sequences; s++) {
        int64_t queries = first_only ? 1 : starts[s + 1] - starts[s];
        for (int64_t begin = 0; begin < queries; begin += QUERIES) {
            int64_t count = std::min<int64_t>(QUERIES, queries - begin), place = first_only ? s : starts[s] + begin;
            std::memset(query, 0, D * QUERIES * sizeof(float));
            each_run(3 * D, 0, D, starts[s] + begin, count,
                     [=](int64_t tile, int64_t to, size_t size) { std::memcpy(query + to, y + tile, size); });
            for (int64_t i = 0; i < D * QUERIES; i++) query[i] *= scale;
            attend(starts[s], starts[s + 1], D, 3 * D, y + D * T, y + 2 * D * T, query, score);
            each_run(heads * D, head * D, D, place, count,
                     [=](int64_t tile, int64_t from, size_t size) { std::memcpy(context + tile, query + from, size); });
        }
    }
    seconds[0] = halfway - begun, seconds[1] = omp_get_wtime() - halfway;
}

// What threads have spent on each of some parts; and the time that passed meanwhile, handed out in proportion to that:
// so waiting for the last thread counts.
static inline void add(const double *seconds, double *spent, int parts) {
    for (int part = 0; part < parts; part++)
#pragma omp atomic
        spent[part] += seconds[part];
}
static inline void share(double passed, const double *spent, double *seconds, int parts) {
    double sum = 0.0;
    for (int part = 0; part < parts; part++) sum += spent[part];
    for (int part = 0; part < parts && sum > 0.0; part++) seconds[part] += passed * spent[part] / sum;
}

// context: float tiles of heads * D features. Sequence s is the tokens starts[s] to starts[s + 1] of q; w has the
// queries, then the keys, then the values of every head. first_only: of each sequence's queries only the first is used,
// and the context has one token for each. seconds[0] and [1] grow by the time of products and attention.
extern "C" void attention(const Weights *w, int64_t tokens, const uint8_t *q, int64_t sequences, const int64_t *starts,
                          int64_t heads, int64_t D, int32_t first_only, float *context, double *seconds) {
    auto *on = w->portable ? one_head<Portable> : one_head<Machine>;
    double spent[2] = {}, begun = omp_get_wtime();
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t head = 0; head < heads; head++) {
        double each[2];
        on(*w, head, tokens, q, sequences, starts, heads, D, first_only, context, each);
        add(each, spent, 2);
    }
    share(omp_get_wtime() - begun, spent, seconds, 2);
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
constexpr int64_t GROUP = 128, GROUP_ON_TILES = 512;

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
