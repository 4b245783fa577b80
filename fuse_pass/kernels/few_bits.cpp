// Products of matrices with weights of few bits.
//
// Weights are codes, packed into words of 32 bits in tiles of 16 columns, so that a register of words holds one word of
// each column:
//
//     words[ceil(n / 16)][ceil(k / per_word)][16],  per_word = 32 / bits
//
// The code of k = 4 j + b of a word is in its byte b, from bit `bits * j` of that byte on: shifted and masked, a word
// gives four codes of consecutive k, one in each byte. Codes beyond n and k are 0.
//
// LEVEL, given by who compiles: 3 for AMX and all of 2, 2 for AVX-512 with VNNI, 1 for AVX2 with FMA, 0 for plain C++.

#include <cstdint>
#include <cstring>
#include <vector>
#if LEVEL >= 1
#include <immintrin.h>
#endif
#if LEVEL >= 3
#include "amx.h"
#endif

#if LEVEL >= 1
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

namespace {

constexpr long COLUMNS = 16;
#if LEVEL >= 3
// From so many rows on the tile registers of AMX are faster (Intel Xeon, 768 x 3072); codes of fewer bits are unpacked.
inline long min_tile_rows(long bits) { return bits == 8 ? 8 : 16; }
#endif

// With few rows the weights are read once, from memory; the processor fetches ahead in pages, of which a tile has a few.
// One row, weights that are in no cache: 8 bits 0.58 -> 0.53 ms, floats of 4 bits 0.67 -> 0.55 (768 x 3072 x 768, Xeon).
template <int TILES>
inline void prefetch(const uint32_t* words, long word_count, long w) {
    constexpr long AHEAD = 16;
    // After the last word of these tiles come those of the next.
    const long at = w + AHEAD < word_count ? w + AHEAD : w + AHEAD + (TILES - 1) * word_count;
    UNROLL for (int t = 0; t < TILES; ++t) __builtin_prefetch(words + (t * word_count + at) * COLUMNS);
}

// --- integer products: unsigned codes times int8, summed in int32 ---

#if LEVEL >= 2

using Sums = __m512i;
using Codes = __m512i;
using Four = __m512i;
inline Sums zero() { return _mm512_setzero_si512(); }
inline Codes load(const uint32_t* words) { return _mm512_loadu_si512(words); }
template <int BITS>
inline Codes codes(Codes words, int j) {
    if constexpr (BITS == 8) return words;
    return _mm512_and_si512(_mm512_srli_epi32(words, BITS * j), _mm512_set1_epi8((1 << BITS) - 1));
}
template <int BITS>
inline Four broadcast(const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, 4);
    return _mm512_set1_epi32(four);
}
template <int BITS>
inline Sums plus(Sums sums, Codes codes, Four a) {
    return _mm512_dpbusd_epi32(sums, codes, a);
}
template <int BITS>
inline void store(Sums sums, int32_t* y) {
    _mm512_storeu_si512(y, sums);
}

#elif LEVEL == 1

inline __m256i load(const uint32_t* words) { return _mm256_loadu_si256((const __m256i*)words); }

// (c0 c1 c4 c5 | c2 c3 c6 c7) after adding neighbours
inline __m256i in_order(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0b11011000); }

inline void store(__m256i sums, int32_t* y, long columns) {
    alignas(32) int32_t all[8];
    _mm256_store_si256((__m256i*)all, sums);
    if (columns > 0) std::memcpy(y, all, sizeof(int32_t) * (columns < 8 ? columns : 8));
}

// 8-bit codes. A pair of products with int8 leaves int16, so both factors are widened first; the sum of a column is
// kept in two parts. Half a tile at a time.
template <int ROWS>
void wide_block(const int16_t* a, long stride, const uint32_t* words, long word_count, int32_t* y, long y_stride,
                long columns) {
    for (int half = 0; half < 2; ++half) {
        __m256i left[ROWS], right[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) left[r] = right[r] = _mm256_setzero_si256();
        for (long w = 0; w < word_count; ++w) {
            const uint32_t* from = words + w * COLUMNS + 8 * half;
            const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
            const __m256i d = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + 4)));
            UNROLL for (int r = 0; r < ROWS; ++r) {
                int64_t four;
                std::memcpy(&four, a + r * stride + 4 * w, 8);
                const __m256i f = _mm256_set1_epi64x(four);
                left[r] = _mm256_add_epi32(left[r], _mm256_madd_epi16(c, f));
                right[r] = _mm256_add_epi32(right[r], _mm256_madd_epi16(d, f));
            }
        }
        UNROLL for (int r = 0; r < ROWS; ++r)
            store(in_order(left[r], right[r]), y + r * y_stride + 8 * half, columns - 8 * half);
    }
}

// Codes of fewer bits: so many pairs of products are added in int16 before they could leave it.
template <int BITS, int ROWS>
void narrow_block(const int8_t* a, long stride, const uint32_t* words, long word_count, int32_t* y, long y_stride,
                  long columns) {
    constexpr long CHUNK = BITS == 4 ? 4 : 8;
    static_assert(CHUNK * (8 / BITS) * 2 * ((1 << BITS) - 1) * 128 <= 32767);
    const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
    __m256i sums[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (long first = 0; first < word_count; first += CHUNK) {
        const long last = first + CHUNK < word_count ? first + CHUNK : word_count;
        __m256i part[ROWS][2];
        UNROLL for (int r = 0; r < ROWS; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
        for (long w = first; w < last; ++w) {
            const __m256i low = load(words + w * COLUMNS), high = load(words + w * COLUMNS + 8);
            UNROLL for (int j = 0; j < 8 / BITS; ++j) {
                const __m256i c = _mm256_and_si256(_mm256_srli_epi32(low, BITS * j), mask);
                const __m256i d = _mm256_and_si256(_mm256_srli_epi32(high, BITS * j), mask);
                UNROLL for (int r = 0; r < ROWS; ++r) {
                    int32_t four;
                    std::memcpy(&four, a + r * stride + w * (32 / BITS) + 4 * j, 4);
                    const __m256i f = _mm256_set1_epi32(four);
                    part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(c, f));
                    part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(d, f));
                }
            }
        }
        UNROLL for (int r = 0; r < ROWS; ++r) {
            UNROLL for (int h = 0; h < 2; ++h) sums[r][h] =
                _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(part[r][h], _mm256_set1_epi16(1)));
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int h = 0; h < 2; ++h) store(sums[r][h], y + r * y_stride + 8 * h, columns - 8 * h);
    }
}

#else

struct Sums {
    int32_t value[COLUMNS];
};
struct Codes {
    uint32_t value[COLUMNS];
};
struct Four {
    int8_t value[4];
};
inline Sums zero() { return {}; }
inline Codes load(const uint32_t* words) {
    Codes c;
    std::memcpy(c.value, words, sizeof c.value);
    return c;
}
template <int BITS>
inline Codes codes(Codes words, int j) {
    constexpr uint32_t mask = ((1u << BITS) - 1) * 0x01010101u;
    for (auto& word : words.value) word = (word >> (BITS * j)) & mask;
    return words;
}
template <int BITS>
inline Four broadcast(const int8_t* a) {
    return {a[0], a[1], a[2], a[3]};
}
template <int BITS>
inline Sums plus(Sums sums, Codes codes, Four a) {
    for (int b = 0; b < 4; ++b)
        for (long c = 0; c < COLUMNS; ++c) sums.value[c] += (int32_t)((codes.value[c] >> (8 * b)) & 255u) * a.value[b];
    return sums;
}
template <int BITS>
inline void store(const Sums& sums, int32_t* y) {
    std::memcpy(y, sums.value, sizeof sums.value);
}

#endif

#if LEVEL != 1

template <int BITS, int TILES, int ROWS>
void block(const int8_t* a, long stride, const uint32_t* words, long word_count, int32_t* y, long y_stride,
           long columns) {
    Sums sums[ROWS][TILES];
    UNROLL for (int r = 0; r < ROWS; ++r) UNROLL for (int t = 0; t < TILES; ++t) sums[r][t] = zero();
    for (long w = 0; w < word_count; ++w) {
        Codes loaded[TILES];
        UNROLL for (int t = 0; t < TILES; ++t) loaded[t] = load(words + (t * word_count + w) * COLUMNS);
        if constexpr (ROWS <= 2) prefetch<TILES>(words, word_count, w);
        UNROLL for (int j = 0; j < 8 / BITS; ++j) {
            const int8_t* four = a + w * (32 / BITS) + 4 * j;
            Codes now[TILES];
            UNROLL for (int t = 0; t < TILES; ++t) now[t] = codes<BITS>(loaded[t], j);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                const Four from = broadcast<BITS>(four + r * stride);
                UNROLL for (int t = 0; t < TILES; ++t) sums[r][t] = plus<BITS>(sums[r][t], now[t], from);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int t = 0; t < TILES; ++t) {
            const long left = columns - t * COLUMNS;
            if (left <= 0) break;
            alignas(64) int32_t all[COLUMNS];
            store<BITS>(sums[r][t], all);
            std::memcpy(y + r * y_stride + t * COLUMNS, all, sizeof(int32_t) * (left < COLUMNS ? left : COLUMNS));
        }
    }
}

#endif

#if LEVEL == 1
constexpr int TILES = 1;
#else
constexpr int TILES = 4;
#endif
// As many rows at once as the registers hold.
template <int BITS>
constexpr int rows_at_once() {
    return LEVEL >= 2 ? 6 : LEVEL == 1 ? (BITS == 8 ? 3 : 4) : 1;
}

// One block of rows; A is int16_t where `wide_block` reads it.
template <int BITS, int TILES, int ROWS, typename A>
void some_rows(const A* a, long stride, const uint32_t* words, long word_count, int32_t* y, long y_stride,
               long columns) {
#if LEVEL == 1
    if constexpr (BITS == 8)
        wide_block<ROWS>(a, stride, words, word_count, y, y_stride, columns);
    else
        narrow_block<BITS, ROWS>(a, stride, words, word_count, y, y_stride, columns);
#else
    block<BITS, TILES, ROWS>(a, stride, words, word_count, y, y_stride, columns);
#endif
}

template <int BITS, int TILES, typename A>
void all_rows(long rows, const A* a, long stride, const uint32_t* words, long word_count, int32_t* y, long y_stride,
              long columns) {
    constexpr int ROWS = rows_at_once<BITS>();
    while (rows >= ROWS) {
        some_rows<BITS, TILES, ROWS>(a, stride, words, word_count, y, y_stride, columns);
        a += ROWS * stride;
        y += ROWS * y_stride;
        rows -= ROWS;
    }
    if constexpr (ROWS > 1) {
        if constexpr (ROWS > 5)
            if (rows == 5) some_rows<BITS, TILES, 5>(a, stride, words, word_count, y, y_stride, columns);
        if constexpr (ROWS > 4)
            if (rows == 4) some_rows<BITS, TILES, 4>(a, stride, words, word_count, y, y_stride, columns);
        if constexpr (ROWS > 3)
            if (rows == 3) some_rows<BITS, TILES, 3>(a, stride, words, word_count, y, y_stride, columns);
        if constexpr (ROWS > 2)
            if (rows == 2) some_rows<BITS, TILES, 2>(a, stride, words, word_count, y, y_stride, columns);
        if (rows == 1) some_rows<BITS, TILES, 1>(a, stride, words, word_count, y, y_stride, columns);
    }
}

template <int BITS, typename A>
void product(const A* a, long rows, long stride, const uint32_t* words, long word_count, int32_t* y, long columns,
             long threads) {
    const long tiles = (columns + COLUMNS - 1) / COLUMNS, groups = (tiles + TILES - 1) / TILES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long g = 0; g < groups; ++g) {
        const long first = g * TILES, many = tiles - first < TILES ? tiles - first : TILES;
        const uint32_t* from = words + first * word_count * COLUMNS;
        int32_t* to = y + first * COLUMNS;
        const long left = columns - first * COLUMNS;
        if (many == TILES) {
            all_rows<BITS, TILES>(rows, a, stride, from, word_count, to, columns, left);
        } else {
            for (long t = 0; t < many; ++t) {
                const uint32_t* tile = from + t * word_count * COLUMNS;
                all_rows<BITS, 1>(rows, a, stride, tile, word_count, to + t * COLUMNS, columns, left - t * COLUMNS);
            }
        }
    }
}

// --- float products: weights are looked up by their codes, scaled, and multiplied in float32 ---

struct Grid {
    const float* table;  // value of each of 16 codes; 8-bit codes are int8 and have none
    const float* scale;  // [n / 16][groups][16]
    const float* shift;  // likewise, subtracted from the scaled value; or null
    long words_per_group;
    bool is_signed;  // whether the table is 0 ... 7, -8 ... -1
};

#if LEVEL >= 2

using Floats = __m512;
constexpr long LANES = 16;
inline Floats nothing() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats read(const float* x) { return _mm512_loadu_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline void write(Floats x, float* y) { _mm512_storeu_ps(y, x); }
struct Table {
    __m512 values;
    explicit Table(const Grid& grid) : values(_mm512_loadu_ps(grid.table)) {}
};
using Words = __m512i;
inline Words read_words(const uint32_t* words) { return _mm512_loadu_si512(words); }
template <int BITS>
inline Floats value(Words words, int bit, const Table& table) {
    if constexpr (BITS == 4) return _mm512_permutexvar_ps(_mm512_srli_epi32(words, bit), table.values);  // low 4 bits
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - bit), 24));
}

#elif LEVEL == 1

using Floats = __m256;
constexpr long LANES = 8;
inline Floats nothing() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats read(const float* x) { return _mm256_loadu_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fms(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline void write(Floats x, float* y) { _mm256_storeu_ps(y, x); }
struct Table {
    __m256 low, high;
    bool is_signed;
    explicit Table(const Grid& grid) : is_signed(grid.is_signed) {
        low = _mm256_loadu_ps(grid.table);
        high = _mm256_loadu_ps(grid.table + 8);
    }
};
using Words = __m256i;
inline Words read_words(const uint32_t* words) { return _mm256_loadu_si256((const __m256i*)words); }
template <int BITS>
inline Floats value(Words words, int bit, const Table& table) {
    if constexpr (BITS == 4) {
        if (table.is_signed) return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 28 - bit), 28));
        const __m256i code = _mm256_srli_epi32(words, bit);  // a permutation reads its low 3 bits
        const __m256 low = _mm256_permutevar8x32_ps(table.low, code), high = _mm256_permutevar8x32_ps(table.high, code);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    }
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - bit), 24));
}

#else

struct Floats {
    float value[16];
};
constexpr long LANES = 16;
inline Floats nothing() { return {}; }
inline Floats all(float x) {
    Floats y;
    for (auto& v : y.value) v = x;
    return y;
}
inline Floats read(const float* x) {
    Floats y;
    std::memcpy(y.value, x, sizeof y.value);
    return y;
}
inline Floats fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 16; ++i) c.value[i] += a.value[i] * b.value[i];
    return c;
}
inline Floats fms(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 16; ++i) c.value[i] = a.value[i] * b.value[i] - c.value[i];
    return c;
}
inline Floats times(Floats a, Floats b) {
    for (int i = 0; i < 16; ++i) a.value[i] *= b.value[i];
    return a;
}
inline void write(const Floats& x, float* y) { std::memcpy(y, x.value, sizeof x.value); }
struct Table {
    float values[16];
    explicit Table(const Grid& grid) { std::memcpy(values, grid.table, sizeof values); }
};
struct Words {
    uint32_t value[16];
};
inline Words read_words(const uint32_t* words) {
    Words w;
    std::memcpy(w.value, words, sizeof w.value);
    return w;
}
template <int BITS>
inline Floats value(const Words& words, int bit, const Table& table) {
    Floats y;
    for (int i = 0; i < 16; ++i) {
        const uint32_t code = words.value[i] >> bit;
        y.value[i] = BITS == 4 ? table.values[code & 15u] : (float)(int8_t)(code & 255u);
    }
    return y;
}

#endif

// With one row the scale of a group is applied to its sum; with more, to each weight, which all rows share.
template <int BITS, int PARTS, int ROWS>
void float_block(const float* x, long stride, const uint32_t* words, long word_count, const Grid& grid, float* y,
                 long y_stride, long columns) {
    const Table table(grid);
    const long groups = word_count / grid.words_per_group, tile_scales = groups * COLUMNS;
    constexpr int PER_TILE = COLUMNS / LANES;
    Floats sums[ROWS][PARTS];
    UNROLL for (int r = 0; r < ROWS; ++r) UNROLL for (int p = 0; p < PARTS; ++p) sums[r][p] = nothing();
    for (long g = 0; g < groups; ++g) {
        const float* scales = grid.scale + g * COLUMNS;
        const float* shifts = grid.shift ? grid.shift + g * COLUMNS : nullptr;
        Floats part[PARTS], scale[PARTS], shift[PARTS];
        UNROLL for (int p = 0; p < PARTS; ++p) {
            const long at = p / PER_TILE * tile_scales + p % PER_TILE * LANES;
            part[p] = nothing();
            scale[p] = read(scales + at);
            shift[p] = shifts ? read(shifts + at) : nothing();
        }
        float total = 0;
        for (long w = g * grid.words_per_group; w < (g + 1) * grid.words_per_group; ++w) {
            Words loaded[PARTS];
            UNROLL for (int p = 0; p < PARTS; ++p) loaded[p] =
                read_words(words + (p / PER_TILE * word_count + w) * COLUMNS + p % PER_TILE * LANES);
            if constexpr (ROWS == 1) prefetch<PARTS / PER_TILE>(words, word_count, w);
            UNROLL for (int i = 0; i < 32 / BITS; ++i) {
                const int bit = 8 * (i % 4) + BITS * (i / 4);
                const float* from = x + w * (32 / BITS) + i;
                if constexpr (ROWS == 1) {
                    const Floats factor = all(*from);
                    if (shifts) total += *from;
                    UNROLL for (int p = 0; p < PARTS; ++p) part[p] =
                        fma(value<BITS>(loaded[p], bit, table), factor, part[p]);
                } else {
                    Floats weight[PARTS];
                    UNROLL for (int p = 0; p < PARTS; ++p) {
                        const Floats looked_up = value<BITS>(loaded[p], bit, table);
                        weight[p] = shifts ? fms(looked_up, scale[p], shift[p]) : times(looked_up, scale[p]);
                    }
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        const Floats factor = all(from[r * stride]);
                        UNROLL for (int p = 0; p < PARTS; ++p) sums[r][p] = fma(weight[p], factor, sums[r][p]);
                    }
                }
            }
        }
        if constexpr (ROWS == 1) {
            UNROLL for (int p = 0; p < PARTS; ++p) {
                sums[0][p] = fma(part[p], scale[p], sums[0][p]);
                if (shifts) sums[0][p] = fma(shift[p], all(-total), sums[0][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int p = 0; p < PARTS; ++p) {
            const long left = columns - p * LANES;
            alignas(64) float all_lanes[LANES];
            write(sums[r][p], all_lanes);
            if (left > 0)
                std::memcpy(y + r * y_stride + p * LANES, all_lanes, sizeof(float) * (left < LANES ? left : LANES));
        }
    }
}

template <int BITS, int TILES>
void all_float_rows(long rows, const float* x, long stride, const uint32_t* words, long word_count, const Grid& grid,
                    float* y, long y_stride, long columns) {
    constexpr int PARTS = TILES * (COLUMNS / LANES);
    constexpr int ROWS = LEVEL == 0 ? 2 : LEVEL == 1 ? 4 : 8;
    while (rows >= ROWS) {
        float_block<BITS, PARTS, ROWS>(x, stride, words, word_count, grid, y, y_stride, columns);
        x += ROWS * stride;
        y += ROWS * y_stride;
        rows -= ROWS;
    }
    if constexpr (ROWS > 4) {
        if (rows >= 4) {
            float_block<BITS, PARTS, 4>(x, stride, words, word_count, grid, y, y_stride, columns);
            x += 4 * stride;
            y += 4 * y_stride;
            rows -= 4;
        }
    }
    if constexpr (ROWS > 3)
        if (rows == 3) float_block<BITS, PARTS, 3>(x, stride, words, word_count, grid, y, y_stride, columns);
    if constexpr (ROWS > 2)
        if (rows == 2) float_block<BITS, PARTS, 2>(x, stride, words, word_count, grid, y, y_stride, columns);
    if (rows == 1) float_block<BITS, PARTS, 1>(x, stride, words, word_count, grid, y, y_stride, columns);
}

template <int BITS>
void float_products(const float* x, long rows, long stride, const uint32_t* words, long word_count, Grid grid, float* y,
                    long columns, long threads) {
    constexpr long TILES = LEVEL >= 2 ? 2 : 1;
    const long tiles = (columns + COLUMNS - 1) / COLUMNS, blocks = (tiles + TILES - 1) / TILES;
    const long tile_scales = word_count / grid.words_per_group * COLUMNS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long b = 0; b < blocks; ++b) {
        const long first = b * TILES;
        const uint32_t* from = words + first * word_count * COLUMNS;
        Grid own = grid;
        own.scale += first * tile_scales;
        if (own.shift) own.shift += first * tile_scales;
        float* to = y + first * COLUMNS;
        const long left = columns - first * COLUMNS;
        if (tiles - first >= TILES)
            all_float_rows<BITS, TILES>(rows, x, stride, from, word_count, own, to, columns, left);
        else
            all_float_rows<BITS, 1>(rows, x, stride, from, word_count, own, to, columns, left);
    }
}

}  // namespace

// y[rows, columns] = a[rows, k] @ codes[columns, k].T; a is padded with anything up to `stride` >= word_count * 32 /
// bits (codes beyond k are 0).
extern "C" int integer_product(const int8_t* a, long rows, long stride, const uint32_t* words, long word_count,
                               int32_t* y, long columns, long bits, long threads) {
#if LEVEL >= 3
    if (rows >= min_tile_rows(bits)) {
        switch (bits) {
            case 8:
                amx::product<8>(a, rows, stride, words, word_count, y, columns, threads);
                return 0;
            case 4:
                amx::product<4>(a, rows, stride, words, word_count, y, columns, threads);
                return 0;
            case 2:
                amx::product<2>(a, rows, stride, words, word_count, y, columns, threads);
                return 0;
            case 1:
                amx::product<1>(a, rows, stride, words, word_count, y, columns, threads);
                return 0;
        }
        return 1;
    }
#endif
    switch (bits) {
        case 8: {
#if LEVEL == 1
            const std::vector<int16_t> wide(a, a + rows * stride);
            product<8>(wide.data(), rows, stride, words, word_count, y, columns, threads);
#else
            product<8>(a, rows, stride, words, word_count, y, columns, threads);
#endif
            return 0;
        }
        case 4:
            product<4>(a, rows, stride, words, word_count, y, columns, threads);
            return 0;
        case 2:
            product<2>(a, rows, stride, words, word_count, y, columns, threads);
            return 0;
        case 1:
            product<1>(a, rows, stride, words, word_count, y, columns, threads);
            return 0;
    }
    return 1;
}

extern "C" int float_product(const float* x, long rows, long stride, const uint32_t* words, long word_count,
                             const float* table, const float* scale, const float* shift, long words_per_group, float* y,
                             long columns, long bits, long threads) {
    bool is_signed = true;
    for (long c = 0; c < 16; ++c) is_signed = is_signed && table[c] == (float)(c < 8 ? c : c - 16);
    const Grid grid{table, scale, shift, words_per_group, is_signed};
    switch (bits) {
        case 4:
            float_products<4>(x, rows, stride, words, word_count, grid, y, columns, threads);
            return 0;
        case 8:
            float_products<8>(x, rows, stride, words, word_count, grid, y, columns, threads);
            return 0;
    }
    return 1;
}
