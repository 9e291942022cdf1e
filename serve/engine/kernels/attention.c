// Attention over the paged KV cache: one pass a layer for everything that is in the step.
//
// Keys of a layer are [kv heads, blocks, dim, size], so that a register holds one dimension of neighbouring keys;
// values are [kv heads, blocks, size, dim]. `size` is a multiple of 16; 16 neighbouring keys are a cell.
//
// What a query gets is one fixed sequence of operations, whoever is computed beside it:
//   a score            a chain of fma over the dimensions, in order
//   its weight         online softmax over groups of 64 keys, counted from position 0 of the sequence
//   an output number   a chain of fma over the keys, in order, rescaled once a group
// A tile of queries shares the registers that hold keys and values. A key that one query of the tile does not see
// weighs exactly 0 for it, and a group in which it sees none multiplies by exactly 1: nothing depends on the tile.
// Cells that hold no token of the sequence are loaded beside others, and never used.

#include "team.h"

#include <float.h>

#define NOINLINE __attribute__((noinline))  // what is inlined into it gets all registers

enum {
    CELL = 16,
    GROUP = 64,
    MAX_DIM = 256,
    PART_NUMBERS = 12288,   // of queries, and of outputs, that a part holds at most
    VECTORS = CELL / WIDTH  // registers that hold one dimension of a cell
};

#if WIDTH == 16 || defined(__aarch64__)  // 32 registers: 24 sums, 4 keys, and one query at a time
enum { TILE = 6, COLUMNS = 4 };
#elif WIDTH == 8  // 16 registers: 12 sums, 2 keys; but with one or two queries 4 keys, so that no sum is waited for
enum { TILE = 6, COLUMNS = 4 };
#else
enum { TILE = 2, COLUMNS = 4 };
#endif

// Registers beside each other, for a tile of so many rows.
INLINE int columns_of(int rows) { return WIDTH == 8 && rows > 2 ? 2 : COLUMNS; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE const void *at(const void *from, int64_t numbers, int is_bf16) {
    return (const char *)from + numbers * (is_bf16 ? 2 : 4);
}

// ---- new keys and values into their cells ----

static void write_part(const Step *step, const Layer *layer, const Part *part, int64_t head) {
    const int64_t dim = step->dim, size = step->size, bytes = step->is_bf16 ? 2 : 4;
    for (int64_t t = 0; t < part->count;) {
        const int64_t position = part->position + t, offset = position % size;
        const int64_t block = head * step->blocks + step->tables[part->table + position / size];
        const int64_t run = least(size - offset, part->count - t), row = part->row + t;
        const char *k = (const char *)layer->k + (row * layer->k_stride + head * dim) * bytes;
        const char *v = (const char *)layer->v + (row * layer->v_stride + head * dim) * bytes;
        char *keys = (char *)layer->keys + (block * dim * size + offset) * bytes;
        char *values = (char *)layer->values + (block * size + offset) * dim * bytes;
        for (int64_t i = 0; i < run; i++)
            memcpy(values + i * dim * bytes, v + i * layer->v_stride * bytes, dim * bytes);
        for (int64_t d = 0; d < dim; d++)
            for (int64_t i = 0; i < run; i++) {
                const int64_t to = d * size + i, from = i * layer->k_stride + d;
                if (step->is_bf16)
                    ((bf16 *)keys)[to] = ((const bf16 *)k)[from];
                else
                    ((float *)keys)[to] = ((const float *)k)[from];
            }
        t += run;
    }
}

// ---- the two products of a tile, in registers ----

// Into the second cache; a line has 16 numbers, or 32 of bf16.
INLINE void fetch(const void *from, int64_t numbers, int is_bf16) {
    if (!is_bf16 || numbers % 32 == 0) __builtin_prefetch(at(from, numbers, is_bf16), 0, 2);
}

// scores[r][0 : columns * WIDTH] = q[r] . keys; q rows are `wide` apart, dimensions of a key `size`. Meanwhile the
// cells `ahead`, one for each cell here, come nearer: blocks lie anywhere, and the processor does not guess where.
INLINE void dots(int rows, int columns, int is_bf16, const float *q, int64_t wide, int64_t dim, const void *const *keys,
                 int64_t size, float *scores, const void *const *ahead) {
    vf sums[TILE][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) sums[r][c] = splat(0);
    for (int64_t d = 0; d < dim; d++) {
        vf key[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) key[c] = load_any(keys[c], d * size, is_bf16);
        if (ahead)
            for (int c = 0; c < (columns + VECTORS - 1) / VECTORS; c++) fetch(ahead[c], d * CELL, is_bf16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vf x = splat(q[r * wide + d]);
#pragma GCC unroll 8
            for (int c = 0; c < columns; c++) sums[r][c] = fma_(x, key[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) store(scores + r * GROUP + c * WIDTH, sums[r][c]);
}

// out[r][0 : columns * WIDTH] = scale[r] * out[r] + sum of weights[r][j] * values[j], j from first to last; values from
// dimension d on. Meanwhile the same dimensions of the key cells `ahead` come nearer, one for each cell here.
INLINE void mix(int rows, int columns, int is_bf16, const float *weights, int64_t first, int64_t last,
                const void *const *cells, int64_t d, int64_t dim, const float *scale, float *out, int64_t wide,
                const void *const *ahead, int64_t size) {
    vf sums[TILE][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) sums[r][c] = load(out + r * wide + c * WIDTH) * splat(scale[r]);
    for (int64_t j = first; j < last;) {
        const void *values = at(cells[j / CELL], j % CELL * dim + d, is_bf16);
        const int64_t end = least(last, j - j % CELL + CELL);
        for (; j < end; j++, values = at(values, dim, is_bf16)) {
            vf value[COLUMNS];
#pragma GCC unroll 8
            for (int c = 0; c < columns; c++) value[c] = load_any(values, c * WIDTH, is_bf16);
            if (ahead)
                for (int c = 0; c < columns * WIDTH / CELL; c++)
                    fetch(ahead[j / CELL], (d + j % CELL * (columns * WIDTH / CELL) + c) * size, is_bf16);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vf x = splat(weights[r * GROUP + j]);
#pragma GCC unroll 8
                for (int c = 0; c < columns; c++) sums[r][c] = fma_(x, value[c], sums[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) store(out + r * wide + c * WIDTH, sums[r][c]);
}

// Every size of a tile has code of its own, in which `rows`, `columns` and the type are constants.
#define OF_TYPE(CALL, R, C) \
    if (is_bf16)            \
        CALL(R, C, 1);      \
    else                    \
        CALL(R, C, 0);      \
    break;
#define OF_ROWS(CALL, C)                             \
    switch (rows) {                                  \
        case 1: OF_TYPE(CALL, 1, C)                  \
        case 2: OF_TYPE(CALL, (TILE < 2 ? 1 : 2), C) \
        case 3: OF_TYPE(CALL, (TILE < 3 ? 1 : 3), C) \
        case 4: OF_TYPE(CALL, (TILE < 4 ? 1 : 4), C) \
        case 5: OF_TYPE(CALL, (TILE < 5 ? 1 : 5), C) \
        case 6: OF_TYPE(CALL, (TILE < 6 ? 1 : 6), C) \
    }
#define OF_SIZE(CALL)                                      \
    switch (columns) {                                     \
        case 1: OF_ROWS(CALL, 1) break;                    \
        case 2: OF_ROWS(CALL, 2) break;                    \
        case 3: OF_ROWS(CALL, (COLUMNS < 3 ? 1 : 3)) break; \
        case 4: OF_ROWS(CALL, (COLUMNS < 4 ? 1 : 4)) break; \
    }

NOINLINE static void dots_of(int rows, int columns, int is_bf16, const float *q, int64_t wide, int64_t dim,
                             const void *const *keys, int64_t size, float *scores, const void *const *ahead) {
#define DOTS(R, C, B) dots(R, C, B, q, wide, dim, keys, size, scores, ahead)
    OF_SIZE(DOTS)
}

NOINLINE static void mix_of(int rows, int columns, int is_bf16, const float *weights, int64_t first, int64_t last,
                            const void *const *cells, int64_t d, int64_t dim, const float *scale, float *out,
                            int64_t wide, const void *const *ahead, int64_t size) {
#define MIX(R, C, B) mix(R, C, B, weights, first, last, cells, d, dim, scale, out, wide, ahead, size)
    OF_SIZE(MIX)
}

// ---- one part through one KV head ----

typedef struct {
    _Alignas(64) float q[PART_NUMBERS];  // [rows, wide], times the scale of scores and log2(e): weights are 2^score
    _Alignas(64) float out[PART_NUMBERS];  // [rows, wide]
    _Alignas(64) float keys[GROUP * MAX_DIM], values[GROUP * MAX_DIM];  // a group of bf16, widened for many tiles
    _Alignas(64) float weights[TILE * GROUP];
    float total[PART_NUMBERS / CELL][WIDTH];             // sums of weights, each lane its own keys
    float top[PART_NUMBERS / CELL];                      // the largest score so far
    int64_t first[PART_NUMBERS / CELL], end[PART_NUMBERS / CELL];  // keys that a row sees
} Work;

// Scores of a row and a group become weights; the row's top and total move on; returns what scales the output so far.
INLINE float weigh(float *scores, int vectors, int64_t base, int64_t first, int64_t end, float *top, float *total) {
    vf best = splat(*top);
    const int partial = first > base || end < base + (int64_t)vectors * WIDTH;
    if (partial) {
        vi lane;
        for (int i = 0; i < WIDTH; i++) lane[i] = i;
        const vi from = splat_int((int32_t)most(first - base, 0)), to = splat_int((int32_t)least(end - base, GROUP));
        for (int i = 0; i < vectors; i++) {
            const vi key = lane + i * WIDTH;
            const vi seen = (key >= from) & (key < to);
            const vf score = load(scores + i * WIDTH);
            store(scores + i * WIDTH, (vf)(((vi)score & seen) | ((vi)splat(-__builtin_inff()) & ~seen)));
        }
    }
    for (int i = 0; i < vectors; i++) best = max_(load(scores + i * WIDTH), best);
    const vf new_top = splat(max_lanes(best));
    const vf scale = exp2_(splat(*top) - new_top);
    vf sum = load(total) * scale;
    for (int i = 0; i < vectors; i++) {
        const vf weight = exp2_(load(scores + i * WIDTH) - new_top);
        store(scores + i * WIDTH, weight);
        sum += weight;
    }
    store(total, sum);
    *top = new_top[0];
    return scale[0];
}

// Rows [row : row + rows] of the part take in the keys of the group at `base`.
static void attend_tile(Work *work, int64_t row, int rows, int64_t base, int64_t wide, int64_t dim, int is_bf16,
                        const void *const *key_cells, int64_t size, const void *const *value_cells,
                        const void *const *ahead) {
    int64_t first = work->first[row], end = work->end[row];
    for (int64_t r = row + 1; r < row + rows; r++) {
        first = least(first, work->first[r]);
        end = most(end, work->end[r]);
    }
    if (end <= base || first >= base + GROUP) return;
    const int64_t from = most(first - base, 0), to = least(end - base, GROUP);
    const int vectors = (int)((to + CELL - 1) / CELL) * VECTORS;
    const int most_columns = columns_of(rows);
    for (int i = 0; i < vectors; i += most_columns) {
        const void *keys[COLUMNS];
        const int columns = (int)least(most_columns, vectors - i);
        for (int c = 0; c < columns; c++)
            keys[c] = at(key_cells[(i + c) / VECTORS], (i + c) % VECTORS * WIDTH, is_bf16);
        dots_of(rows, columns, is_bf16, work->q + row * wide, wide, dim, keys, size, work->weights + i * WIDTH,
                ahead ? value_cells + i / VECTORS : NULL);
    }
    float scale[TILE];
    for (int r = 0; r < rows; r++) {
        const int64_t i = row + r;
        scale[r] = weigh(work->weights + r * GROUP, vectors, base, work->first[i], work->end[i], work->top + i,
                         work->total[i]);
    }
    const int chunks = (int)(wide / WIDTH);
    for (int i = 0; i < chunks; i += most_columns)
        mix_of(rows, (int)least(most_columns, chunks - i), is_bf16, work->weights, from, to, value_cells, i * WIDTH,
               dim, scale, work->out + row * wide + i * WIDTH, wide, ahead, size);
}

// A group of bf16 as floats, in place of its cells: with many tiles it pays to convert once. An exact conversion.
static void widen(Work *work, const void **key_cells, int64_t size, const void **value_cells, int cells, int64_t wide,
                  int64_t dim) {
    for (int i = 0; i < cells; i++) {
        float *keys = work->keys + i * dim * CELL, *values = work->values + i * CELL * wide;
        for (int64_t d = 0; d < dim; d++)
            for (int c = 0; c < CELL; c += WIDTH)
                store(keys + d * CELL + c, load_bf16((const bf16 *)key_cells[i] + d * size + c));
        for (int64_t j = 0; j < CELL; j++)
            for (int64_t d = 0; d < dim; d += WIDTH)
                store(values + j * dim + d, load_bf16((const bf16 *)value_cells[i] + j * dim + d));
        key_cells[i] = keys;
        value_cells[i] = values;
    }
}

// Where the cells of the group at `base` are; returns how many there are up to key `last`.
INLINE int locate(const Step *step, const Layer *layer, const Part *part, int64_t head, int64_t base, int64_t last,
                  const void **key_cells, const void **value_cells) {
    const int64_t dim = step->dim, size = step->size;
    const int cells = (int)least(GROUP / CELL, (last - base + CELL - 1) / CELL);
    for (int i = 0; i < cells; i++) {
        const int64_t position = base + i * CELL, offset = position % size;
        const int64_t block = head * step->blocks + step->tables[part->table + position / size];
        key_cells[i] = at(layer->keys, block * dim * size + offset, (int)step->is_bf16);
        value_cells[i] = at(layer->values, (block * size + offset) * dim, (int)step->is_bf16);
    }
    return cells;
}

static void attend_part(const Step *step, const Layer *layer, const Part *part, int64_t head) {
    Work work;
    const int is_bf16 = (int)step->is_bf16;
    const int64_t dim = step->dim, size = step->size, wide = (dim + CELL - 1) / CELL * CELL;
    // The query heads that share this KV head are rows beside each other, position by position.
    const int64_t group = step->heads / step->kv_heads, rows = part->count * group;
    const float scale = (float)(1.4426950408889634 / __builtin_sqrt((double)dim));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t position = part->position + r / group;
        const int64_t from = (part->row + r / group) * layer->q_stride + (head * group + r % group) * dim;
        for (int64_t d = 0; d < dim; d++) work.q[r * wide + d] = read_any(layer->q, from + d, is_bf16) * scale;
        memset(work.out + r * wide, 0, (size_t)wide * sizeof(float));
        memset(work.total[r], 0, sizeof work.total[r]);
        work.top[r] = -FLT_MAX;  // finite: a row that has seen no key yet must not subtract infinities
        work.end[r] = position + 1;
        work.first[r] = layer->window ? most(0, position + 1 - layer->window) : 0;
    }

    const int64_t tiles = (rows + TILE - 1) / TILE, tile = (rows + tiles - 1) / tiles;
    const int64_t last = part->position + part->count;
    for (int64_t base = work.first[0] / GROUP * GROUP; base < last; base += GROUP) {
        const void *key_cells[GROUP / CELL], *value_cells[GROUP / CELL];
        const int cells = locate(step, layer, part, head, base, last, key_cells, value_cells);
        const void *ahead[GROUP / CELL], *unused[GROUP / CELL];
        const int next = tiles == 1 ? locate(step, layer, part, head, base + GROUP, last, ahead, unused) : 0;
        for (int i = next; i < cells; i++) ahead[i] = key_cells[i];
        const int widened = is_bf16 && tiles > 1;
        if (widened) widen(&work, key_cells, size, value_cells, cells, wide, dim);
        for (int64_t row = 0; row < rows; row += tile)
            attend_tile(&work, row, (int)least(tile, rows - row), base, wide, dim, is_bf16 && !widened, key_cells,
                        widened ? CELL : size, value_cells, tiles == 1 ? ahead : NULL);
    }

    for (int64_t r = 0; r < rows; r++) {
        const int64_t to = (part->row + r / group) * step->heads * dim + (head * group + r % group) * dim;
        const float share = 1.0f / sum_lanes(load(work.total[r]));
        for (int64_t d = 0; d < dim; d++) write_any(layer->out, to + d, work.out[r * wide + d] * share, is_bf16);
    }
}

// ---- the whole of it ----

void attend_by_team(const Step *step, const Layer *layer) {
    const int64_t items = step->parts * step->kv_heads;
    // All keys and values must be there before anybody reads them: the first loop ends with a barrier.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; i++) write_part(step, layer, step->part + i / step->kv_heads, i % step->kv_heads);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items; i++) attend_part(step, layer, step->part + i / step->kv_heads, i % step->kv_heads);
}

API void heed_attend(const Step *step, const Layer *layer) {
#pragma omp parallel num_threads((int)step->threads) if (step->threads > 1)
    attend_by_team(step, layer);
}
