// Integer products of many rows in the tile registers of AMX: a tile is 16 rows of 64 bytes.
//
// 16 words of a tile of weights of 8 bits are such a tile as they lie in memory: row i of it has the four codes of
// k = 4 i … 4 i + 3 for each of 16 columns, which is what the instruction multiplies with 16 rows of 64 int8. Codes of
// fewer bits are unpacked for all rows at once.
//
// Included where LEVEL is 3.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace amx {

constexpr long ROWS = 16, COLUMNS = 16, BYTES = 64;

// The layout of a 64-byte operand of LDTILECFG.
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// All eight tiles are full ones; what was configured before is back afterwards.
class Tiles {
   public:
    Tiles() {
        _tile_storeconfig(&before);
        Config full;
        for (int t = 0; t < 8; ++t) full.row_bytes[t] = BYTES, full.rows[t] = ROWS;
        _tile_loadconfig(&full);
    }
    ~Tiles() {
        if (before.palette)
            _tile_loadconfig(&before);
        else
            _tile_release();
    }

   private:
    Config before;
};

// So many rows and columns of a tile of sums into y.
inline void store_part(const int32_t* sums, int32_t* y, long stride, long rows, long columns) {
    const long width = columns < COLUMNS ? columns : COLUMNS;
    for (long r = 0; r < rows && r < ROWS; ++r)
        if (width > 0) std::memcpy(y + r * stride, sums + r * COLUMNS, sizeof(int32_t) * width);
}

// The number of a tile is part of the instruction, which g++ takes from the text of the call.
#define STORE(TILE, Y, STRIDE, ROWS_LEFT, COLUMNS_LEFT)                \
    if ((ROWS_LEFT) >= ROWS && (COLUMNS_LEFT) >= COLUMNS) {            \
        _tile_stored(TILE, Y, (STRIDE) * sizeof(int32_t));             \
    } else {                                                           \
        alignas(64) int32_t sums[ROWS * COLUMNS];                      \
        _tile_stored(TILE, sums, BYTES);                               \
        store_part(sums, Y, STRIDE, ROWS_LEFT, COLUMNS_LEFT);          \
    }

// Up to 32 rows and 32 columns: both operands are read from memory for 16 products of 16.
template <bool SECOND_ROWS, bool SECOND_COLUMNS>
inline void block(const int8_t* a, long stride, const uint32_t* b, const uint32_t* c, long steps, int32_t* y,
                  long y_stride, long rows, long columns) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long s = 0; s < steps; ++s) {
        _tile_loadd(6, b + s * ROWS * COLUMNS, BYTES);
        if (SECOND_COLUMNS) _tile_loadd(7, c + s * ROWS * COLUMNS, BYTES);
        _tile_loadd(4, a + s * BYTES, stride);
        _tile_dpbsud(0, 4, 6);
        if (SECOND_COLUMNS) _tile_dpbsud(1, 4, 7);
        if (SECOND_ROWS) {
            _tile_loadd(5, a + ROWS * stride + s * BYTES, stride);
            _tile_dpbsud(2, 5, 6);
            if (SECOND_COLUMNS) _tile_dpbsud(3, 5, 7);
        }
    }
    STORE(0, y, y_stride, rows, columns);
    if (SECOND_COLUMNS) STORE(1, y + COLUMNS, y_stride, rows, columns - COLUMNS);
    if (SECOND_ROWS) {
        int32_t* below = y + ROWS * y_stride;
        STORE(2, below, y_stride, rows - ROWS, columns);
        if (SECOND_COLUMNS) STORE(3, below + COLUMNS, y_stride, rows - ROWS, columns - COLUMNS);
    }
}

// One or two tiles of columns, all rows.
template <bool SECOND_COLUMNS>
void panel(const int8_t* a, long rows, long stride, const uint32_t* b, const uint32_t* c, long steps, int32_t* y,
           long y_stride, long columns) {
    for (long r = 0; r < rows; r += 2 * ROWS) {
        const long left = rows - r;
        if (left > ROWS)
            block<true, SECOND_COLUMNS>(a + r * stride, stride, b, c, steps, y + r * y_stride, y_stride, left, columns);
        else
            block<false, SECOND_COLUMNS>(a + r * stride, stride, b, c, steps, y + r * y_stride, y_stride, left,
                                         columns);
    }
}

// The codes of one tile of columns in bytes, with zeros up to whole steps.
template <int BITS>
void unpack(const uint32_t* words, long word_count, long steps, uint32_t* to) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << BITS) - 1));
    long row = 0;
    for (long w = 0; w < word_count; ++w) {
        const __m512i word = _mm512_loadu_si512(words + w * COLUMNS);
        for (int j = 0; j < 8 / BITS; ++j, ++row)
            _mm512_storeu_si512(to + row * COLUMNS, _mm512_and_si512(_mm512_srli_epi32(word, BITS * j), mask));
    }
    for (; row < steps * ROWS; ++row) _mm512_storeu_si512(to + row * COLUMNS, _mm512_setzero_si512());
}

// Rows in whole tiles, and each in whole steps, with zeros behind.
inline std::vector<int8_t> padded(const int8_t* a, long rows, long stride, long steps) {
    std::vector<int8_t> all((rows + ROWS - 1) / ROWS * ROWS * steps * BYTES);
    for (long r = 0; r < rows; ++r) std::memcpy(all.data() + r * steps * BYTES, a + r * stride, stride);
    return all;
}

// As `product` of few_bits.cpp.
template <int BITS>
void product(const int8_t* a, long rows, long stride, const uint32_t* words, long word_count, int32_t* y, long columns,
             long threads) {
    const long inner = word_count * (32 / BITS), steps = (inner + BYTES - 1) / BYTES;
    std::vector<int8_t> copy;
    if (rows % ROWS || inner % BYTES || stride != inner) {
        copy = padded(a, rows, stride, steps);
        a = copy.data();
        stride = steps * BYTES;
    }
    const long tiles = (columns + COLUMNS - 1) / COLUMNS;
    const bool as_it_lies = BITS == 8 && inner % BYTES == 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Tiles configured;
        std::vector<uint32_t> codes(as_it_lies ? 0 : 2 * steps * ROWS * COLUMNS);
#pragma omp for
        for (long t = 0; t < tiles; t += 2) {
            const bool both = t + 1 < tiles;
            const uint32_t* b[2];
            for (int i = 0; i < (both ? 2 : 1); ++i) {
                const uint32_t* from = words + (t + i) * word_count * COLUMNS;
                uint32_t* to = codes.data() + i * steps * ROWS * COLUMNS;
                if (!as_it_lies) unpack<BITS>(from, word_count, steps, to);
                b[i] = as_it_lies ? from : to;
            }
            int32_t* to = y + t * COLUMNS;
            const long left = columns - t * COLUMNS;
            if (both)
                panel<true>(a, rows, stride, b[0], b[1], steps, to, columns, left);
            else
                panel<false>(a, rows, stride, b[0], b[0], steps, to, columns, left);
        }
    }
}

#undef STORE

}  // namespace amx
