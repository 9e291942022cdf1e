// Products of int8 weights with int8 rows: symmetric scales (absmax / 127), of the weights one an output channel, of a
// row one for each PIECE of its inputs, so that a row's answer knows nothing of its neighbours, and its few large numbers
// cost those far from them nothing. The sum of a piece is exact in int32; the pieces are added as floats, in order.
//
// Decoding few rows reads each weight once and multiplies it a few times: memory is the limit, so the weights lie as
// they are read, and everything around the product is done in the same call: the norm and the rounding of the rows
// before, scales, bias, silu(gate) * up and the residual after.
//
// Layout: blocks of WIDTH output channels; of each block, STEP inputs of every channel together, then the next STEP.

#include <omp.h>

#include "rows.h"
#include "team.h"

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
#define ROWS 3                // sums of a piece and sums so far share the registers
#define GROUP (WIDTH * STEP)  // weights of one block and step
#define PIECE 32              // inputs; a multiple of STEP and of WIDTH

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

struct Int8Map {  // serve/engine/quantize.py has the same
    const weight_t *weight;
    const float *scales;
    const float *bias;         // [outputs], or of a gated map [gate | up]; NULL: none
    const float *norm_weight;  // [inputs]; NULL: the rows are taken as they are
    const float *norm_bias;    // [inputs], or NULL
    int64_t inputs, outputs;   // outputs of a gated map: of its half
    int64_t gated;             // blocks of gate and up alternate, and the output is silu(gate) * up
    int64_t centred;           // the norm is LayerNorm
    float eps;
};

INLINE int64_t pieces_of(int64_t inputs) { return (inputs + PIECE - 1) / PIECE; }

typedef struct {
    number *numbers;  // [rows, steps * STEP]
    float *scales;    // [rows, pieces]
    int32_t *starts;  // [rows, pieces]: -OFFSET * the sum of the piece's numbers, where its products begin
} Rounded;

INLINE int32_t add_lanes(vi x) {
    int32_t total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += x[lane];
    return total;
}

INLINE vf read_row(const Int8Map *map, const void *x, Moments m, int64_t i, int is_bf16) {
    const int64_t n = map->inputs - i;
    vf value = load_some(x, i, n, is_bf16);
    return map->norm_weight ? normed(value, m, map->norm_weight, map->norm_bias, i, n) : value;
}

INLINE void round_row(const Int8Map *map, const void *x, Rounded to, int64_t row, int is_bf16) {
    const int64_t inputs = map->inputs, padded = steps_of(inputs) * STEP, pieces = pieces_of(inputs);
    Moments m = {0, 1};
    if (map->norm_weight)
        m = map->centred ? moments(x, inputs, map->eps, 1, is_bf16) : moments(x, inputs, map->eps, 0, is_bf16);
    number *numbers = to.numbers + row * padded;
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t from = piece * PIECE, end = smaller(inputs, from + PIECE);
        vf values[PIECE / WIDTH], most = splat(0), poison = splat(0);
        for (int64_t i = from, k = 0; i < end; i += WIDTH, k++) {
            values[k] = read_row(map, x, m, i, is_bf16);
            most = max_(most, abs_(values[k]));
            poison = fma_(values[k], splat(0), poison);  // stays 0 unless a value is infinite or no number
        }
        const float largest = max_lanes(most), inverse = largest < LEAST ? 0 : 127 / largest;
        vi sum = splat_int(0);
        for (int64_t i = from, k = 0; i < end; i += WIDTH, k++) {
            vi q = rounded(values[k] * inverse);
            vn narrow = __builtin_convertvector(q, vn);
            memcpy(numbers + i, &narrow, smaller(WIDTH, padded - i) * sizeof(number));
            sum += q;
        }
        to.scales[row * pieces + piece] = (largest < LEAST ? 0 : largest / 127) + sum_lanes(poison);
        to.starts[row * pieces + piece] = -OFFSET * add_lanes(sum);
    }
}

// The sums of one tile, `rows` rows by `vectors` blocks; both are constants where it is inlined. Meanwhile what lies
// `ahead`, `lines` of 64 bytes a step, comes into a near cache.
INLINE void sum_tile(const weight_t *weight, const number *numbers, const float *scales, const int32_t *starts,
                     int64_t steps, int64_t pieces, int rows, int vectors, vf sums[ROWS][VECTORS], const char *ahead,
                     int lines) {
    vf total[ROWS][VECTORS];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) total[r][v] = splat(0);
    for (int64_t piece = 0; piece < pieces; piece++) {
        vi acc[ROWS][VECTORS];
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[r][v] = splat_int(starts[r * pieces + piece]);
        const int64_t end = smaller(steps, (piece + 1) * (PIECE / STEP));
        for (int64_t step = piece * (PIECE / STEP); step < end; step++) {
            for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + (step * lines + i) * LINE, 0, 2);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
#pragma GCC unroll 3
                for (int r = 0; r < rows; r++)
                    acc[r][v] = dot(acc[r][v], weight + (v * steps + step) * GROUP, numbers + (r * steps + step) * STEP);
        }
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                total[r][v] = fma_(__builtin_convertvector(acc[r][v], vf), splat(scales[r * pieces + piece]), total[r][v]);
    }
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = total[r][v];
}

static void sum_any_tile(const weight_t *weight, Rounded x, int64_t row, int64_t steps, int64_t pieces, int rows,
                         int vectors, vf sums[ROWS][VECTORS], const char *ahead, int lines) {
    const number *numbers = x.numbers + row * steps * STEP;
    const float *scales = x.scales + row * pieces;
    const int32_t *starts = x.starts + row * pieces;
#define TILE(R, V)                                                                                       \
    case (R) * 8 + (V):                                                                                  \
        sum_tile(weight, numbers, scales, starts, steps, pieces, R, V, sums, ahead, lines);              \
        return;
#define TILES(V) TILE(1, V) TILE(2, V) TILE(3, V)
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

// From the sums of one tile to the output: the channels' scales, bias, silu(gate) * up, residual.
static void finish_tile(const Int8Map *map, vf sums[ROWS][VECTORS], const void *residual, void *out, int64_t row, int rows,
                        int64_t block, int vectors, int is_bf16) {
    const int64_t outputs = map->outputs;
    for (int r = 0; r < rows; r++) {
        vf gate = splat(0);
        for (int v = 0; v < vectors; v++) {
            const int64_t b = block + v, place = map->gated ? b / 2 : b, up = map->gated && b % 2;
            const int64_t channel = place * WIDTH, n = outputs - channel, at = (row + r) * outputs + channel;
            vf y = sums[r][v] * load(map->scales + b * WIDTH);
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

// Blocks [block, end) of all rows. The weights of a few blocks stay in a near cache while the rows pass; while those after
// the first few pass, which waited for the weights, the next few blocks are fetched.
static void blocks(const Int8Map *map, Rounded x, const void *residual, void *out, int64_t rows, int64_t block,
                   int64_t end, int is_bf16) {
    const int64_t steps = steps_of(map->inputs), pieces = pieces_of(map->inputs), tiles = (rows + ROWS - 1) / ROWS;
    vf sums[ROWS][VECTORS];
    while (block < end) {
        const int vectors = end - block >= VECTORS ? VECTORS : end - block >= 2 ? 2 : 1;
        const weight_t *weight = map->weight + block * steps * GROUP;
        const int64_t size = vectors * steps * GROUP * (int64_t)sizeof *weight;
        const int64_t part = tiles > 1 && size <= NEAR ? (size + tiles - 2) / (tiles - 1) : 0;  // bytes a tile
        const int lines = (int)((part + steps * LINE - 1) / (steps * LINE));                     // and a step of it
        for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
            const int count = (int)((rows - row) / (tiles - tile));  // even tiles: 4 rows are 2 and 2
            const int64_t from = (tile - 1) * lines * steps * LINE;
            const int fetching = tile > 0 && from < size && block + vectors < end;
            sum_any_tile(weight, x, row, steps, pieces, count, vectors, sums, (const char *)weight + size + from,
                         fetching ? lines : 0);
            finish_tile(map, sums, residual, out, row, count, block, vectors, is_bf16);
            row += count;
        }
        block += vectors;
    }
}

void int8_linear_by_team(const Int8Map *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch,
                         int x_is_bf16, int out_is_bf16) {
    const int64_t each = map->inputs * (x_is_bf16 ? 2 : 4), pieces = pieces_of(map->inputs);
    const int64_t unit = map->gated ? 2 : 1, units = (map->outputs + WIDTH - 1) / WIDTH;
    float *scales = scratch;
    int32_t *starts = (int32_t *)(scales + rows * pieces);
    const Rounded small = {(number *)(starts + rows * pieces), scales, starts};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        if (x_is_bf16) round_row(map, (const char *)x + row * each, small, row, 1);
        else round_row(map, (const char *)x + row * each, small, row, 0);
    }
    // All rows are rounded here. Each thread has an even part of the blocks.
    const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    blocks(map, small, residual, out, rows, units * me / threads * unit, units * (me + 1) / threads * unit,
           out_is_bf16);
}

// x [rows, inputs] -> out [rows, outputs] (+ residual [rows, outputs] in out's dtype, which may be out itself).
// scratch: rows * (2 * (inputs + STEP) + 8 * pieces) bytes.
API void heed_int8_linear(const Int8Map *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch,
                          int64_t x_is_bf16, int64_t out_is_bf16) {
#pragma omp parallel if (rows * map->inputs * map->outputs > 2 * WORTH_A_THREAD)
    int8_linear_by_team(map, x, residual, out, rows, scratch, x_is_bf16 != 0, out_is_bf16 != 0);
}
