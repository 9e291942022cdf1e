// Products of float or bf16 weights with rows, for any number of rows, with what stands before and after them in the
// same call: the norm of the rows, bias, silu(gate) * up, residual.
//
// A number of the answer is one chain of multiply-adds over the inputs, in order (of bf16 over pairs of them, where the
// processor's own instruction adds a pair), so that a row has the same bits whoever shares the product.
//
// A processor that multiplies twice as many halves (IEEE's 16-bit floats) as floats does so with bf16 weights and rows.
// A half has three bits more than a bf16 and fewer exponents: each output channel's weights and each row are scaled by a
// power of two, which loses no bit but of numbers below 2^-15 of the largest weight, or 2^-22 of the row's largest
// number. Even and odd inputs are two chains, and a chain is halves for RUN inputs at a time, whose sums are added as
// floats: what that rounds away is less than the answer's own rounding to bf16.
//
// Decoding few rows reads each weight once and multiplies it a few times: memory is the limit, so the weights lie as
// they are read, and each is read once, by all rows together, while those of the next tile are fetched. Layout: blocks of
// WIDTH output channels; of each block, STEP inputs of every channel together, then the next STEP.

#include <omp.h>

#include "rows.h"
#include "team.h"

#if defined(__AVX512FP16__)
#define HALVES 1   // bf16 is multiplied as halves
#else
#define HALVES 0
#endif
#if defined(__AVX512BF16__)
#define PAIRS 1    // two bf16 inputs are multiplied and added by one instruction
#else
#define PAIRS 0    // a pair of bf16 weights is widened as it is read, and rows are floats
#endif
#define RUN 32     // steps that are summed as halves
#define LARGEST 7  // a row's largest half is in [2^7, 2^8), so a run's sum is below 2^14, of 2^16 that a half can be
#define ROWS 6     // a tile is up to ROWS rows x VECTORS blocks of sums in registers
#if WIDTH == 16
#define VECTORS 4
#else
#define VECTORS 2
#endif
#define MOST (ROWS * VECTORS)  // or up to so many rows x 1 block
// Rows that few_rows takes. Where weights are widened, a tile of one block would wait for its rows more than for memory.
INLINE int64_t few_of(int is_bf16) { return is_bf16 && !PAIRS ? MOST / 2 : MOST; }

INLINE int64_t step_of(int is_bf16) { return is_bf16 ? 2 : 1; }
INLINE int64_t steps_of(int64_t inputs, int is_bf16) { return (inputs + step_of(is_bf16) - 1) / step_of(is_bf16); }
INLINE int64_t bytes_of_step(void) { return WIDTH * 4; }  // of one block: floats, or pairs of bf16
INLINE int are_halves(int is_bf16) { return is_bf16 && HALVES; }
INLINE int64_t bytes_of_head(int is_bf16) { return are_halves(is_bf16) ? WIDTH * 4 : 0; }  // of a block: channels' scales
INLINE int64_t bytes_of_block(int64_t steps, int is_bf16) { return bytes_of_head(is_bf16) + steps * bytes_of_step(); }
INLINE int rows_are_bf16(int is_bf16) { return is_bf16 && PAIRS; }
INLINE int64_t bytes_of_numbers(int is_bf16) { return is_bf16 && !PAIRS && !HALVES ? 8 : 4; }  // a step of a row

// 2^power, and the power to scale a number by: none for what is nearly 0, nearly inf, inf or NaN
INLINE float power_of_2(int power) {
    const int32_t bits = (127 + power) << 23;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE int exponent_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int power = (bits >> 23 & 255) - 127;
    return power > 126 || power < -100 ? 0 : power;  // 2^-127 would be 0
}

// One channel of a matrix: its numbers are step * WIDTH apart in a block.
static void pack_channel(const void *row, int64_t inputs, int is_bf16, char *block, int64_t lane) {
    const int64_t step = step_of(is_bf16);
#if HALVES
    if (is_bf16) {
        float most = 0;
        for (int64_t i = 0; i < inputs; i++) {
            const float size = fabsf(from_bf16(((const bf16 *)row)[i]));
            most = size > most ? size : most;
        }
        const int power = exponent_of(most);
        ((float *)block)[lane] = power_of_2(power);
        _Float16 *to = (_Float16 *)(block + bytes_of_head(1));
        for (int64_t i = 0; i < inputs; i++)
            to[(i / step * WIDTH + lane) * step + i % step] =
                (_Float16)(from_bf16(((const bf16 *)row)[i]) * power_of_2(-power));
        return;
    }
#endif
    for (int64_t i = 0; i < inputs; i++) {
        const int64_t to = (i / step * WIDTH + lane) * step + i % step;
        if (is_bf16) ((bf16 *)block)[to] = ((const bf16 *)row)[i];
        else ((float *)block)[to] = ((const float *)row)[i];
    }
}

// matrix [outputs, inputs] -> blocks `first`, `first + apart`, ... of packed
API void heed_pack(const void *matrix, int64_t outputs, int64_t inputs, int64_t is_bf16, void *packed, int64_t first,
                   int64_t apart) {
    const int64_t size = bytes_of_block(steps_of(inputs, is_bf16 != 0), is_bf16 != 0);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (outputs + WIDTH - 1) / WIDTH; b++) {
        char *block = (char *)packed + (first + b * apart) * size;
        memset(block, 0, size);
        for (int64_t lane = 0; lane < smaller(WIDTH, outputs - b * WIDTH); lane++)
            pack_channel((const char *)matrix + (b * WIDTH + lane) * inputs * (is_bf16 ? 2 : 4), inputs, is_bf16 != 0,
                         block, lane);
    }
}

struct FloatMap {  // serve/engine/linears.py has the same
    const void *weight;
    const float *bias;         // [outputs], or of a gated map [gate | up]; NULL: none
    const float *norm_weight;  // [inputs]; NULL: the rows are taken as they are
    const float *norm_bias;    // [inputs], or NULL
    int64_t inputs, outputs;   // outputs of a gated map: of its half
    int64_t gated;             // blocks of gate and up alternate, and the output is silu(gate) * up
    int64_t centred;           // the norm is LayerNorm
    int64_t is_bf16;           // weights, x and residual; else float
    int64_t out_is_bf16;
    float eps;
};

INLINE vf number_of_row(const FloatMap *map, const void *row, Moments m, int64_t at, int is_bf16) {
    const int64_t n = map->inputs - at;
    const vf value = load_some(row, at, n, is_bf16);
    return map->norm_weight ? normed(value, m, map->norm_weight, map->norm_bias, at, n) : value;
}

// A row as it is multiplied: normed, in its type, with zeros up to a whole step. Behind all rows of halves are their
// scales.
static void prepare_row(const FloatMap *map, const void *x, void *to, int64_t row, int64_t rows, int is_bf16) {
    const int64_t inputs = map->inputs, padded = steps_of(inputs, is_bf16) * step_of(is_bf16);
    const int narrow = rows_are_bf16(is_bf16);
    const void *from = (const char *)x + row * inputs * (is_bf16 ? 2 : 4);
    Moments m = {0, 1};
    if (map->norm_weight)
        m = map->centred ? moments(from, inputs, map->eps, 1, is_bf16) : moments(from, inputs, map->eps, 0, is_bf16);
#if HALVES
    if (is_bf16) {
        _Float16 *halves = (_Float16 *)to + row * padded;
        vf most = splat(0);
        for (int64_t i = 0; i < inputs; i += WIDTH) most = max_(abs_(number_of_row(map, from, m, i, 1)), most);
        const int power = exponent_of(max_lanes(most)) - LARGEST;
        ((float *)((_Float16 *)to + rows * padded))[row] = power_of_2(power);
        for (int64_t i = 0; i < inputs; i += WIDTH) {
            const __m512 scaled = (__m512)(number_of_row(map, from, m, i, 1) * power_of_2(-power));
            const __m256i sixteen = _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT);
            memcpy(halves + i, &sixteen, 2 * smaller(WIDTH, inputs - i));
        }
        memset(halves + inputs, 0, 2 * (padded - inputs));
        return;
    }
#endif
    void *numbers = (char *)to + row * padded * (narrow ? 2 : 4);
    for (int64_t i = 0; i < inputs; i += WIDTH)
        store_some(numbers, i, inputs - i, number_of_row(map, from, m, i, is_bf16), narrow);
    for (int64_t i = inputs; i < padded; i++) write_any(numbers, i, 0, narrow);
}

// One step of a block with one of a row. Of a float there is one part, and of a pair of bf16, where no instruction takes
// both, there are two, the first and the second of each pair: every part is a multiply-add for itself.
INLINE int parts_of(int is_bf16) { return is_bf16 && !PAIRS ? 2 : 1; }

INLINE vf weights_at(const char *block, int64_t step, int part, int is_bf16) {
    vf bits = load((const float *)(block + step * bytes_of_step()));
    if (!is_bf16 || PAIRS) return bits;
    return part ? (vf)((vi)bits & (int32_t)0xffff0000) : (vf)((vi)bits << 16);
}

INLINE vf numbers_at(const char *row, int64_t step, int part, int is_bf16) {  // 4 bytes in all lanes
    int32_t bits;
    memcpy(&bits, row + step * bytes_of_numbers(is_bf16) + 4 * part, sizeof bits);
    return (vf)splat_int(bits);
}

INLINE vf dot(vf weights, vf numbers, vf acc, int is_bf16) {
#if PAIRS
    if (is_bf16) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)numbers);
#endif
    return fma_(weights, numbers, acc);
}

// The sums of one tile, `rows` rows by `vectors` blocks; both, and the type, are constants where it is inlined.
// Meanwhile what lies `ahead`, `bytes` of it a step, comes into a near cache.
INLINE void sum_tile(const char *weight, const char *numbers, int64_t steps, int rows, int vectors, int is_bf16,
                     vf *sums, const char *ahead, int64_t bytes) {
    const int64_t apart = steps * bytes_of_step();
    vf acc[MOST][VECTORS];
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) acc[r][v] = splat(0);
    for (int64_t step = 0; step < steps; step++) {
        for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(ahead + step * bytes + i, 0, 2);
#pragma GCC unroll 2
        for (int part = 0; part < parts_of(is_bf16); part++) {
            vf w[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) w[v] = weights_at(weight + v * apart, step, part, is_bf16);
#pragma GCC unroll 24
            for (int r = 0; r < rows; r++) {
                const vf x = numbers_at(numbers + r * steps * bytes_of_numbers(is_bf16), step, part, is_bf16);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) acc[r][v] = dot(w[v], x, acc[r][v], is_bf16);
            }
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r * VECTORS + v] = acc[r][v];
}

#if HALVES
// The same of halves. Lanes of even inputs and of odd ones lie beside one another until all is summed.
INLINE void sum_tile_of_halves(const char *weight, const char *numbers, int64_t steps, int rows, int vectors, vf *sums,
                               const char *ahead, int64_t bytes) {
    const int64_t apart = bytes_of_block(steps, 1);
    __m512 low[MOST * VECTORS], high[MOST * VECTORS];  // channels 0 to 7, and 8 to 15, of each sum
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) low[r * VECTORS + v] = high[r * VECTORS + v] = _mm512_setzero_ps();
    for (int64_t first = 0; first < steps; first += RUN) {
        const int64_t end = smaller(first + RUN, steps);
        __m512h acc[MOST][VECTORS];
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[r][v] = _mm512_setzero_ph();
        for (int64_t step = first; step < end; step++) {
            for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(ahead + step * bytes + i, 0, 2);
            __m512h w[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                w[v] = _mm512_castps_ph((__m512)weights_at(weight + v * apart + bytes_of_head(1), step, 0, 0));
#pragma GCC unroll 24
            for (int r = 0; r < rows; r++) {
                const __m512h x = _mm512_castps_ph((__m512)numbers_at(numbers + r * steps * 4, step, 0, 0));
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) acc[r][v] = _mm512_fmadd_ph(w[v], x, acc[r][v]);
            }
        }
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const __m512i run = _mm512_castph_si512(acc[r][v]);
                const __m512 left = _mm512_cvtph_ps(_mm512_castsi512_si256(run));
                const __m512 right = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(run, 1));
                const int at = r * VECTORS + v;
                low[at] = _mm512_add_ps(low[at], left);
                high[at] = _mm512_add_ps(high[at], right);
            }
    }
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const int at = r * VECTORS + v;
            sums[at] = (vf)_mm512_add_ps(_mm512_permutex2var_ps(low[at], even, high[at]),
                                         _mm512_permutex2var_ps(low[at], odd, high[at]));
        }
}
#endif

static void sum_any_tile(const char *weight, const char *numbers, int64_t steps, int rows, int vectors, int is_bf16,
                         vf *sums, const char *ahead, int64_t bytes) {
#if HALVES
#define SUM(W, N, S, R, V, B, ...) \
    if (B) sum_tile_of_halves(W, N, S, R, V, __VA_ARGS__); else sum_tile(W, N, S, R, V, 0, __VA_ARGS__)
#else
#define SUM sum_tile
#endif
#define TILE(R, V, B)                                                       \
    case ((R) * 8 + (V)) * 2 + (B):                                         \
        SUM(weight, numbers, steps, R, V, B, sums, ahead, bytes);           \
        return;
#define TILES(V, B) TILE(1, V, B) TILE(2, V, B) TILE(3, V, B) TILE(4, V, B) TILE(5, V, B) TILE(6, V, B)
#define MORE(V, B) TILE(7, V, B) TILE(8, V, B) TILE(9, V, B) TILE(10, V, B) TILE(11, V, B) TILE(12, V, B)
#define MOST_OF(V, B) TILE(13, V, B) TILE(14, V, B) TILE(15, V, B) TILE(16, V, B) TILE(17, V, B) TILE(18, V, B) \
    TILE(19, V, B) TILE(20, V, B) TILE(21, V, B) TILE(22, V, B) TILE(23, V, B) TILE(24, V, B)
    switch ((rows * 8 + vectors) * 2 + is_bf16) {
        TILES(1, 0)
        TILES(1, 1)
        TILES(2, 0)
        TILES(2, 1)
        MORE(1, 0)
        MORE(1, 1)
#if VECTORS == 4
        TILES(4, 0)
        TILES(4, 1)
        MORE(2, 0)
        MORE(2, 1)
        MOST_OF(1, 0)
        MOST_OF(1, 1)
#endif
    }
#undef MOST_OF
#undef MORE
#undef TILES
#undef TILE
#undef SUM
}

// From the sums of one tile to the output: scales [rows] of halves, bias, silu(gate) * up, residual.
static void finish_tile(const FloatMap *map, const vf *sums, const float *scales, const void *residual, void *out,
                        int64_t row, int rows, int64_t block, int vectors) {
    const int64_t outputs = map->outputs, size = bytes_of_block(steps_of(map->inputs, 1), 1);  // of halves
    for (int r = 0; r < rows; r++) {
        vf gate = splat(0);
        for (int v = 0; v < vectors; v++) {
            const int64_t b = block + v, place = map->gated ? b / 2 : b, up = map->gated && b % 2;
            const int64_t channel = place * WIDTH, n = outputs - channel, at = (row + r) * outputs + channel;
            vf y = sums[r * VECTORS + v];
            if (scales) y = y * scales[row + r] * load((const float *)((const char *)map->weight + b * size));
            if (map->bias) y += load_some(map->bias, (up ? outputs : 0) + channel, n, 0);
            if (map->gated && !up) {
                gate = silu(y);
                continue;
            }
            if (up) y *= gate;
            if (residual) y += load_some(residual, at, n, map->is_bf16 != 0);
            store_some(out, at, n, y, map->out_is_bf16 != 0);
        }
    }
}

// Blocks [block, end) of few rows: a tile is all of them, beside as many blocks as leave them room in the registers.
// What the next tile multiplies is fetched meanwhile.
static void few_rows(const FloatMap *map, const char *numbers, const float *scales, const void *residual, void *out,
                     int rows, int64_t block, int64_t end) {
    const int is_bf16 = map->is_bf16 != 0, room = MOST / rows >= VECTORS ? VECTORS : MOST / rows >= 2 ? 2 : 1;
    const int64_t steps = steps_of(map->inputs, is_bf16), size = bytes_of_block(steps, is_bf16);
    vf sums[MOST * VECTORS];
    while (block < end) {
        const int vectors = end - block >= VECTORS ? VECTORS : end - block >= 2 ? 2 : 1;
        for (int v = 0; v < vectors;) {
            const int now = vectors - v < room ? vectors - v : room;
            const char *weight = (const char *)map->weight + (block + v) * size;
            sum_any_tile(weight, numbers, steps, rows, now, is_bf16, sums + v, weight + now * size,
                         now * bytes_of_step());
            v += now;
        }
        finish_tile(map, sums, scales, residual, out, 0, rows, block, vectors);
        block += vectors;
    }
}

// Blocks [block, end) of many rows. The weights of a few blocks stay in a near cache while the rows pass; while those
// after the first few pass, which waited for the weights, the next few blocks are fetched.
static void many_rows(const FloatMap *map, const char *numbers, const float *scales, const void *residual, void *out,
                      int64_t rows, int64_t block, int64_t end) {
    const int is_bf16 = map->is_bf16 != 0;
    const int64_t steps = steps_of(map->inputs, is_bf16), tiles = (rows + ROWS - 1) / ROWS;
    vf sums[MOST * VECTORS];
    while (block < end) {
        const int vectors = end - block >= VECTORS ? VECTORS : end - block >= 2 ? 2 : 1;
        const char *weight = (const char *)map->weight + block * bytes_of_block(steps, is_bf16);
        const int64_t size = vectors * bytes_of_block(steps, is_bf16);
        const int64_t part = tiles > 1 && size <= NEAR ? (size + tiles - 2) / (tiles - 1) : 0;  // bytes a tile
        const int64_t bytes = (part + steps * LINE - 1) / (steps * LINE) * LINE;                 // and a step of it
        for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
            const int count = (int)((rows - row) / (tiles - tile));  // even tiles: 8 rows are 4 and 4
            const int64_t from = (tile - 1) * bytes * steps;
            const int fetching = tile > 0 && from < size && block + vectors < end;
            sum_any_tile(weight, numbers + row * steps * bytes_of_numbers(is_bf16), steps, count, vectors, is_bf16, sums,
                         weight + size + from, fetching ? bytes : 0);
            finish_tile(map, sums, scales, residual, out, row, count, block, vectors);
            row += count;
        }
        block += vectors;
    }
}

void linear_by_team(const FloatMap *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch) {
    const int is_bf16 = map->is_bf16 != 0;
    const int64_t unit = map->gated ? 2 : 1, units = (map->outputs + WIDTH - 1) / WIDTH;
    // Rows that lie as they are multiplied are read where they are.
    const int as_they_are =
        !map->norm_weight && is_bf16 == rows_are_bf16(is_bf16) && map->inputs % step_of(is_bf16) == 0;
    if (!as_they_are) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (is_bf16) prepare_row(map, x, scratch, row, rows, 1);
            else prepare_row(map, x, scratch, row, rows, 0);
        }
    }
    // All rows are prepared here. Each thread has an even part of the blocks.
    const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = units * me / threads * unit, end = units * (me + 1) / threads * unit;
    const void *numbers = as_they_are ? x : scratch;
    const float *scales = NULL;
    if (are_halves(is_bf16)) scales = (const float *)((const char *)scratch + rows * steps_of(map->inputs, 1) * 4);
    if (rows <= few_of(is_bf16)) few_rows(map, numbers, scales, residual, out, (int)rows, first, end);
    else many_rows(map, numbers, scales, residual, out, rows, first, end);
}

// x [rows, inputs] -> out [rows, outputs] (+ residual [rows, outputs]). scratch: rows * (inputs + 1) * 4 bytes.
API void heed_linear(const FloatMap *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch) {
    if (rows == 0) return;
#pragma omp parallel if (rows * map->inputs * map->outputs > 2 * WORTH_A_THREAD)
    linear_by_team(map, x, residual, out, rows, scratch);
}
