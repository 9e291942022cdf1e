// The parts of a block that a team of threads does together. Every thread of a parallel region calls them, with the same
// arguments; outside of one, a single thread does all. Where what they wrote is read next, the caller has a barrier
// between, but for rotate, activate and attend, which end with one. The files that define them say what they compute.

#pragma once

#include "common.h"

// Consecutive tokens of one sequence: `count` rows of the batch from `row` on, at `position` of the sequence, whose
// blocks are tables[table], tables[table + 1], ...
typedef struct {
    int64_t row, position, count, table;
} Part;

// A step. serve/engine/kernels/attention.py has the same fields in the same order.
typedef struct {
    int64_t heads, kv_heads, dim, size, blocks;
    int64_t is_bf16;  // else float
    int64_t parts, threads;
    const Part *part;
    const int32_t *tables;
} Step;

// A layer of it. Rows of q, k and v are strides apart, in numbers; a row has its heads one after the other.
typedef struct {
    const void *q, *k, *v;
    void *out, *keys, *values;
    int64_t q_stride, k_stride, v_stride, window;
} Layer;

typedef struct FloatMap FloatMap;  // linear.c
typedef struct Int8Map Int8Map;    // int8.c

void linear_by_team(const FloatMap *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch);
void int8_linear_by_team(const Int8Map *map, const void *x, const void *residual, void *out, int64_t rows, void *scratch,
                         int x_is_bf16, int out_is_bf16);
void rotate_by_team(void *x, const float *table, const float *q_norm, const float *k_norm, int64_t rows, int64_t stride,
                    int64_t q_heads, int64_t k_heads, int64_t dim, float eps, int is_bf16);
void activate_by_team(const void *x, void *out, int64_t rows, int64_t inner, int kind, int is_bf16);
void attend_by_team(const Step *step, const Layer *layer);
