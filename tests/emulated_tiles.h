// Tile registers in plain C++, to test native/ on a CPU without them: g++ -DPORTABLE -DEMULATED -include this.
// Written from the description of the instructions (Intel's manual, volume 2: TDPBSUD, TDPBF16PS, TILELOADD, TILESTORED).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>                          // before their names are taken
#endif
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps

static thread_local uint8_t emulated[8][16][64];
static thread_local bool configured = false;

static inline void demand() {
    if (!configured) std::abort();              // the real instruction raises an exception
}
static inline void emulated_loadconfig(const void *shape) {
    const uint8_t *bytes = (const uint8_t *)shape;
    if (bytes[0] != 1) std::abort();
    for (int i = 0; i < 8; i++)
        if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) std::abort();
    configured = true;
    std::memset(emulated, 0, sizeof(emulated));
}
static inline void emulated_release() { configured = false; }
static inline void emulated_zero(int to) { demand(), std::memset(emulated[to], 0, sizeof(emulated[to])); }
static inline void emulated_loadd(int to, const void *base, int64_t stride) {
    demand();
    for (int row = 0; row < 16; row++) std::memcpy(emulated[to][row], (const uint8_t *)base + row * stride, 64);
}
static inline void emulated_stored(int from, void *base, int64_t stride) {
    demand();
    for (int row = 0; row < 16; row++) std::memcpy((uint8_t *)base + row * stride, emulated[from][row], 64);
}
static inline void emulated_dpbsud(int c, int a, int b) {          // signed bytes of a, unsigned bytes of b
    demand();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            std::memcpy(&sum, &emulated[c][m][4 * n], 4);
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 4; i++) sum += (int8_t)emulated[a][m][4 * k + i] * (int)emulated[b][k][4 * n + i];
            std::memcpy(&emulated[c][m][4 * n], &sum, 4);
        }
}
static inline float emulated_wide(const uint8_t *half) {             // a subnormal one counts as zero
    uint32_t bits = (uint32_t)half[0] << 16 | (uint32_t)half[1] << 24;
    if (!(bits & 0x7f800000)) bits = 0;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline void emulated_dpbf16ps(int c, int a, int b) {         // pairs of upper halves of float32
    demand();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            std::memcpy(&sum, &emulated[c][m][4 * n], 4);
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 4; i += 2)
                    sum += emulated_wide(&emulated[a][m][4 * k + i]) * emulated_wide(&emulated[b][k][4 * n + i]);
            std::memcpy(&emulated[c][m][4 * n], &sum, 4);
        }
}

#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbsud emulated_dpbsud
#define _tile_dpbf16ps emulated_dpbf16ps
