// Codes of group norm, modulation and SiLU, in the borders that a convolution reads.

#pragma once

#include "vectors.h"

namespace {

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
            for (int part = 0; part < 2; part++) {
                const T* start = x.sample(part, sample);
                float* sum = partial.data() + task * 2 * c + part * x.channels[0];
                float* square = sum + c;
                for (int64_t j = 0, width = x.channels[part]; j < width; j += 64) {
                    Mask m[4];
                    Floats base[4], s[4], q[4];
UNROLL
                    for (int k = 0; k < 4; k++) {
                        m[k] = first(width - j - 16 * k);
                        base[k] = load(start + j + 16 * k, m[k]);
                        s[k] = q[k] = floats(0.f);
                    }
                    for (int64_t p = from; p < to; p++)
UNROLL
                        for (int k = 0; k < 4; k++) {
                            const Floats v = load(start + p * width + j + 16 * k, m[k]) - base[k];
                            s[k] = s[k] + v;
                            q[k] = fmadd(v, v, q[k]);
                        }
UNROLL
                    for (int k = 0; k < 4; k++) {
                        store(sum + j + 16 * k, s[k], m[k]);
                        store(square + j + 16 * k, q[k], m[k]);
                    }
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
    const Ints most = ints(static_cast<int32_t>(levels));
    const auto border = [&](uint8_t* to, int64_t pixels) {
        for (int64_t p = 0; p < pixels; p++)
            for (size_t run = 0; run < sizes.size(); to += sizes[run++])
                std::memset(to, static_cast<int>(zeros[run]), sizes[run]);
    };
    NanWatch watch;
    at::parallel_for(0, n.batch * high, std::max<int64_t>(1, 4096 / (wide * c)), [&](int64_t begin, int64_t end) {
        Mask seen = 0;
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
                const Floats inverse = floats(inverses[sample * sizes.size() + run]);
                const Ints zero = ints(static_cast<int32_t>(zeros[run]));
                for (int64_t j = start; j < stop; j += 16) {
                    const Mask m = first(stop - j);
                    Floats factor, add;
                    if (a) factor = load(a + sample * c + j, m), add = load(b + sample * c + j, m);
                    for (int64_t p = 0; p < n.width; p++) {
                        Floats v = load(from + p * width + j, m);
                        if (a) v = fmadd(v, factor, add);
                        if (n.silu) v = silu(v);
                        seen |= store_codes(to + p * c + j, v, inverse, zero, most, m);
                    }
                }
                start = stop;
            }
        }
        watch.add(seen);
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

}  // namespace
