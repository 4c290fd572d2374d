// Convolution of codes with its epilogue: 6 pixels by 64 outputs at a time, summed in int32.

#pragma once

#include "vectors.h"

namespace {

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
    Ints (&acc)[ROWS][VECTORS]) {
UNROLL
    for (int i = 0; i < M; i++)
UNROLL
        for (int j = 0; j < N; j++) acc[i][j] = ints(0);
    for (int64_t ky = 0; ky < g.taps_y; ky++)
        for (int64_t kx = 0; kx < g.taps_x; kx++) {
            const int64_t shift = (ky * g.dilation_y * g.width + kx * g.dilation_x) * s.pixel;
            const uint8_t* x[M];
UNROLL
            for (int i = 0; i < M; i++) x[i] = pixels[i] + shift;
            for (int64_t c = 0; c < s.channels; c += 4, panel += 4 * WIDE) {
                Ints w[N];
UNROLL
                for (int j = 0; j < N; j++) w[j] = load_whole<Ints>(panel + 64 * j);
UNROLL
                for (int i = 0; i < M; i++) {
                    int32_t four;
                    std::memcpy(&four, x[i] + c, 4);
                    const Ints v = ints(four);
UNROLL
                    for (int j = 0; j < N; j++) acc[i][j] = dot(acc[i][j], v, w[j]);
                }
            }
        }
}

template <int M, int N>
void tile(
    const uint8_t* const* pixels, const int8_t* panel, const Segment& s, const Geometry& g,
    int64_t row, int64_t column, bool adds, float* buffer) {
    Ints acc[ROWS][VECTORS];
    sums<M, N>(pixels, panel, s, g, acc);
UNROLL
    for (int j = 0; j < N; j++) {
        const Mask m = first(g.out - column - 16 * j);
        const Floats scale = load(s.weight_scale + column + 16 * j, m);
        const Ints offset = load(s.offset + column + 16 * j, m);
UNROLL
        for (int i = 0; i < M; i++) {
            const Floats unit = floats(s.scale[(row + i) / s.rows_per_range * s.scale_step]);
            const Floats value = to_floats(acc[i][j] + offset);
            const Floats part = value * (unit * scale);
            float* to = buffer + i * WIDE + 16 * j;
            store(to, adds ? load(to) + part : part);
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
    typedef uint8_t Bytes __attribute__((vector_size(64)));
    Bytes zero[4];
    for (int j = 0; j < 4; j++) {
        uint8_t four[64];
        for (int i = 0; i < 64; i++) four[i] = zeros[16 * j + i / 4];
        zero[j] = load_whole<Bytes>(four);
    }
    for (int64_t k = 0; k < steps; k++, packed += 128, panel += 256)
        for (int j = 0; j < 2; j++) {
            const Bytes both = load_whole<Bytes>(packed + 64 * j);
            const Bytes low = (both & 15) - zero[j], high = (both >> 4) - zero[j + 2];
            std::memcpy(panel + 64 * j, &low, 64);
            std::memcpy(panel + 64 * j + 128, &high, 64);
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

// The values of `m` pixels from `row` on and up to 64 outputs from `column` on, to memory; whether
// one that becomes a code is NaN.
template <typename T>
Mask finish(
    const float* buffer, const Epilogue& e, const Geometry& g, int64_t row, int m, int64_t column,
    void* y) {
    const int64_t per_sample = g.out_height * g.out_width;
    const int64_t wide = std::min<int64_t>(WIDE, g.out - column);
    Mask seen = 0;
    for (int i = 0; i < m; i++)
        for (int64_t j = 0; j < wide; j += 16) {
            const Mask mask = first(wide - j);
            const int64_t at = (row + i) * g.out + column + j;
            Floats v = load(buffer + i * WIDE + j);
            if (e.bias) v = v + load(e.bias + column + j, mask);
            if (e.row) {
                const int64_t sample = (row + i) / per_sample;
                const T* p = static_cast<const T*>(e.row) + sample * g.out + column + j;
                v = v + load(p, mask);
            }
            if (e.residual) v = v + load(static_cast<const T*>(e.residual) + at, mask);
            if (e.activation != Activation::none) v = activate(v, e.activation);
            if (e.out_scale) {
                const Floats inverse = floats(1.f / e.out_scale[(row + i) / e.rows_per_out_range * e.out_scale_step]);
                seen |= store_codes(
                    static_cast<uint8_t*>(y) + at, v, inverse, ints(e.out_zero),
                    ints(e.out_levels), mask);
            } else {
                store(static_cast<T*>(y) + at, v, mask);
            }
        }
    return seen;
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
    NanWatch watch;
    at::parallel_for(0, panels * runs, 1, [&](int64_t begin, int64_t end) {
        std::vector<int8_t> scratch(packed ? depth * WIDE : 0);
        int64_t held = -1;
        Mask seen = 0;
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
                seen |= finish<T>(buffer, e, g, row, m, column, y);
            }
        }
        watch.add(seen);
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

}  // namespace
