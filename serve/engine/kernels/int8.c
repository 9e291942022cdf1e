// Products of int8 weights with int8 rows, exact in int32: symmetric scales, of the weights one an output channel, of
// the rows one each (absmax / 127), so that a row's answer knows nothing of its neighbours.
//
// Decoding few rows reads each weight once and multiplies it a few times: memory is the limit, so the weights lie as
// they are read, and everything around the product is done in the same call: the norm and the rounding of the rows
// before, scales, bias, silu(gate) * up and the residual after.
//
// Layout: blocks of WIDTH output channels; of each block, STEP inputs of every channel together, then the next STEP.

#include <omp.h>

#include "rows.h"

#if defined(__AVX512VNNI__)
#define STEP 4
#define VECTORS 4             // blocks that are multiplied together: a tile is up to 6 rows x VECTORS registers
typedef int8_t number;        // a row's
typedef uint8_t weight_t;     // vpdpbusd takes one unsigned factor: weights are stored + 128, and 128 * (the sum of the
#define OFFSET 128            // row) is taken off the product
#else
#define STEP 2
#define VECTORS 2
typedef int16_t number;       // widened already, as pmaddwd wants it: its products and sums are exact
typedef int8_t weight_t;
#define OFFSET 0
#endif
typedef number vn __attribute__((vector_size(WIDTH * sizeof(number))));
typedef weight_t vw __attribute__((vector_size(WIDTH * sizeof(weight_t))));
#define ROWS 6
#define GROUP (WIDTH * STEP)  // weights of one block and step

INLINE int64_t steps_of(int64_t inputs) { return (inputs + STEP - 1) / STEP; }

// acc + the products of one step of a block with the row's STEP numbers
INLINE vi dot(vi acc, const weight_t *weight, const number *x) {
#if defined(__AVX512VNNI__)
    int32_t four;
    memcpy(&four, x, sizeof four);
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_load_si512(weight), _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    int32_t two;
    memcpy(&two, x, sizeof two);
    __m256i wide = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)weight));
    return acc + (vi)_mm256_madd_epi16(wide, _mm256_set1_epi32(two));
#else
    for (int lane = 0; lane < WIDTH; lane++)
        for (int i = 0; i < STEP; i++) acc[lane] += weight[lane * STEP + i] * x[i];
    return acc;
#endif
}

// ---- rounding ----

#define LEAST 1e-30f  // below it a row or a channel counts as zero: 127 / LEAST is still a number

INLINE vi rounded(vf x) {  // to the nearest, ties to even, for |x| < 2^22; 0 where x is no number
    const vf magic = splat(12582912.0f);
    return ((vi)(x + magic) - (vi)magic) & (vi)(x == x);
}

// One channel of a matrix [outputs, inputs] -> its place in its block, and its scale.
static void pack_channel(const void *row, int64_t inputs, int is_bf16, weight_t *block, int lane, float *scale) {
    vf most = splat(0);
    for (int64_t i = 0; i < inputs; i += WIDTH) most = max_(most, abs_(load_some(row, i, inputs - i, is_bf16)));
    const float largest = max_lanes(most), inverse = largest < LEAST ? 0 : 127 / largest;
    *scale = largest < LEAST ? 0 : largest / 127;
    for (int64_t i = 0; i < inputs; i += WIDTH) {
        vw q = __builtin_convertvector(rounded(load_some(row, i, inputs - i, is_bf16) * inverse) + OFFSET, vw);
        for (int j = 0; j < smaller(WIDTH, inputs - i); j += STEP)
            memcpy(block + (i + j) / STEP * GROUP + lane * STEP, (char *)&q + j * sizeof(weight_t),
                   STEP * sizeof(weight_t));
    }
}

// matrix [outputs, inputs] -> blocks `first`, `first + apart`, ... of packed, and of scales [blocks, WIDTH]
API void heed_int8_pack(const void *matrix, int64_t outputs, int64_t inputs, int64_t is_bf16, void *packed,
                        float *scales, int64_t first, int64_t apart) {
    const int64_t steps = steps_of(inputs);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (outputs + WIDTH - 1) / WIDTH; b++) {
        weight_t *block = (weight_t *)packed + (first + b * apart) * steps * GROUP;
        memset(block, OFFSET, steps * GROUP * sizeof *block);
        for (int lane = 0; lane < WIDTH; lane++) {
            const int64_t channel = b * WIDTH + lane;
            float *scale = scales + (first + b * apart) * WIDTH + lane;
            *scale = 0;
            if (channel < outputs)
                pack_channel((const char *)matrix + channel * inputs * (is_bf16 ? 2 : 4), inputs, is_bf16, block, lane,
                             scale);
        }
    }
}

// ---- the product ----

typedef struct {  // serve/engine/quantize.py has the same
    const weight_t *weight;
    const float *scales;
    const float *bias;         // [outputs], or of a gated map [gate | up]; NULL: none
    const float *norm_weight;  // [inputs]; NULL: the rows are taken as they are
    const float *norm_bias;    // [inputs], or NULL
    int64_t inputs, outputs;   // outputs of a gated map: of its half
    int64_t gated;             // blocks of gate and up alternate, and the output is silu(gate) * up
    int64_t centred;           // the norm is LayerNorm
    int64_t fine;              // rows are rounded to 16 bits, 256 high + low, and each half is multiplied: for maps
                               // that 8 bits of their rows harm. Reading the weights costs the same.
    float eps;
} Map;

typedef struct {
    number *numbers;  // [rows, halves, steps * STEP]; halves is 2 of a fine map, high and low, else 1
    float *scales;    // [rows]
    int32_t *sums;    // [rows, halves], of the numbers
} Rounded;

INLINE int32_t add_lanes(vi x) {
    int32_t total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += x[lane];
    return total;
}

INLINE vf read_row(const Map *map, const void *x, Moments m, int64_t i, int is_bf16) {
    const int64_t n = map->inputs - i;
    vf value = load_some(x, i, n, is_bf16);
    return map->norm_weight ? normed(value, m, map->norm_weight, map->norm_bias, i, n) : value;
}

INLINE void round_row(const Map *map, const void *x, Rounded to, int64_t row, int is_bf16) {
    const int64_t inputs = map->inputs, padded = steps_of(inputs) * STEP;
    Moments m = {0, 1};
    if (map->norm_weight)
        m = map->centred ? moments(x, inputs, map->eps, 1, is_bf16) : moments(x, inputs, map->eps, 0, is_bf16);
    vf most = splat(0), poison = splat(0);
    for (int64_t i = 0; i < inputs; i += WIDTH) {
        vf value = read_row(map, x, m, i, is_bf16);
        most = max_(most, abs_(value));
        poison = fma_(value, splat(0), poison);  // stays 0 unless a value is infinite or no number
    }
    const float largest = max_lanes(most), range = map->fine ? 127 * 256 : 127;
    const float inverse = largest < LEAST ? 0 : range / largest;
    to.scales[row] = (largest < LEAST ? 0 : largest / range) + sum_lanes(poison);
    const int64_t halves = map->fine ? 2 : 1;
    number *numbers = to.numbers + row * halves * padded;
    vi sum = splat_int(0), low_sum = splat_int(0);
    for (int64_t i = 0; i < inputs; i += WIDTH) {
        const size_t bytes = smaller(WIDTH, padded - i) * sizeof(number);
        vi q = rounded(read_row(map, x, m, i, is_bf16) * inverse);
        if (map->fine) {
            vi high = (q + 128) >> 8, low = q - high * 256;
            vn narrow = __builtin_convertvector(low, vn);
            memcpy(numbers + padded + i, &narrow, bytes);
            low_sum += low;
            q = high;
        }
        vn narrow = __builtin_convertvector(q, vn);
        memcpy(numbers + i, &narrow, bytes);
        sum += q;
    }
    to.sums[row * halves] = add_lanes(sum);
    if (map->fine) to.sums[row * halves + 1] = add_lanes(low_sum);
}

// The sums of one tile, `rows` rows by `vectors` blocks; both are constants where it is inlined.
INLINE void sum_tile(const weight_t *weight, const number *numbers, int64_t steps, int rows, int vectors,
                     vi sums[ROWS][VECTORS]) {
    vi acc[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) acc[r][v] = splat_int(0);
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++)
                acc[r][v] = dot(acc[r][v], weight + (v * steps + step) * GROUP, numbers + (r * steps + step) * STEP);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = acc[r][v];
}

static void sum_any_tile(const weight_t *weight, const number *numbers, int64_t steps, int rows, int vectors,
                         vi sums[ROWS][VECTORS]) {
#define TILE(R, V) case (R) * 8 + (V): sum_tile(weight, numbers, steps, R, V, sums); return;
#define TILES(V) TILE(1, V) TILE(2, V) TILE(3, V) TILE(4, V) TILE(5, V) TILE(6, V)
    switch (rows * 8 + vectors) {
        TILES(1)
        TILES(2)
#if VECTORS == 4
        TILES(4)
#endif
    }
#undef TILES
#undef TILE
}

// From the sums of one tile to the output: scales, bias, silu(gate) * up, residual.
static void finish_tile(const Map *map, Rounded x, vi sums[ROWS][VECTORS], const void *residual, void *out,
                        int64_t row, int rows, int64_t block, int vectors, int is_bf16) {
    const int64_t outputs = map->outputs, halves = map->fine ? 2 : 1;
    for (int r = 0; r < rows; r++) {
        const float scale = x.scales[row + r];
        const int32_t *total = x.sums + (row + r) * halves;
        vf gate = splat(0);
        for (int v = 0; v < vectors; v++) {
            const int64_t b = block + v, place = map->gated ? b / 2 : b, up = map->gated && b % 2;
            const int64_t channel = place * WIDTH, n = outputs - channel, at = (row + r) * outputs + channel;
            vf y = __builtin_convertvector(sums[r * halves][v] - OFFSET * total[0], vf);
            if (map->fine) y = y * 256 + __builtin_convertvector(sums[r * halves + 1][v] - OFFSET * total[1], vf);
            y = y * scale * load(map->scales + b * WIDTH);
            if (map->bias) y += load_some(map->bias, (up ? outputs : 0) + channel, n, 0);
            if (map->gated && !up) {
                gate = silu(y);
                continue;
            }
            if (up) y *= gate;
            if (residual) y += load_some(residual, at, n, is_bf16);
            store_some(out, at, n, y, is_bf16);
        }
    }
}

// Blocks [block, end) of all rows. The weights of a few blocks stay in a near cache while the rows pass.
static void blocks(const Map *map, Rounded x, const void *residual, void *out, int64_t rows, int64_t block,
                   int64_t end, int is_bf16) {
    const int64_t steps = steps_of(map->inputs), halves = map->fine ? 2 : 1;
    const int64_t tiles = (rows * halves + ROWS - 1) / ROWS;
    vi sums[ROWS][VECTORS];
    while (block < end) {
        const int vectors = end - block >= VECTORS ? VECTORS : end - block >= 2 ? 2 : 1;
        for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
            const int count = (int)((rows - row) / (tiles - tile));  // even tiles: 8 rows are 4 and 4
            sum_any_tile(map->weight + block * steps * GROUP, x.numbers + row * halves * steps * STEP, steps,
                         count * (int)halves, vectors, sums);
            finish_tile(map, x, sums, residual, out, row, count, block, vectors, is_bf16);
            row += count;
        }
        block += vectors;
    }
}

// x [rows, inputs] -> out [rows, outputs] (+ residual [rows, outputs] in out's dtype, which may be out itself).
// scratch: rows * (2 * inputs + 16) bytes, of a fine map twice that, and 64 more.
API void heed_int8_linear(const Map *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch,
                          int64_t x_is_bf16, int64_t out_is_bf16) {
    const int64_t each = map->inputs * (x_is_bf16 ? 2 : 4);
    const int64_t unit = map->gated ? 2 : 1, units = (map->outputs + WIDTH - 1) / WIDTH;
    float *scales = scratch;
    int32_t *sums = (int32_t *)(scales + rows);
    const Rounded small = {(number *)(sums + rows * (map->fine ? 2 : 1)), scales, sums};
#pragma omp parallel if (rows * map->inputs * map->outputs > 2 * WORTH_A_THREAD)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (x_is_bf16) round_row(map, (const char *)x + row * each, small, row, 1);
            else round_row(map, (const char *)x + row * each, small, row, 0);
        }
        // All rows are rounded here. Each thread has an even part of the blocks.
        const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
        blocks(map, small, residual, out, rows, units * me / threads * unit, units * (me + 1) / threads * unit,
               out_is_bf16 != 0);
    }
}
