// Attention in bfloat16: 6 queries and up to 512 keys at a time.

#pragma once

#include "vectors.h"

namespace {

constexpr int KEYS = 512;  // keys of one step

// C (M, 16 N) += A (M, 2 pairs) B (pairs, 16 N, 2), A and B in bf16; S sums side by side, since each
// product waits for the one before.
template <int M, int N, int S>
inline void product(
    const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t pairs, float* c,
    int64_t c_row, bool adds) {
    Floats acc[S][M][N];
UNROLL
    for (int s = 0; s < S; s++)
UNROLL
        for (int i = 0; i < M; i++)
UNROLL
            for (int j = 0; j < N; j++)
                acc[s][i][j] = adds && s == 0 ? load(c + i * c_row + 16 * j) : floats(0.f);
    const auto step = [&](int64_t k, auto& to) {
        Ints w[N];
UNROLL
        for (int j = 0; j < N; j++) w[j] = load_whole<Ints>(b + k * b_row + 32 * j);
UNROLL
        for (int i = 0; i < M; i++) {
            int32_t pair;
            std::memcpy(&pair, a + i * a_row + 2 * k, 4);
UNROLL
            for (int j = 0; j < N; j++) to[i][j] = dot(to[i][j], ints(pair), w[j]);
        }
    };
    int64_t k = 0;
    for (; k + S <= pairs; k += S)
UNROLL
        for (int s = 0; s < S; s++) step(k + s, acc[s]);
    for (; k < pairs; k++) step(k, acc[0]);
UNROLL
    for (int i = 0; i < M; i++)
UNROLL
        for (int j = 0; j < N; j++) {
            Floats sum = acc[0][i][j];
UNROLL
            for (int s = 1; s < S; s++) sum = sum + acc[s][i][j];
            store(c + i * c_row + 16 * j, sum);
        }
}

// The same with rows in steps of 6 and columns in steps of 64; rows and c_row are padded to that.
void product_of(
    const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t pairs, float* c,
    int64_t c_row, int64_t columns, bool adds) {
    for (int64_t j = 0; j < columns; j += WIDE) {
        const uint16_t* w = b + 2 * j;
        switch (std::min<int64_t>(4, (columns - j + 15) / 16)) {
            case 1: product<ROWS, 1, 4>(a, a_row, w, b_row, pairs, c + j, c_row, adds); break;
            case 2: product<ROWS, 2, 2>(a, a_row, w, b_row, pairs, c + j, c_row, adds); break;
            case 3: product<ROWS, 3, 1>(a, a_row, w, b_row, pairs, c + j, c_row, adds); break;
            default: product<ROWS, 4, 1>(a, a_row, w, b_row, pairs, c + j, c_row, adds);
        }
    }
}

// A row of values, times a factor, as bf16.
template <typename T>
inline void round_row(const T* from, int64_t size, float factor, uint16_t* to) {
    const Floats f = floats(factor);
    for (int64_t d = 0; d < size; d += 16) {
        const Mask m = first(size - d);
        store(to + d, to_halves(load(from + d, m) * f), m);
    }
}

// Keys (K, D), `step` apart, as (pairs of D, `padded`, 2).
template <typename T>
void pack_keys(
    const T* from, int64_t step, int64_t keys, int64_t depth, int64_t padded, uint16_t* row,
    uint16_t* to) {
    const int64_t pairs = (depth + 1) / 2;
    for (int64_t j = 0; j < keys; j++) {
        round_row(from + j * step, depth, 1.f, row);
        for (int64_t d = 0; d < pairs; d++) std::memcpy(to + (d * padded + j) * 2, row + 2 * d, 4);
    }
}

// Values (K, D), `step` apart, as (pairs of K, `wide`, 2).
template <typename T>
void pack_values(
    const T* from, int64_t step, int64_t keys, int64_t out, int64_t wide, uint16_t* to) {
    const auto half = [&](int64_t j, int64_t d) {
        const Mask m = j < keys ? first(out - d) : 0;
        return widened(to_halves(load(from + j * step + d, m)));
    };
    for (int64_t j = 0; j < keys; j += 2)
        for (int64_t d = 0; d < out; d += 16) {
            const Ints both = half(j, d) | half(j + 1, d) << 16;
            std::memcpy(to + (j / 2 * wide + d) * 2, &both, 64);
        }
}

// Scores of a row to exp2(score - most so far) as bf16; the factor by which earlier sums shrink.
inline float soften(
    const float* scores, int64_t count, int64_t columns, float& most, float& sum, uint16_t* to) {
    const int64_t whole = count / 16 * 16, fours = count / 64 * 64;
    const Mask tail = first(count - whole);
    Floats peaks[4], parts[4];  // four at a time, since each waits for the one before
    for (int k = 0; k < 4; k++) peaks[k] = floats(most), parts[k] = floats(0.f);
    for (int64_t j = 0; j < fours; j += 64)
UNROLL
        for (int k = 0; k < 4; k++)
            peaks[k] = max(peaks[k], load(scores + j + 16 * k));
    Floats peak = max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3]));
    for (int64_t j = fours; j < whole; j += 16) peak = max(peak, load(scores + j));
    if (tail) peak = select(tail, max(peak, load(scores + whole)), peak);
    const float now = highest(peak);
    const Floats top = floats(now);
    const auto weight = [&](int64_t j, Mask m) {
        const Floats p = select(m, rough_exp2(load(scores + j) - top), floats(0.f));
        store(to + j, to_halves(p), ALL);
        return p;
    };
    for (int64_t j = 0; j < fours; j += 64)
UNROLL
        for (int k = 0; k < 4; k++)
            parts[k] = parts[k] + weight(j + 16 * k, ALL);
    for (int64_t j = fours; j < columns; j += 16)
        parts[0] = parts[0] + weight(j, j < whole ? ALL : tail);
    const Floats each = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    const float shrink = most == -INFINITY ? 0.f : std::exp2(most - now);
    sum = sum * shrink + total(each);
    most = now;
    return shrink;
}

template <typename T>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, double scale, Tensor& y) {
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), depth = q.size(3);
    const int64_t keys = k.size(2), out = v.size(3);
    const int64_t pairs = (depth + 1) / 2, wide = (out + 15) / 16 * 16;
    const int64_t padded = (keys + 15) / 16 * 16, row_size = (depth + 15) / 16 * 16;
    const float unit = static_cast<float>(scale) * LOG2E;
    const int64_t threads = at::get_num_threads();
    int64_t cuts = 1;
    while (batch * heads * cuts < threads && queries / (cuts + 1) >= ROWS) cuts++;
    at::parallel_for(0, batch * heads * cuts, 1, [&](int64_t begin, int64_t end) {
        std::vector<uint16_t> packed_k(pairs * padded * 2), packed_v(padded * wide);
        std::vector<uint16_t> rows(ROWS * row_size), key(row_size), weights(ROWS * KEYS);
        std::vector<float> scores(ROWS * KEYS), sums(ROWS * wide);
        int64_t held = -1;
        for (int64_t task = begin; task < end; task++) {
            const int64_t head = task / cuts, cut = task % cuts, b = head / heads, h = head % heads;
            const auto start_of = [&](const Tensor& x) {
                return x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1);
            };
            if (held != head) {
                pack_keys(start_of(k), k.stride(2), keys, depth, padded, key.data(), packed_k.data());
                pack_values(start_of(v), v.stride(2), keys, out, wide, packed_v.data());
                held = head;
            }
            const T* from = start_of(q);
            const int64_t last = queries * (cut + 1) / cuts;
            for (int64_t row = queries * cut / cuts; row < last; row += ROWS) {
                const int m = static_cast<int>(std::min<int64_t>(ROWS, last - row));
                for (int i = 0; i < m; i++)
                    round_row(
                        from + (row + i) * q.stride(2), depth, unit, rows.data() + i * row_size);
                float most[ROWS], totals[ROWS];
                std::fill(most, most + ROWS, -INFINITY), std::fill(totals, totals + ROWS, 0.f);
                for (int64_t start = 0; start < keys; start += KEYS) {
                    const int64_t count = std::min<int64_t>(KEYS, keys - start);
                    const int64_t columns = (count + 15) / 16 * 16;
                    product_of(
                        rows.data(), row_size, packed_k.data() + 2 * start, padded * 2, pairs,
                        scores.data(), KEYS, columns, false);
                    for (int i = 0; i < m; i++) {
                        const Floats shrink = floats(soften(
                            scores.data() + i * KEYS, count, columns, most[i], totals[i],
                            weights.data() + i * KEYS));
                        float* o = sums.data() + i * wide;
                        for (int64_t d = 0; start > 0 && d < wide; d += 16)
                            store(o + d, load(o + d) * shrink);
                    }
                    product_of(
                        weights.data(), KEYS, packed_v.data() + start * wide, wide * 2, columns / 2,
                        sums.data(), wide, wide, start > 0);
                }
                for (int i = 0; i < m; i++) {
                    T* to = y.data_ptr<T>() + ((b * queries + row + i) * heads + h) * out;
                    const Floats inverse = floats(1.f / totals[i]);
                    for (int64_t d = 0; d < out; d += 16)
                        store(
                            to + d, load(sums.data() + i * wide + d) * inverse, first(out - d));
                }
            }
        }
    });
}

// q, k, v: (B, H, L, D), any strides but for dense channels; the result lies (B, L, H, D).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
    Tensor y = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options());
    if (q.scalar_type() == at::kBFloat16)
        attend<at::BFloat16>(q, k, v, scale, y);
    else
        attend<float>(q, k, v, scale, y);
    return y.permute({0, 2, 1, 3});
}

}  // namespace
