// All blocks of a decoder in one call, by one team of threads: between two operations is a barrier, not the end of a
// parallel region and a call from Python. The operations are those of the other files, in the same order as
// serve/engine/served.py calls them one by one, so the answers have the same bits.

#include "rows.h"
#include "team.h"

// serve/engine/layers.py has the same structures.

typedef struct {
    const void *qkv, *o, *inner, *down;  // FloatMap, or Int8Map
    const float *q_norm, *k_norm;        // [dim], or NULL
    int64_t rotates;
    int64_t window;                      // 0: none
} Block;

typedef struct {
    const Block *blocks;
    int64_t count, width, heads, kv_heads, dim;
    int64_t inner;
    int64_t activation;  // of elementwise.c; 0: it is part of the product before it
    int64_t is_int8;     // the maps
    int64_t is_bf16;     // what lies between them; else float
    float eps;           // of q_norm and k_norm
} Decoder;

static void linear(const Decoder *d, const void *map, const void *x, const void *residual, void *out, int64_t rows,
                   void *scratch) {
    if (d->is_int8) int8_linear_by_team(map, x, residual, out, rows, scratch, d->is_bf16 != 0, d->is_bf16 != 0);
    else linear_by_team(map, x, residual, out, rows, scratch);
#pragma omp barrier
}

// Some rows of from [_, bytes], to [count, bytes].
static void gather(const void *from, const int64_t *rows, int64_t count, int64_t bytes, void *to) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) memcpy((char *)to + i * bytes, (const char *)from + rows[i] * bytes, bytes);
}

// x [rows, width], the residual stream, goes through all blocks, in place. table: angles fp32 [rows, 2, dim] or NULL.
// cells: of each block its keys and its values. Memory that holds nothing before or after: qkv [rows, (heads + 2
// kv_heads) * dim], mixed [rows, heads * dim], inner [rows, inner], and scratch for the map that asks for most.
//
// With wanted [count], what leaves the last block is computed for these rows alone, into last [count, width], and x stays
// as it enters that block. A count of -1 wants all, in x.
API void heed_decode(const Decoder *d, const Step *step, void *const *cells, void *x, const float *table, int64_t rows,
                     void *qkv, void *mixed, void *inner, void *scratch, const int64_t *wanted, int64_t count,
                     void *last) {
    if (rows == 0) return;
    const int64_t bytes = d->is_bf16 ? 2 : 4, stride = (d->heads + 2 * d->kv_heads) * d->dim;
    const char *k = (const char *)qkv + d->heads * d->dim * bytes, *v = k + d->kv_heads * d->dim * bytes;
#pragma omp parallel if (step->threads > 1 || rows * d->width * d->inner > 2 * WORTH_A_THREAD)
    for (int64_t i = 0; i < d->count; i++) {
        const Block *block = d->blocks + i;
        linear(d, block->qkv, x, NULL, qkv, rows, scratch);
        const float *angles = block->rotates ? table : NULL;
        if (angles || block->q_norm)
            rotate_by_team(qkv, angles, block->q_norm, block->k_norm, rows, stride, d->heads, d->kv_heads, d->dim, d->eps,
                           d->is_bf16 != 0);
        const Layer layer = {qkv,    k,      v,      mixed,        cells[2 * i], cells[2 * i + 1],
                             stride, stride, stride, block->window};
        attend_by_team(step, &layer);
        const void *heads = mixed;
        void *stream = x;
        int64_t n = rows;
        if (count >= 0 && i == d->count - 1) {
            if (count == 0) break;
            gather(mixed, wanted, count, d->heads * d->dim * bytes, qkv);
            gather(x, wanted, count, d->width * bytes, last);
            heads = qkv, stream = last, n = count;
        }
        linear(d, block->o, heads, stream, stream, n, scratch);
        linear(d, block->inner, stream, NULL, inner, n, scratch);
        if (d->activation) activate_by_team(inner, inner, n, d->inner, (int)d->activation, d->is_bf16 != 0);
        linear(d, block->down, inner, stream, stream, n, scratch);
    }
}
