// Sixteen values at a time in plain C++: what `avx512.h` does, on any processor, slowly.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#define UNROLL

namespace {

using Mask = uint16_t;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));  // values in bfloat16

// The vector of what a function gives for each lane's number.
template <typename V, typename F>
inline V lanes(F of) {
    V made;
    for (int i = 0; i < 16; i++) made[i] = of(i);
    return made;
}

template <typename V, typename T>
inline V some(const T* p, Mask m) {
    return lanes<V>([&](int i) { return m >> i & 1 ? p[i] : T(0); });
}

template <typename V, typename T>
inline void put(T* p, V v, Mask m) {
    for (int i = 0; i < 16; i++)
        if (m >> i & 1) p[i] = static_cast<T>(v[i]);
}

template <typename F>
inline Mask where(F is) {
    Mask made = 0;
    for (int i = 0; i < 16; i++) made |= static_cast<Mask>(is(i) ? 1 << i : 0);
    return made;
}

inline Floats floats(float x) { return Floats{} + x; }
inline Ints ints(int32_t x) { return Ints{} + x; }

inline Floats load(const float* p) { return some<Floats>(p, 0xffff); }
inline Floats load(const float* p, Mask m) { return some<Floats>(p, m); }
inline Halves load(const uint16_t* p, Mask m) { return some<Halves>(p, m); }
inline Ints load(const int32_t* p, Mask m) { return some<Ints>(p, m); }
inline void store(float* p, Floats v) { put(p, v, 0xffff); }
inline void store(float* p, Floats v, Mask m) { put(p, v, m); }
inline void store(uint16_t* p, Halves v, Mask m) { put(p, v, m); }
inline void store(uint8_t* p, Ints v, Mask m) { put(p, v, m); }

inline Floats fmadd(Floats a, Floats b, Floats c) {
    return lanes<Floats>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline Floats fnmadd(Floats a, Floats b, Floats c) { return fmadd(-a, b, c); }
template <typename V>
inline V max(V a, V b) {
    return lanes<V>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
template <typename V>
inline V min(V a, V b) {
    return lanes<V>([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline Floats abs(Floats v) {
    return lanes<Floats>([&](int i) { return std::fabs(v[i]); });
}
inline Mask below(Floats a, Floats b) {
    return where([&](int i) { return a[i] < b[i]; });
}
inline Mask nan(Floats v) {
    return where([&](int i) { return v[i] != v[i]; });
}
inline Floats select(Mask m, Floats a, Floats b) {
    return lanes<Floats>([&](int i) { return m >> i & 1 ? a[i] : b[i]; });
}
// halves are joined until one is left, as AVX-512 does it
template <typename F>
inline float joined(Floats v, F join) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = join(v[i], v[i + width]);
    return v[0];
}
inline float highest(Floats v) {
    return joined(v, [](float a, float b) { return a > b ? a : b; });
}
inline float total(Floats v) {
    return joined(v, [](float a, float b) { return a + b; });
}

inline Floats round(Floats v) {
    return lanes<Floats>([&](int i) { return std::nearbyint(v[i]); });
}
inline Ints to_ints(Floats v) {
    return lanes<Ints>([&](int i) { return static_cast<int32_t>(std::lrint(v[i])); });
}
inline Floats to_floats(Ints v) {
    return lanes<Floats>([&](int i) { return static_cast<float>(v[i]); });
}
inline Halves to_halves(Floats v) {
    return lanes<Halves>([&](int i) {
        const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(v[i]));
        if (v[i] != v[i]) return static_cast<uint16_t>(bits >> 16 | 0x40);
        if (std::fabs(v[i]) < std::numeric_limits<float>::min())
            return static_cast<uint16_t>(bits >> 16 & 0x8000);  // as the instruction does
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    });
}
inline Ints widened(Halves v) {
    return lanes<Ints>([&](int i) { return v[i]; });
}
inline Floats of_bits(Ints v) { return (Floats)v; }
inline Floats scaled(Floats p, Floats n) {
    return lanes<Floats>([&](int i) {
        if (n[i] != n[i]) return static_cast<float>(n[i]);
        if (n[i] < -1000) return 0.f;
        return std::ldexp(static_cast<float>(p[i]), static_cast<int>(n[i] < 1000 ? n[i] : 1000));
    });
}

[[gnu::noinline]] Ints dot(Ints acc, Ints x, Ints w) {
    for (int bit = 0; bit < 32; bit += 8) acc += (x >> bit & 255) * (w << (24 - bit) >> 24);
    return acc;
}
[[gnu::noinline]] Floats dot(Floats acc, Ints x, Ints w) {
    const Ints high = ints(static_cast<int32_t>(0xffff0000u));
    acc += of_bits(x & high) * of_bits(w & high);
    return acc + of_bits(x << 16) * of_bits(w << 16);
}

}  // namespace
