// What the kernels share: loads and stores of 16 values, exponentials, activations, codes.

#pragma once

#ifdef TFMQ_FX_PLAIN
#include "plain.h"
#else
#include "avx512.h"
#endif

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int ROWS = 6;         // pixels (or queries) of a register tile
constexpr int VECTORS = 4;      // vectors of 16 outputs of a register tile
constexpr int WIDE = 64;        // outputs of a register tile: the width of a weight panel
constexpr Mask ALL = 0xffff;
constexpr float LOG2E = 1.4426950408889634f;

// How many calls of this thread have met a NaN and made a code of it: codes cannot tell.
thread_local int64_t nan_calls = 0;

// Whether the tasks of one call have met a NaN; counted when the call ends.
class NanWatch {
  public:
    void add(Mask seen) {
        if (seen) met.store(true, std::memory_order_relaxed);
    }
    ~NanWatch() { nan_calls += met.load(); }

  private:
    std::atomic<bool> met{false};
};

inline Mask first(int64_t n) {
    return n >= 16 ? ALL : static_cast<Mask>((1u << std::max<int64_t>(n, 0)) - 1);
}

template <typename V>
inline V load_whole(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const at::BFloat16* p, Mask m) {
    return of_bits(widened(load(reinterpret_cast<const uint16_t*>(p), m)) << 16);
}

inline void store(at::BFloat16* p, Floats v, Mask m) {
    store(reinterpret_cast<uint16_t*>(p), to_halves(v), m);
}

// 2^x, relative error below 2e-7 where the result is a normal number.
inline Floats exp2(Floats x) {
    x = max(x, floats(-140.f));
    const Floats n = round(x);
    const Floats r = x - n;
    Floats p = floats(1.53401609e-4f);
    p = fmadd(p, r, floats(1.33998830e-3f));
    p = fmadd(p, r, floats(9.61850994e-3f));
    p = fmadd(p, r, floats(5.55032893e-2f));
    p = fmadd(p, r, floats(2.40226467e-1f));
    p = fmadd(p, r, floats(6.93147206e-1f));
    p = fmadd(p, r, floats(1.0f));
    return scaled(p, n);
}

// 2^x, relative error below 1e-4: enough for what is rounded to bfloat16.
inline Floats rough_exp2(Floats x) {
    const Floats n = round(x);
    const Floats r = x - n;
    Floats p = floats(5.51147376e-2f);
    p = fmadd(p, r, floats(2.42606344e-1f));
    p = fmadd(p, r, floats(6.93271458e-1f));
    p = fmadd(p, r, floats(9.99928660e-1f));
    return scaled(p, n);
}

inline Floats silu(Floats v) {
    const Floats e = exp2(v * floats(-LOG2E));
    return v / (floats(1.f) + e);
}

// GELU by its tanh formula, which is v * sigmoid(2 u)
inline Floats gelu_tanh(Floats v) {
    const Floats cube = v * (v * v);
    const Floats u = fmadd(cube, floats(0.044715f), v);
    const Floats e = exp2(u * floats(-2 * 0.7978845608f * LOG2E));
    return v / (floats(1.f) + e);
}

// GELU by erf; Abramowitz and Stegun 7.1.26, absolute error of erf below 2e-7
inline Floats gelu(Floats v) {
    const Floats one = floats(1.f);
    const Floats z = abs(v) * floats(0.70710678f);
    const Floats t = one / fmadd(z, floats(0.3275911f), one);
    Floats p = floats(1.061405429f);
    p = fmadd(p, t, floats(-1.453152027f));
    p = fmadd(p, t, floats(1.421413741f));
    p = fmadd(p, t, floats(-0.284496736f));
    p = fmadd(p, t, floats(0.254829592f)) * t;
    const Floats e = exp2(z * z * floats(-LOG2E));
    const Floats erf = fnmadd(p, e, one);  // of |v|
    const Floats signed_erf = select(below(v, floats(0.f)), floats(0.f) - erf, erf);
    return v * floats(0.5f) * (one + signed_erf);
}

enum class Activation { none, silu, gelu, gelu_tanh };

inline Floats activate(Floats v, Activation which) {
    switch (which) {
        case Activation::silu: return silu(v);
        case Activation::gelu: return gelu(v);
        case Activation::gelu_tanh: return gelu_tanh(v);
        default: return v;
    }
}

// round(v * inverse) + zero, kept in [0, levels], as bytes; where it is NaN, whose code is 0
inline Mask store_codes(uint8_t* p, Floats v, Floats inverse, Ints zero, Ints levels, Mask m) {
    v = v * inverse;
    const Mask seen = nan(v) & m;
    // 2^30 bounds what the conversion can hold; both are far outside of the grid
    v = min(max(v, floats(-1073741824.f)), floats(1073741824.f));
    const Ints q = min(max(to_ints(v) + zero, ints(0)), levels);
    store(p, q, m);
    return seen;
}

}  // namespace
