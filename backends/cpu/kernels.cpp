// Integer convolution, group norm and attention for CPUs with AVX-512 VNNI and BF16.
//
// Every tensor is dense and channels-last. Work is cut into tasks that threads take in turn; no task
// writes what another reads. `kernels.py` compiles this file, checks arguments and gives the ops
// their reference in plain torch.

#include <immintrin.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <torch/library.h>
#include <vector>

namespace {

using at::Tensor;

constexpr int ROWS = 6;         // pixels (or queries) of a register tile
constexpr int VECTORS = 4;      // vectors of 16 outputs of a register tile
constexpr int WIDE = 64;        // outputs of a register tile: the width of a weight panel
constexpr float LOG2E = 1.4426950408889634f;

inline __mmask16 first(int64_t n) {
    return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(n, 0)) - 1);
}

inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }

inline __m512 load(const at::BFloat16* p, __mmask16 m) {
    const __m256i half = _mm256_maskz_loadu_epi16(m, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(float* p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }

inline void store(at::BFloat16* p, __m512 v, __mmask16 m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
}

// 2^x, relative error below 2e-7 where the result is a normal number.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-140.f));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.53401609e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33998830e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61850994e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55032893e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226467e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147206e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// 2^x, relative error below 1e-4: enough for what is rounded to bfloat16.
inline __m512 rough_exp2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(5.51147376e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.42606344e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93271458e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.99928660e-1f));
    return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 v) {
    const __m512 e = exp2(_mm512_mul_ps(v, _mm512_set1_ps(-LOG2E)));
    return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// GELU by its tanh formula, which is v * sigmoid(2 u)
inline __m512 gelu_tanh(__m512 v) {
    const __m512 cube = _mm512_mul_ps(v, _mm512_mul_ps(v, v));
    const __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), v);
    const __m512 e = exp2(_mm512_mul_ps(u, _mm512_set1_ps(-2 * 0.7978845608f * LOG2E)));
    return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// GELU by erf; Abramowitz and Stegun 7.1.26, absolute error of erf below 2e-7
inline __m512 gelu(__m512 v) {
    const __m512 one = _mm512_set1_ps(1.f);
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_mul_ps(_mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f)), t);
    const __m512 e = exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-LOG2E)));
    const __m512 erf = _mm512_fnmadd_ps(p, e, one);  // of |v|
    const __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 signed_erf = _mm512_mask_sub_ps(erf, negative, _mm512_setzero_ps(), erf);
    return _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(0.5f)), _mm512_add_ps(one, signed_erf));
}

enum class Activation { none, silu, gelu, gelu_tanh };

inline __m512 activate(__m512 v, Activation which) {
    switch (which) {
        case Activation::silu: return silu(v);
        case Activation::gelu: return gelu(v);
        case Activation::gelu_tanh: return gelu_tanh(v);
        default: return v;
    }
}

// round(v * inverse) + zero, kept in [0, levels], as bytes
inline void store_codes(
    uint8_t* p, __m512 v, __m512 inverse, __m512i zero, __m512i levels, __mmask16 m) {
    // 2^30 bounds what the conversion can hold; both are far outside of the grid
    v = _mm512_mul_ps(v, inverse);
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1073741824.f)), _mm512_set1_ps(1073741824.f));
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), zero);
    q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_setzero_si512()), levels);
    _mm512_mask_cvtepi32_storeu_epi8(p, m, q);
}

// ------------------------------------------------------------------ convolution

struct Segment {
    const uint8_t* x;        // codes (B, H, W, C), pixels `pixel` apart
    const int8_t* weight;    // panels (O / 64, taps, C / 4, 64, 4)
    const uint8_t* packed;   // the same at 4 bits, (O / 64, taps, C / 4, 128), or null
    const uint8_t* zeros;    // (O padded to 64) zero points of packed weights
    const float* weight_scale;
    const int32_t* offset;
    const float* scale;      // (ranges,), `scale_step` apart
    int64_t channels, pixel, scale_step, rows_per_range;
};

struct Geometry {
    int64_t batch, height, width, out_height, out_width, out, taps_y, taps_x;
    int64_t stride_y, stride_x, dilation_y, dilation_x;
};

// Sums of M pixels and N vectors of outputs over all taps and channels of one segment.
template <int M, int N>
inline void sums(
    const uint8_t* const* pixels, const int8_t* panel, const Segment& s, const Geometry& g,
    __m512i (&acc)[ROWS][VECTORS]) {
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[i][j] = _mm512_setzero_si512();
    for (int64_t ky = 0; ky < g.taps_y; ky++)
        for (int64_t kx = 0; kx < g.taps_x; kx++) {
            const int64_t shift = (ky * g.dilation_y * g.width + kx * g.dilation_x) * s.pixel;
            const uint8_t* x[M];
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) x[i] = pixels[i] + shift;
            for (int64_t c = 0; c < s.channels; c += 4, panel += 4 * WIDE) {
                __m512i w[N];
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) w[j] = _mm512_loadu_si512(panel + 64 * j);
#pragma GCC unroll 6
                for (int i = 0; i < M; i++) {
                    int32_t four;
                    std::memcpy(&four, x[i] + c, 4);
                    const __m512i v = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                    for (int j = 0; j < N; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], v, w[j]);
                }
            }
        }
}

template <int M, int N>
void tile(
    const uint8_t* const* pixels, const int8_t* panel, const Segment& s, const Geometry& g,
    int64_t row, int64_t column, bool adds, float* buffer) {
    __m512i acc[ROWS][VECTORS];
    sums<M, N>(pixels, panel, s, g, acc);
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
        const __mmask16 m = first(g.out - column - 16 * j);
        const __m512 scale = load(s.weight_scale + column + 16 * j, m);
        const __m512i offset = _mm512_maskz_loadu_epi32(m, s.offset + column + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            const __m512 unit = _mm512_set1_ps(s.scale[(row + i) / s.rows_per_range * s.scale_step]);
            const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[i][j], offset));
            const __m512 part = _mm512_mul_ps(value, _mm512_mul_ps(unit, scale));
            float* to = buffer + i * WIDE + 16 * j;
            _mm512_storeu_ps(to, adds ? _mm512_add_ps(_mm512_loadu_ps(to), part) : part);
        }
    }
}

using Tile = void (*)(
    const uint8_t* const*, const int8_t*, const Segment&, const Geometry&, int64_t, int64_t, bool,
    float*);

template <int M>
Tile of_width(int n) {
    return n == 1 ? tile<M, 1> : n == 2 ? tile<M, 2> : n == 3 ? tile<M, 3> : tile<M, 4>;
}

Tile tile_of(int m, int n) {
    switch (m) {
        case 1: return of_width<1>(n);
        case 2: return of_width<2>(n);
        case 3: return of_width<3>(n);
        case 4: return of_width<4>(n);
        case 5: return of_width<5>(n);
        default: return of_width<6>(n);
    }
}

// A panel of 4-bit codes less their zero points, as int8; `zeros` are the panel's 64.
void unpack_panel(const uint8_t* packed, const uint8_t* zeros, int64_t steps, int8_t* panel) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i zero[4];
    for (int j = 0; j < 4; j++) {
        alignas(64) uint8_t four[64];
        for (int i = 0; i < 64; i++) four[i] = zeros[16 * j + i / 4];
        zero[j] = _mm512_load_si512(four);
    }
    for (int64_t k = 0; k < steps; k++, packed += 128, panel += 256)
        for (int j = 0; j < 2; j++) {
            const __m512i bytes = _mm512_loadu_si512(packed + 64 * j);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
            _mm512_storeu_si512(
                panel + 64 * j, _mm512_sub_epi8(_mm512_and_si512(bytes, low), zero[j]));
            _mm512_storeu_si512(panel + 64 * j + 128, _mm512_sub_epi8(high, zero[j + 2]));
        }
}

struct Epilogue {
    const float* bias;
    const void* row;        // (B, O)
    const void* residual;   // like the result
    const float* out_scale; // (ranges,), `out_scale_step` apart, where the result is codes
    int64_t out_scale_step, rows_per_out_range;
    int32_t out_zero, out_levels;
    Activation activation;  // before the result is written
};

// The values of `m` pixels from `row` on and up to 64 outputs from `column` on, to memory.
template <typename T>
void finish(
    const float* buffer, const Epilogue& e, const Geometry& g, int64_t row, int m, int64_t column,
    void* y) {
    const int64_t per_sample = g.out_height * g.out_width;
    const int64_t wide = std::min<int64_t>(WIDE, g.out - column);
    for (int i = 0; i < m; i++)
        for (int64_t j = 0; j < wide; j += 16) {
            const __mmask16 mask = first(wide - j);
            const int64_t at = (row + i) * g.out + column + j;
            __m512 v = _mm512_loadu_ps(buffer + i * WIDE + j);
            if (e.bias) v = _mm512_add_ps(v, load(e.bias + column + j, mask));
            if (e.row) {
                const int64_t sample = (row + i) / per_sample;
                const T* p = static_cast<const T*>(e.row) + sample * g.out + column + j;
                v = _mm512_add_ps(v, load(p, mask));
            }
            if (e.residual) v = _mm512_add_ps(v, load(static_cast<const T*>(e.residual) + at, mask));
            if (e.activation != Activation::none) v = activate(v, e.activation);
            if (e.out_scale) {
                const __m512 inverse = _mm512_set1_ps(1.f / e.out_scale[(row + i) / e.rows_per_out_range * e.out_scale_step]);
                store_codes(
                    static_cast<uint8_t*>(y) + at, v, inverse, _mm512_set1_epi32(e.out_zero),
                    _mm512_set1_epi32(e.out_levels), mask);
            } else {
                store(static_cast<T*>(y) + at, v, mask);
            }
        }
}

template <typename T>
void convolve(
    const std::vector<Segment>& segments, const Geometry& g, const Epilogue& e, void* y) {
    const int64_t rows = g.batch * g.out_height * g.out_width;
    const int64_t panels = (g.out + WIDE - 1) / WIDE;
    const int64_t taps = g.taps_y * g.taps_x;
    int64_t depth = 0;
    bool packed = false;
    for (const Segment& s : segments) {
        depth += taps * s.channels;
        packed |= s.packed != nullptr;
    }
    // Runs of pixels that are long, since each one reads a panel, and many enough to share out.
    const int64_t threads = at::get_num_threads();
    const int64_t wanted = std::max<int64_t>(1, (4 * threads + panels - 1) / panels);
    int64_t run = (rows + wanted - 1) / wanted;
    run = std::max<int64_t>((run + ROWS - 1) / ROWS * ROWS, packed ? 16 * ROWS : 4 * ROWS);
    const int64_t runs = (rows + run - 1) / run;
    at::parallel_for(0, panels * runs, 1, [&](int64_t begin, int64_t end) {
        std::vector<int8_t> scratch(packed ? depth * WIDE : 0);
        int64_t held = -1;
        alignas(64) float buffer[ROWS * WIDE];
        for (int64_t task = begin; task < end; task++) {
            const int64_t panel = task / runs, column = panel * WIDE;
            const int n = static_cast<int>((std::min<int64_t>(WIDE, g.out - column) + 15) / 16);
            if (packed && held != panel) {
                int64_t start = 0;
                for (const Segment& s : segments) {
                    const int64_t steps = taps * s.channels / 4;
                    if (s.packed)
                        unpack_panel(
                            s.packed + panel * steps * 128, s.zeros + column, steps,
                            scratch.data() + start);
                    start += steps * 256;
                }
                held = panel;
            }
            const int64_t last = std::min(rows, (task % runs + 1) * run);
            for (int64_t row = task % runs * run; row < last; row += ROWS) {
                const int m = static_cast<int>(std::min<int64_t>(ROWS, last - row));
                const Tile compute = tile_of(m, n);
                int64_t start = 0;
                for (size_t k = 0; k < segments.size(); k++) {
                    const Segment& s = segments[k];
                    const uint8_t* pixels[ROWS];
                    for (int i = 0; i < m; i++) {
                        const int64_t p = row + i, ox = p % g.out_width, q = p / g.out_width;
                        const int64_t oy = q % g.out_height, b = q / g.out_height;
                        pixels[i] = s.x + ((b * g.height + oy * g.stride_y) * g.width +
                                           ox * g.stride_x) * s.pixel;
                    }
                    const int64_t size = taps * s.channels * WIDE;
                    const int8_t* w = s.packed ? scratch.data() + start : s.weight + panel * size;
                    compute(pixels, w, s, g, row, column, k > 0, buffer);
                    start += size;
                }
                finish<T>(buffer, e, g, row, m, column, y);
            }
        }
    });
}

// Elements between neighbouring pixels of codes (B, H, W, C); sides of one pixel have any stride.
int64_t pixel_stride(const Tensor& x) {
    int64_t pixel = -1, apart = 1;
    bool even = x.stride(3) == 1 && x.size(3) % 4 == 0;
    for (const int dim : {2, 1, 0}) {
        if (x.size(dim) > 1) {
            if (pixel < 0) pixel = x.stride(dim) / apart;
            even &= x.stride(dim) == pixel * apart;
        }
        apart *= x.size(dim);
    }
    TORCH_CHECK(
        even, "cpu_conv takes codes with channels last, in fours, and pixels evenly apart");
    return pixel < 0 ? x.size(3) : pixel;
}

Tensor conv(
    at::TensorList xs, at::TensorList weights, at::TensorList zeros, at::TensorList weight_scales,
    at::TensorList offsets, at::TensorList scales, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& row, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& out_scale, int64_t out_zero, int64_t out_levels, int64_t out,
    at::IntArrayRef taps, at::IntArrayRef stride, at::IntArrayRef dilation, at::ScalarType dtype,
    c10::string_view activation) {
    const Tensor& x = xs[0];
    for (const std::optional<Tensor>& each : {bias, row, residual})
        TORCH_CHECK(!each || each->is_contiguous(), "cpu_conv takes contiguous summands");
    for (const std::optional<Tensor>& each : {row, residual})
        TORCH_CHECK(!each || each->scalar_type() == dtype, "cpu_conv takes summands in its dtype");
    Geometry g;
    g.batch = x.size(0), g.height = x.size(1), g.width = x.size(2), g.out = out;
    g.taps_y = taps[0], g.taps_x = taps[1];
    g.stride_y = stride[0], g.stride_x = stride[1];
    g.dilation_y = dilation[0], g.dilation_x = dilation[1];
    g.out_height = (g.height - g.dilation_y * (g.taps_y - 1) - 1) / g.stride_y + 1;
    g.out_width = (g.width - g.dilation_x * (g.taps_x - 1) - 1) / g.stride_x + 1;
    const int64_t rows = g.batch * g.out_height * g.out_width;
    std::vector<Segment> segments;
    for (size_t k = 0; k < xs.size(); k++) {
        const bool packed = weights[k].scalar_type() == at::kByte;
        Segment s;
        s.x = xs[k].const_data_ptr<uint8_t>();
        s.weight = packed ? nullptr : weights[k].const_data_ptr<int8_t>();
        s.packed = packed ? weights[k].const_data_ptr<uint8_t>() : nullptr;
        s.zeros = packed ? zeros[k].const_data_ptr<uint8_t>() : nullptr;
        s.weight_scale = weight_scales[k].const_data_ptr<float>();
        s.offset = offsets[k].const_data_ptr<int32_t>();
        s.scale = scales[k].const_data_ptr<float>();
        s.channels = xs[k].size(3);
        s.pixel = pixel_stride(xs[k]);
        s.scale_step = scales[k].stride(0);
        s.rows_per_range = std::max<int64_t>(1, rows / scales[k].size(0));
        segments.push_back(s);
    }
    Epilogue e{};
    if (activation == "silu") e.activation = Activation::silu;
    else if (activation == "gelu") e.activation = Activation::gelu;
    else if (activation == "gelu_tanh") e.activation = Activation::gelu_tanh;
    else TORCH_CHECK(activation == "none", "cpu_conv knows no activation ", activation);
    const bool codes = out_scale.has_value();
    if (bias) e.bias = bias->const_data_ptr<float>();
    if (row) e.row = row->const_data_ptr();
    if (residual) e.residual = residual->const_data_ptr();
    if (codes) {
        e.out_scale = out_scale->const_data_ptr<float>();
        e.out_scale_step = out_scale->stride(0);
        e.rows_per_out_range = std::max<int64_t>(1, rows / out_scale->size(0));
        e.out_zero = static_cast<int32_t>(out_zero), e.out_levels = static_cast<int32_t>(out_levels);
    }
    Tensor y = at::empty(
        {g.batch, g.out_height, g.out_width, out}, x.options().dtype(codes ? at::kByte : dtype));
    if (dtype == at::kBFloat16)
        convolve<at::BFloat16>(segments, g, e, y.data_ptr());
    else
        convolve<float>(segments, g, e, y.data_ptr());
    return y;
}

// ------------------------------------------------------------------ group norm and codes

struct Norm {
    int64_t batch, height, width, channels, groups;
    int64_t left, right, top, bottom;
    double eps;
    bool silu;
};

// A tensor (B, H, W, C), or two of them whose channels follow each other.
template <typename T>
struct Parts {
    const T* x[2];
    int64_t channels[2], pixels;

    const T* sample(int part, int64_t index) const {
        return x[part] + index * pixels * channels[part];
    }
    float first_pixel(int64_t index, int64_t channel) const {
        const int part = channel >= channels[0];
        return static_cast<float>(sample(part, index)[channel - part * channels[0]]);
    }
};

// Per-channel factors a and summands b, (B, C), by which x * a + b is the norm, modulated.
template <typename T>
void affine(
    const Parts<T>& x, const Norm& n, const float* weight, const float* bias, const float* factor,
    const float* shift, float* a, float* b) {
    const int64_t pixels = n.height * n.width, c = n.channels, each = c / n.groups;
    const int64_t threads = at::get_num_threads();
    const int64_t cuts = std::max<int64_t>(
        1, std::min((2 * threads + n.batch - 1) / n.batch, pixels / 16));
    std::vector<float> partial(n.batch * cuts * 2 * c);
    at::parallel_for(0, n.batch * cuts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t sample = task / cuts, cut = task % cuts;
            const int64_t from = pixels * cut / cuts, to = pixels * (cut + 1) / cuts;
            for (int part = 0; part < 2; part++)
            for (int64_t j = 0, width = x.channels[part]; j < width; j += 64) {
                const T* start = x.sample(part, sample);
                float* sum = partial.data() + task * 2 * c + part * x.channels[0];
                float* square = sum + c;
                __mmask16 m[4];
                __m512 base[4], s[4], q[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    m[k] = first(width - j - 16 * k);
                    base[k] = load(start + j + 16 * k, m[k]);
                    s[k] = q[k] = _mm512_setzero_ps();
                }
                for (int64_t p = from; p < to; p++)
#pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) {
                        const __m512 v = _mm512_sub_ps(load(start + p * width + j + 16 * k, m[k]), base[k]);
                        s[k] = _mm512_add_ps(s[k], v);
                        q[k] = _mm512_fmadd_ps(v, v, q[k]);
                    }
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    store(sum + j + 16 * k, s[k], m[k]);
                    store(square + j + 16 * k, q[k], m[k]);
                }
            }
        }
    });
    for (int64_t sample = 0; sample < n.batch; sample++)
        for (int64_t group = 0; group < n.groups; group++) {
            double total = 0, spread = 0;
            std::vector<double> sums(each), squares(each);
            for (int64_t k = 0; k < each; k++) {
                const int64_t channel = group * each + k;
                for (int64_t cut = 0; cut < cuts; cut++) {
                    const float* sum = partial.data() + (sample * cuts + cut) * 2 * c;
                    sums[k] += sum[channel], squares[k] += sum[c + channel];
                }
                total += sums[k] + pixels * static_cast<double>(x.first_pixel(sample, channel));
            }
            const double mean = total / (pixels * each);
            for (int64_t k = 0; k < each; k++) {
                const double d = x.first_pixel(sample, group * each + k) - mean;
                spread += squares[k] + 2 * d * sums[k] + pixels * d * d;
            }
            const double inverse = 1 / std::sqrt(std::max(spread, 0.0) / (pixels * each) + n.eps);
            for (int64_t k = 0; k < each; k++) {
                const int64_t channel = group * each + k, at = sample * c + channel;
                double scale = inverse * (weight ? weight[channel] : 1.f);
                double add = (bias ? bias[channel] : 0.f) - mean * scale;
                if (factor) scale *= factor[at], add *= factor[at];
                if (shift) add += shift[at];
                a[at] = static_cast<float>(scale), b[at] = static_cast<float>(add);
            }
        }
}

// Codes of x * a + b (or of x), after SiLU where it is wanted, in a border of the zero's code.
template <typename T>
void codes_of(
    const Parts<T>& x, const Norm& n, const float* a, const float* b, at::TensorList scales,
    at::IntArrayRef zeros, at::IntArrayRef sizes, int64_t levels, uint8_t* y) {
    const int64_t c = n.channels, high = n.top + n.height + n.bottom;
    const int64_t wide = n.left + n.width + n.right;
    std::vector<float> inverses(n.batch * sizes.size());
    for (int64_t sample = 0; sample < n.batch; sample++)
        for (size_t run = 0; run < sizes.size(); run++) {
            const float* scale = scales[run].const_data_ptr<float>();
            inverses[sample * sizes.size() + run] = 1.f / scale[scales[run].size(0) > 1 ? sample * scales[run].stride(0) : 0];
        }
    const __m512i most = _mm512_set1_epi32(static_cast<int32_t>(levels));
    const auto border = [&](uint8_t* to, int64_t pixels) {
        for (int64_t p = 0; p < pixels; p++)
            for (size_t run = 0; run < sizes.size(); to += sizes[run++])
                std::memset(to, static_cast<int>(zeros[run]), sizes[run]);
    };
    at::parallel_for(0, n.batch * high, std::max<int64_t>(1, 4096 / (wide * c)), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t sample = task / high, row = task % high - n.top;
            uint8_t* to = y + task * wide * c;
            if (row < 0 || row >= n.height) {
                border(to, wide);
                continue;
            }
            border(to, n.left);
            border(to + (n.left + n.width) * c, n.right);
            to += n.left * c;
            // runs of channels that lie in one part and have one grid
            size_t run = 0;
            int64_t part = 0, end_run = sizes[0], end_part = x.channels[0];
            for (int64_t start = 0; start < c;) {
                while (start >= end_run) end_run += sizes[++run];
                if (start >= end_part) part = 1, end_part = c;
                const int64_t stop = std::min(end_run, end_part), width = x.channels[part];
                const T* from = x.sample(part, sample) + row * n.width * width;
                if (part) from -= x.channels[0];
                const __m512 inverse = _mm512_set1_ps(inverses[sample * sizes.size() + run]);
                const __m512i zero = _mm512_set1_epi32(static_cast<int32_t>(zeros[run]));
                for (int64_t j = start; j < stop; j += 16) {
                    const __mmask16 m = first(stop - j);
                    __m512 factor, add;
                    if (a) factor = load(a + sample * c + j, m), add = load(b + sample * c + j, m);
                    for (int64_t p = 0; p < n.width; p++) {
                        __m512 v = load(from + p * width + j, m);
                        if (a) v = _mm512_fmadd_ps(v, factor, add);
                        if (n.silu) v = silu(v);
                        store_codes(to + p * c + j, v, inverse, zero, most, m);
                    }
                }
                start = stop;
            }
        }
    });
}

template <typename T>
void norm_codes(
    const Tensor& x, const std::optional<Tensor>& more, const Norm& n,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& factor,
    const std::optional<Tensor>& shift, at::TensorList scales, at::IntArrayRef zeros,
    at::IntArrayRef sizes, int64_t levels, Tensor& y) {
    const auto floats = [](const std::optional<Tensor>& t) {
        return t ? t->const_data_ptr<float>() : nullptr;
    };
    const Parts<T> from{
        {x.const_data_ptr<T>(), more ? more->const_data_ptr<T>() : nullptr},
        {x.size(3), more ? more->size(3) : 0},
        n.height * n.width};
    std::vector<float> a, b;
    if (n.groups > 0) {
        a.resize(n.batch * n.channels), b.resize(n.batch * n.channels);
        affine<T>(
            from, n, floats(weight), floats(bias), floats(factor), floats(shift), a.data(), b.data());
    }
    codes_of<T>(
        from, n, n.groups > 0 ? a.data() : nullptr, b.data(), scales, zeros, sizes, levels,
        y.data_ptr<uint8_t>());
}

// groups = 0: no norm, the codes of x.
Tensor norm(
    const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& shift, bool silu, at::TensorList scales, at::IntArrayRef zeros,
    at::IntArrayRef sizes, int64_t levels, at::IntArrayRef pads, const std::optional<Tensor>& more) {
    TORCH_CHECK(
        x.is_contiguous() && (!more || more->is_contiguous()),
        "cpu_norm takes a contiguous (B, H, W, C)");
    for (const std::optional<Tensor>& each : {weight, bias, factor, shift})
        TORCH_CHECK(!each || each->is_contiguous(), "cpu_norm takes contiguous modulation");
    const int64_t channels = x.size(3) + (more ? more->size(3) : 0);
    const Norm n{x.size(0), x.size(1), x.size(2), channels, groups, pads[0],
                 pads[1],   pads[2],   pads[3],   eps,      silu};
    Tensor y = at::empty(
        {n.batch, n.top + n.height + n.bottom, n.left + n.width + n.right, n.channels},
        x.options().dtype(at::kByte));
    if (x.scalar_type() == at::kBFloat16)
        norm_codes<at::BFloat16>(
            x, more, n, weight, bias, factor, shift, scales, zeros, sizes, levels, y);
    else
        norm_codes<float>(
            x, more, n, weight, bias, factor, shift, scales, zeros, sizes, levels, y);
    return y;
}

// ------------------------------------------------------------------ attention

constexpr int KEYS = 512;  // keys of one step

inline __m512 dot(__m512 acc, int32_t pair, __m512i packed) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)packed);
}

// C (M, 16 N) += A (M, 2 pairs) B (pairs, 16 N, 2), A and B in bf16; S sums side by side, since each
// product waits for the one before.
template <int M, int N, int S>
inline void product(
    const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t pairs, float* c,
    int64_t c_row, bool adds) {
    __m512 acc[S][M][N];
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
#pragma GCC unroll 6
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++)
                acc[s][i][j] = adds && s == 0 ? _mm512_loadu_ps(c + i * c_row + 16 * j)
                                              : _mm512_setzero_ps();
    const auto step = [&](int64_t k, auto& to) {
        __m512i w[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) w[j] = _mm512_loadu_si512(b + k * b_row + 32 * j);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            int32_t pair;
            std::memcpy(&pair, a + i * a_row + 2 * k, 4);
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) to[i][j] = dot(to[i][j], pair, w[j]);
        }
    };
    int64_t k = 0;
    for (; k + S <= pairs; k += S)
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) step(k + s, acc[s]);
    for (; k < pairs; k++) step(k, acc[0]);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            __m512 sum = acc[0][i][j];
#pragma GCC unroll 4
            for (int s = 1; s < S; s++) sum = _mm512_add_ps(sum, acc[s][i][j]);
            _mm512_storeu_ps(c + i * c_row + 16 * j, sum);
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
    const __m512 f = _mm512_set1_ps(factor);
    for (int64_t d = 0; d < size; d += 16) {
        const __mmask16 m = first(size - d);
        store(reinterpret_cast<at::BFloat16*>(to + d), _mm512_mul_ps(load(from + d, m), f), m);
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
        const __mmask16 m = j < keys ? first(out - d) : 0;
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(from + j * step + d, m)));
    };
    for (int64_t j = 0; j < keys; j += 2)
        for (int64_t d = 0; d < out; d += 16) {
            const __m512i both = _mm512_or_si512(half(j, d), _mm512_slli_epi32(half(j + 1, d), 16));
            _mm512_storeu_si512(to + (j / 2 * wide + d) * 2, both);
        }
}

// Scores of a row to exp2(score - most so far) as bf16; the factor by which earlier sums shrink.
inline float soften(
    const float* scores, int64_t count, int64_t columns, float& most, float& total, uint16_t* to) {
    const int64_t whole = count / 16 * 16, fours = count / 64 * 64;
    const __mmask16 tail = first(count - whole);
    __m512 peaks[4], parts[4];  // four at a time, since each waits for the one before
    for (int k = 0; k < 4; k++) peaks[k] = _mm512_set1_ps(most), parts[k] = _mm512_setzero_ps();
    for (int64_t j = 0; j < fours; j += 64)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            peaks[k] = _mm512_max_ps(peaks[k], _mm512_loadu_ps(scores + j + 16 * k));
    __m512 peak = _mm512_max_ps(
        _mm512_max_ps(peaks[0], peaks[1]), _mm512_max_ps(peaks[2], peaks[3]));
    for (int64_t j = fours; j < whole; j += 16)
        peak = _mm512_max_ps(peak, _mm512_loadu_ps(scores + j));
    if (tail) peak = _mm512_mask_max_ps(peak, tail, peak, _mm512_loadu_ps(scores + whole));
    const float now = _mm512_reduce_max_ps(peak);
    const __m512 top = _mm512_set1_ps(now);
    const auto weight = [&](int64_t j, __mmask16 m) {
        const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + j), top);
        const __m512 p = _mm512_maskz_mov_ps(m, rough_exp2(shifted));
        _mm256_storeu_si256((__m256i*)(to + j), (__m256i)_mm512_cvtneps_pbh(p));
        return p;
    };
    for (int64_t j = 0; j < fours; j += 64)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            parts[k] = _mm512_add_ps(parts[k], weight(j + 16 * k, 0xffff));
    for (int64_t j = fours; j < columns; j += 16)
        parts[0] = _mm512_add_ps(parts[0], weight(j, j < whole ? 0xffff : tail));
    const __m512 sum = _mm512_add_ps(
        _mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
    const float shrink = most == -INFINITY ? 0.f : std::exp2(most - now);
    total = total * shrink + _mm512_reduce_add_ps(sum);
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
                float most[ROWS], total[ROWS];
                std::fill(most, most + ROWS, -INFINITY), std::fill(total, total + ROWS, 0.f);
                for (int64_t start = 0; start < keys; start += KEYS) {
                    const int64_t count = std::min<int64_t>(KEYS, keys - start);
                    const int64_t columns = (count + 15) / 16 * 16;
                    product_of(
                        rows.data(), row_size, packed_k.data() + 2 * start, padded * 2, pairs,
                        scores.data(), KEYS, columns, false);
                    for (int i = 0; i < m; i++) {
                        const __m512 shrink = _mm512_set1_ps(soften(
                            scores.data() + i * KEYS, count, columns, most[i], total[i],
                            weights.data() + i * KEYS));
                        float* o = sums.data() + i * wide;
                        for (int64_t d = 0; start > 0 && d < wide; d += 16)
                            _mm512_storeu_ps(o + d, _mm512_mul_ps(_mm512_loadu_ps(o + d), shrink));
                    }
                    product_of(
                        weights.data(), KEYS, packed_v.data() + start * wide, wide * 2, columns / 2,
                        sums.data(), wide, wide, start > 0);
                }
                for (int i = 0; i < m; i++) {
                    T* to = y.data_ptr<T>() + ((b * queries + row + i) * heads + h) * out;
                    const __m512 inverse = _mm512_set1_ps(1.f / total[i]);
                    for (int64_t d = 0; d < out; d += 16)
                        store(
                            to + d, _mm512_mul_ps(_mm512_loadu_ps(sums.data() + i * wide + d), inverse),
                            first(out - d));
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

TORCH_LIBRARY_IMPL(tfmq_fx, CPU, m) {
    m.impl("cpu_conv", conv);
    m.impl("cpu_norm", norm);
    m.impl("cpu_attention", attention);
}
