// Sparse INT8 BERT on a CPU, first of six files: vector types, and what differs from CPU to CPU. Then functions.h,
// tiles.h, products.h, attention.h and encoder.cpp, which build.py compiles on first use and calls through a plain C
// interface. OpenMP threads, torch's own.
//
// Activations lie in tiles of T tokens, tokens innermost, T being the bytes of a vector register (64 with AVX-512
// VNNI, 32 with AVX2, 16 elsewhere). So every loop over tokens is a vector loop, and no sum is ever taken across a
// vector. A buffer of n tokens and F features is ceil(n / T) tiles, each of them
//
//     float   x[F][T]             one row per feature: four vectors
//     words   q[F / 4][T][4]      uint8 levels; four consecutive features of one token are one 32-bit word
//     rows    q[F][T]             uint8 levels; a vector per feature, its tokens in the order that `interleave` undoes
//
//         words, T = 4:    token 0   token 1   token 2   token 3
//         features 0-3    |0 1 2 3| |0 1 2 3| |0 1 2 3| |0 1 2 3|    <- one load; then one `dot` multiplies it by a
//         features 4-7    |4 5 6 7| |4 5 6 7| |4 5 6 7| |4 5 6 7|       weight block and adds to a sum per token
//
// A weight block is four int8 in a 32-bit word. Which four, weights.py chooses for every layer, by what costs least:
//
//     WORDS      four consecutive inputs of one output (1x4 blocks): a block meets a row of `words`
//     STRIPES    four inputs of four consecutive outputs (4x1 blocks, 4x4 blocks, dense layers): four `rows` are
//                interleaved into words once, and meet four blocks, one per output
//     SCATTERED  any four inputs of one output (unstructured): four `rows` are interleaved for that output alone
//
// The bound. A CPU that loads and multiplies one vector a cycle (AMD Zen 4: 64 bytes) takes, for a block and T tokens,
// four loads of tokens and one of the block: 5 cycles for 4 T multiplications and additions, 102 operations a cycle
// with T = 64. STRIPES loads a quarter of that and is bound by its multiplications, 128 operations a cycle. SCATTERED
// adds eight shuffles to four multiplications: some 70.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <vector>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(EMULATED)                   // tests/emulated_tiles.h takes the place of tile registers
constexpr int T = 64;
#elif defined(PORTABLE)
constexpr int T = 16;
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int T = 64;
#define VECTOR(name) _mm512_##name
#define TABLES                          // one instruction looks 16 numbers up
typedef __m512i vector;
#elif defined(__AVX2__)
constexpr int T = 32;
#define VECTOR(name) _mm256_##name
typedef __m256i vector;
#else
constexpr int T = 16;
#endif
constexpr int LANES = T / 4;            // numbers of 32 bits in a vector; four vectors are a tile's tokens

typedef int32_t ints __attribute__((vector_size(T), may_alias));
typedef float floats __attribute__((vector_size(T), may_alias));
typedef uint8_t bytes __attribute__((vector_size(T), may_alias));

static inline ints broadcast(int32_t x) { return x - ints{}; }
static inline floats broadcast(float x) { return x - floats{}; }
#if defined(VECTOR)                     // of a choice between two GCC makes two instructions
static inline floats least(floats a, floats b) { return (floats)VECTOR(min_ps)(a, b); }
static inline floats most(floats a, floats b) { return (floats)VECTOR(max_ps)(a, b); }
#else
static inline floats least(floats a, floats b) { return a < b ? a : b; }
static inline floats most(floats a, floats b) { return a > b ? a : b; }
#endif

// Of the numbers of two vectors, one after the other, for each lane the one at its place.
static inline ints of_two(ints a, ints b, ints place) {
#if defined(TABLES)
    return (ints)_mm512_permutex2var_epi32((__m512i)a, (__m512i)place, (__m512i)b);
#else
    ints x;
    for (int i = 0; i < LANES; i++) x[i] = place[i] < LANES ? a[place[i]] : b[place[i] - LANES];
    return x;
#endif
}

#if defined(TABLES)
// Of 16 numbers in memory, each lane the one that the low four bits of its place say.
static inline floats look_up(const float *table, floats place) {
    return (floats)_mm512_permutexvar_ps((__m512i)place, _mm512_load_ps(table));
}
// x 2^floor(exponent), towards 0 where that is too small.
static inline floats scale_by(floats x, floats exponent) { return (floats)_mm512_scalef_ps((__m512)x, (__m512)exponent); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// What differs from CPU to CPU in products: three functions, and the same three in plain C++, for where the others are wrong.
//     dot(sum, x, w)       sum[t] + (x[t][0] - OFFSET) w[0] + ... + (x[t][3] - OFFSET) w[3]: x uint8, w int8, sum int32
//     interleave(q, x)     a vector of each of four `rows` -> their T words, in the order of the tokens
//     narrow(x)            T int32 of 0 to 255, in the order of the tokens -> one of the `rows`

struct Portable {
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        for (int byte = 0; byte < 4; byte++) sum += ((x >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
        return sum;
    }
    static inline void interleave(const bytes *const q[4], ints x[4]) {
        for (int token = 0; token < T; token++)
            for (int i = 0; i < 4; i++) ((uint8_t *)x)[4 * token + i] = ((const uint8_t *)q[i])[token];
    }
    static inline bytes narrow(const ints x[4]) {
        bytes row;
        for (int token = 0; token < T; token++) row[token] = (uint8_t)x[token / LANES][token % LANES];
        return row;
    }
};

#if defined(VECTOR)
struct Shuffles {                       // within 128 bits each: what `interleave` mixes, `narrow` sorts
    static inline void interleave(const bytes *const q[4], ints x[4]) {
        vector a = (vector)*q[0], b = (vector)*q[1], c = (vector)*q[2], d = (vector)*q[3];
        vector ab = VECTOR(unpacklo_epi8(a, b)), cd = VECTOR(unpacklo_epi8(c, d));
        x[0] = (ints)VECTOR(unpacklo_epi16(ab, cd)), x[1] = (ints)VECTOR(unpackhi_epi16(ab, cd));
        ab = VECTOR(unpackhi_epi8(a, b)), cd = VECTOR(unpackhi_epi8(c, d));
        x[2] = (ints)VECTOR(unpacklo_epi16(ab, cd)), x[3] = (ints)VECTOR(unpackhi_epi16(ab, cd));
    }
    static inline bytes narrow(const ints x[4]) {
        vector low = VECTOR(packs_epi32((vector)x[0], (vector)x[1]));
        vector high = VECTOR(packs_epi32((vector)x[2], (vector)x[3]));
        return (bytes)VECTOR(packus_epi16(low, high));
    }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(PORTABLE)
static const char *const NAME = "AVX-512 VNNI";
struct Machine : Shuffles {
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
    }
};
#elif defined(__AVX2__) && !defined(PORTABLE)
struct Machine : Shuffles {
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        __m256i s = (__m256i)sum, a = (__m256i)x, b = (__m256i)w;
#if defined(__AVXVNNI__)
        return (ints)_mm256_dpbusd_avx_epi32(s, a, b);
#elif ACTIVATION_BITS < 8       // the sum of two products fits into 16 bits
        return (ints)_mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#else                           // it does not: even and odd bytes apart, as 16 bits
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
        return (ints)_mm256_add_epi32(s, _mm256_add_epi32(even, odd));
#endif
    }
};
#if defined(__AVXVNNI__)
static const char *const NAME = "AVX-VNNI";
#else
static const char *const NAME = "AVX2";
#endif
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(PORTABLE)
struct Machine {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    static constexpr int OFFSET = 0;
    static inline ints dot(ints sum, ints x, ints w) {
        return (ints)vusdotq_s32((int32x4_t)sum, (uint8x16_t)x, (int8x16_t)w);
    }
#else                           // signed by signed only
    static constexpr int OFFSET = 128;
    static inline ints dot(ints sum, ints x, ints w) {
        return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)veorq_u8((uint8x16_t)x, vdupq_n_u8(128)), (int8x16_t)w);
    }
#endif
    static inline void interleave(const bytes *const q[4], ints x[4]) {
        uint8x16x2_t ab = vzipq_u8((uint8x16_t)*q[0], (uint8x16_t)*q[1]);
        uint8x16x2_t cd = vzipq_u8((uint8x16_t)*q[2], (uint8x16_t)*q[3]);
        for (int half = 0; half < 2; half++) {
            uint16x8x2_t words = vzipq_u16((uint16x8_t)ab.val[half], (uint16x8_t)cd.val[half]);
            x[2 * half] = (ints)words.val[0], x[2 * half + 1] = (ints)words.val[1];
        }
    }
    static inline bytes narrow(const ints x[4]) {
        int16x8_t low = vcombine_s16(vmovn_s32((int32x4_t)x[0]), vmovn_s32((int32x4_t)x[1]));
        int16x8_t high = vcombine_s16(vmovn_s32((int32x4_t)x[2]), vmovn_s32((int32x4_t)x[3]));
        return (bytes)vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    }
};
#if defined(__ARM_FEATURE_MATMUL_INT8)
static const char *const NAME = "ARM i8mm";
#else
static const char *const NAME = "ARM dot product";
#endif
#else
typedef Portable Machine;
static const char *const NAME = "plain C++";
#endif
